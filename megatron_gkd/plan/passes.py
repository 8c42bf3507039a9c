"""The most that a pass over a micro-batch needs beside weights and beside what layers keep
(activations.py): tensors that exist together, at the moments at which they are many, in the order
of the code that makes them. Letters as in shapes.py; P pairs of token and expert, b bytes of an
activation's number.

On a GPU the experts' activation, QK-norm with rotary, LoRA's dropout and the loss are kernels that
hold nothing between; on a CPU they are chains of torch's functions, whose results count too (those
of dropout's masks do not).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_gkd.plan.activations import GATE_UP, joins, kept_by_layer
from megatron_gkd.plan.shapes import Shapes, low_numbers

# The loss's own (loss/linear.py, loss/torch_kernels.py), which cannot be imported without torch.
CHUNK_BYTES = {"cpu": 300 * 2**20, "cuda": 2**30}
ROW_MULTIPLE = {"cpu": 1, "cuda": 128}
BLOCK_ENTRIES = 2**19
BLOCK_BUFFERS = 7  # of a block of the Jensen-Shannon divergence
WEIGHT_BLOCK_ROWS = {"cpu": 1024, "cuda": 16384}


@dataclass(frozen=True)
class Layer:
    """A decoder layer: the sizes of a micro-batch in it, its linears with LoRA and their rank."""

    shapes: Shapes
    names: Sequence[str]
    rank: int
    drops: bool = True
    """Whether LoRA has dropout"""

    @cached_property
    def kept(self) -> dict[str, int]:
        """See `kept_by_layer`."""
        return kept_by_layer(self.shapes, self.names, self.rank, drops=self.drops)

    @property
    def kept_bytes(self) -> int:
        return sum(self.kept.values())

    @property
    def low_of_experts(self) -> tuple[int, int]:
        """R of gate and up, and of down."""
        of_gate_up = low_numbers(self.names, self.rank, GATE_UP)
        return of_gate_up, low_numbers(self.names, self.rank, ("down_proj",))

    @cached_property
    def working(self) -> int:
        """Of its backward at its highest, beside what it keeps: the gradient of its output, and
        what its experts need, or attention where the experts' activations are gone.
        """
        after_experts = attention_backward(self) - self.kept["experts"]
        return residual(self.shapes) + max(experts_backward(self), after_experts)


def residual(shapes: Shapes) -> int:
    """[n, H]"""
    return shapes.shard * shapes.args.hidden_size * shapes.number_bytes


def rotation(shapes: Shapes) -> int:
    """Cosines and sines of the positions, and of context-parallel ranks the order of the whole
    sequence.
    """
    return shapes.sequence * shapes.args.head_dim * 4


def _gathered(shapes: Shapes) -> int:
    """[S, H], where it is not the shard itself."""
    return 0 if shapes.sequence == shapes.shard else shapes.sequence * shapes.args.hidden_size


def forward(layer: Layer) -> int:
    """A pass without gradients, at its highest: in the layer, beside [n, H] of the stage's input,
    the layer's, the residual stream and the norm.
    """
    shapes, args = layer.shapes, layer.shapes.args
    inter, hidden, rows = args.moe_intermediate_size, args.hidden_size, shapes.rows
    of_gate_up, of_down = layer.low_of_experts
    attention = shapes.sequence * (3 * shapes.queries + 3 * shapes.keys)
    attention += shapes.sequence * shapes.queries if joins(shapes) else 0
    moved, given = 0, shapes.seen * hidden
    if shapes.gathers:
        moved = given
    elif shapes.exchanges:
        moved = given + shapes.shard * args.num_experts_per_tok * hidden
    if (
        shapes.device == "cpu" and not shapes.exchanges
    ):  # the sum of a token's rows, and one of them
        given *= 3 if shapes.gathers else 2
    low = of_gate_up + of_down
    experts = moved + max(
        rows * (hidden + 2 * inter + 2 * of_gate_up),
        rows * (3 * inter + hidden + low + of_down),
        rows * (2 * inter + hidden + low) + given,
    )
    most = max(attention + _gathered(shapes), experts)
    return rotation(shapes) + 4 * residual(shapes) + most * shapes.number_bytes


def experts_backward(layer: Layer) -> int:
    """Of the experts' block and its dispatcher."""
    shapes, args, b = layer.shapes, layer.shapes.args, layer.shapes.number_bytes
    inter, hidden, rows = args.moe_intermediate_size, args.hidden_size, shapes.rows
    of_gate_up, of_down = layer.low_of_experts
    on_gpu = shapes.device == "cuda"
    # a product of all rows that is added to another one: with dropout a GPU's kernel adds
    added = 0 if on_gpu and layer.drops else 1
    of_y, of_a, of_x = hidden, inter + of_down, hidden + of_gate_up
    activation = 3 * inter * b  # its input's gradient, itself
    if not on_gpu:
        activation = 2 * inter * b + 6 * inter * 4 + (0 if b == 4 else 3 * inter * 4)
    gradients = shapes.num_local_experts * of_down * (inter + hidden) * 4
    moments = (
        rows * (of_y + of_a + of_down + (inter * added if of_down else 0)) * b,
        rows * ((of_y + of_a + of_down) * b + activation),
        rows * (2 * inter + of_x + of_gate_up + (hidden * added if of_gate_up else 0)) * b
        + gradients,
    )
    moved = 0
    if shapes.gathers:
        moved = shapes.seen * hidden
    elif shapes.exchanges:
        moved = rows * hidden
    return moved * b + max(moments)


