"""What a decoder layer keeps of a micro-batch for its backward: the tensors that autograd saves, by
kind, from the shapes of the code that saves them. Frozen weights and LoRA's parameters count
elsewhere (parameters.py). Letters as in shapes.py; b bytes of an activation's number, R low numbers
of a linear's LoRA.

    norms       the input [n, H] of each, and a number a token in fp32
    attention   the fused projection [S, Q + 2 G], of which values are a view; query [S, Q], key
                [S, G], context [S, Q], a number a head and position in fp32. With context
                parallelism keys and values of the whole sequence in place of the key, of which
                a GPU's kernel reads copies, T (2 C + 1) / 2 C positions
    its LoRA    qkv: the normed input [n, H], low [S, R], the fused W_down and W_up in fp32.
                o_proj: low [n, r], the context joined where rows are attended one by one
    router      ids twice and probabilities, 16 bytes a pair
    experts     their tokens, gate and up [P, 2 I], both low [P, R], probabilities, the order of the
                pairs. Tokens are this rank's [n, H], all gathered ones, or the exchanged rows

On a CPU norms of 16-bit inputs keep a copy in fp32, and the context of several rows is kept as each
row's call gave it beside the joined one.
"""

from collections.abc import Sequence

from megatron_gkd.plan.shapes import Shapes, low_numbers

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")


def kept_by_layer(
    shapes: Shapes, names: Sequence[str], rank: int, *, drops: bool = True
) -> dict[str, int]:
    """Bytes by kind. names: the layer's linears with LoRA of this rank; drops: whether LoRA has
    dropout, which keeps W_down as it is, in fp32.
    """
    down_bytes = 4 if drops else shapes.number_bytes
    kept = {
        "norms": 2 * shapes.shard * (norm_bytes(shapes) + 4),
        "attention": attention_bytes(shapes, joined="o_proj" in names),
        "attention's LoRA": 0,
        "router": router_bytes(shapes),
        "experts": expert_bytes(shapes, names, rank),
    }
    hidden, b = shapes.args.hidden_size, shapes.number_bytes
    low = rank * sum(name in names for name in QKV)
    if low:
        of_matrices = low * (hidden * down_bytes + (shapes.queries + 2 * shapes.keys) * 4)
        of_tokens = shapes.shard * hidden + shapes.sequence * low
        kept["attention's LoRA"] += of_tokens * b + of_matrices
    if "o_proj" in names:
        cast = 0 if down_bytes == 4 else rank * shapes.queries * down_bytes
        kept["attention's LoRA"] += shapes.shard * rank * b + cast
    return kept


def norm_bytes(shapes: Shapes) -> int:
    """Of a token's numbers [H] that a norm keeps."""
    return shapes.args.hidden_size * (shapes.number_bytes if shapes.device == "cuda" else 4)


def joins(shapes: Shapes) -> bool:
    """Whether attention's context is put together from several calls."""
    parts = shapes.layout.context_parallel_size > 1
    return parts or (shapes.device == "cpu" and not shapes.one_length)


def attention_bytes(shapes: Shapes, *, joined: bool) -> int:
    """joined: whether the context as a whole is kept, for o_proj's LoRA."""
    sequence, queries, keys = shapes.sequence, shapes.queries, shapes.keys
    numbers = sequence * (3 * queries + 2 * keys)  # projection, query, context
    parts = shapes.layout.context_parallel_size
    if parts == 1:
        numbers += sequence * keys
    else:
        copied = (2 * parts + 1) / (2 * parts) if shapes.device == "cuda" else 1
        numbers += round(shapes.tokens * copied) * 2 * keys
    if joined and joins(shapes):
        numbers += sequence * queries
    return numbers * shapes.number_bytes + sequence * shapes.heads * 4


def router_bytes(shapes: Shapes) -> int:
    """Where probabilities are taken before the choice, those of all experts are kept."""
    of_token = 16 * shapes.args.num_experts_per_tok
    if not shapes.args.norm_topk_prob:
        of_token += 4 * shapes.args.num_experts
    return shapes.shard * of_token


def expert_bytes(shapes: Shapes, names: Sequence[str], rank: int) -> int:
    """Of the experts' block (model/experts.py) and of their dispatcher."""
    args, rows, b = shapes.args, shapes.rows, shapes.number_bytes
    low = low_numbers(names, rank, GATE_UP) + low_numbers(names, rank, ("down_proj",))
    of_rows = rows * (2 * args.moe_intermediate_size + low) * b
    of_tokens = shapes.seen * args.hidden_size * b
    pairs = shapes.shard * args.num_experts_per_tok
    if shapes.gathers:  # ids, probabilities and places of all ranks' pairs
        pairs *= shapes.layout.expert_model_parallel_size
    order = 12 * rows + 8 * pairs if shapes.exchanges else 12 * pairs
    return of_rows + of_tokens + order