def attention_backward(layer: Layer) -> int:
    """From the gradient of o_proj's output to that of the layer's input."""
    shapes = layer.shapes
    b, sequence, on_gpu = shapes.number_bytes, shapes.sequence, shapes.device == "cuda"
    queries, keys = sequence * shapes.queries, sequence * shapes.keys
    twice = 2 if "o_proj" in layer.names else 1
    projection = queries + 2 * keys
    # on a GPU a key's gradient for each of its query heads, and the queries' in fp32
    kernel = 2 * queries + 2 * keys + 2 * queries + (4 * queries // b if on_gpu else 0)
    moments = (
        _gathered(shapes) + twice * queries,
        kernel,
        projection * 2 + (0 if on_gpu else 3 * queries),
        projection + _gathered(shapes) + 2 * residual(shapes) // b,
    )
    return max(moments) * b


def backward(layers: Sequence[Layer], num_recomputed: int) -> dict[str, int]:
    """A stage's backward of one micro-batch at its highest, by kind, with what its layers keep of
    it: the first `num_recomputed` keep their input, the others their activations.
    """
    moments = []
    if num_recomputed < len(layers):
        kept = kept_of_stage(layers, num_recomputed)
        moments.append(kept | {"a layer's backward": layers[-1].working})
    for number, layer in enumerate(layers[:num_recomputed]):
        # the inputs up to its own, which is one of its activations too; its output, made once more
        inputs = (number + 1) * residual(layer.shapes)
        kept = {"rotations": rotation(layer.shapes), "inputs of layers": inputs, **layer.kept}
        moments.append(kept | {"a layer's backward": layer.working})
    return max(moments, key=lambda parts: sum(parts.values()))


def kept_of_stage(layers: Sequence[Layer], num_recomputed: int) -> dict[str, int]:
    """What a stage's layers keep of one micro-batch between its forward and its backward."""
    shapes = layers[0].shapes
    kept = {"rotations": rotation(shapes), "inputs of layers": num_recomputed * residual(shapes)}
    for layer in layers[num_recomputed:]:
        for kind, size in layer.kept.items():
            kept[kind] = kept.get(kind, 0) + size
    return kept


def loss(shapes: Shapes, response_rows: int, *, of_logits: bool = False) -> int:
    """At its highest, from the final norm on; the layers' activations are not in it. of_logits: of
    all rows' logits at once, where the lm_head carries LoRA.
    """
    args, b = shapes.args, shapes.number_bytes
    tp = shapes.layout.tensor_model_parallel_size
    columns = min(args.padded_vocab_size(tp) // tp, args.vocab_size)
    rows = response_rows // shapes.layout.context_parallel_size
    own_gradient = shapes.device == "cuda" and b == 2
    of_number = 10 if own_gradient else 8
    chunk = chunk_rows(rows, columns, of_number, shapes.device)
    buffers = rows * columns * 16 if of_logits else chunk * columns * of_number
    if shapes.device == "cpu":
        block = min(chunk, max(1, BLOCK_ENTRIES // columns))
        buffers += BLOCK_BUFFERS * block * columns * 4
    if shapes.device == "cpu" and b == 2:
        buffers += WEIGHT_BLOCK_ROWS["cpu"] * args.hidden_size * 4
    # both views' hidden states and the gradient; statistics of the ranks and of all of them
    of_rows = rows * (args.hidden_size * (2 * b + 4) + 96 * (2 + tp if tp > 1 else 1) + 72)
    return 2 * residual(shapes) + 4 * shapes.shard + of_rows + buffers


def chunk_rows(rows: int, columns: int, of_number: int, device: str) -> int:
    """Rows of a chunk of the loss: see loss/linear.py, whose `_chunk_rows` this is."""
    if not rows:
        return 0
    multiple = ROW_MULTIPLE[device]
    most = max(1, CHUNK_BYTES[device] // (of_number * columns * multiple)) * multiple
    chunks = -(-rows // most)
    chunk = -(-rows // chunks)
    return min(-(-chunk // multiple) * multiple, rows)
