"""What a rank does in a step, phase by phase: layer_work.py's layers, and what stands around them.

It is that of the rank with most to do: of the pipeline stage with the most LoRA and the lm_head,
of the experts' rank with the most rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.lora_targets import EXPERTS, HEAD, linears_of_layers
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.plan.layer_work import Layer, backward, forward, kept_numbers, passing_numbers
from megatron_gkd.plan.parameters import lora_parameters, of_stage
from megatron_gkd.plan.work import (
    FRESH,
    Collective,
    Launches,
    Moved,
    Product,
    Waits,
    Work,
    repeated,
)
from megatron_gkd.plan.workload import Workload

# Rows of the rank whose experts have most, over the mean. Stated, not measured: a trained router
# spreads tokens less evenly than random weights do.
IMBALANCE = 1.1
# Passes over the logits that the loss makes in fp32: both sides' statistics, their divergences, the
# gradient, which is written.
LOSS_PASSES = 7
# Launches beside the layers', as docs/training_step.md counts: a pass over a micro-batch without
# and with a loss, an update.
PASS_LAUNCHES, LOSS_LAUNCHES, UPDATE_LAUNCHES = 14, 150, 26
PASS_TP_LAUNCHES, PASS_CP_LAUNCHES = 16, 48
UPDATE_PASSES = 7  # AdamW reads weight, gradient, moments and writes all but the gradient
SHAPE_BYTES = 24  # that megatron-core sends ahead of a tensor
GRADIENT_PASSES = 3  # zeroed, read for the norm, scaled


@dataclass(frozen=True)
class Step:
    """The micro-batches of a data-parallel rank's mean step."""

    args: ModelArgs
    layout: ParallelConfig
    load: Workload
    imbalance: float = IMBALANCE

    @property
    def stages(self) -> int:
        return self.layout.pipeline_model_parallel_size

    @property
    def rows(self) -> float:
        """Of the mean step: where responses are written, num_generations a prompt."""
        load = self.load
        more = load.on_policy_share * (load.num_generations - 1) if load.completion_tokens else 0
        return load.batch_size * load.accumulation * (1 + more)

    @property
    def micro_batches(self) -> int:
        """That hold the mean step's rows, as data/micro_batches.py cuts rows of one length."""
        load = self.load
        longest = max(load.row_tokens, load.teacher_row_tokens)
        most_rows = max(load.micro_batch_tokens // longest, 1)
        at_least = load.accumulation if self.stages > 1 else 1
        return max(math.ceil(self.rows / most_rows), at_least)

    @property
    def student_tokens(self) -> float:
        """Of a micro-batch, over all ranks of the replica."""
        return self.rows * self.load.row_tokens / self.micro_batches

    def layers(self, tokens: float, row: float, *, with_lora: bool) -> list[tuple[Layer, float]]:
        """Kinds of layers of the stage that has most LoRA, each with its number."""
        length = self.args.num_layers // self.stages
        targets = tuple(self.load.targets) if with_lora else ()
        kinds = linears_of_layers(targets, self.args.num_layers)
        stages = [kinds[first : first + length] for first in range(0, len(kinds), length)]
        fullest = max(stages, key=lambda stage: sum(map(len, stage)))
        of = lambda targets: Layer(
            tokens / self.layout.context_parallel_size,
            row,
            self.args,
            self.layout,
            self.load.number_bytes,
            self.load.lora_rank,
            targets,
            self.imbalance,
        )
        return [(of(targets), float(fullest.count(targets))) for targets in dict.fromkeys(fullest)]

    def through_layers(
        self, of_layer: Callable[[Layer], Work], tokens: float, row: float, *, with_lora: bool
    ) -> Work:
        """A stage's layers."""
        kinds = self.layers(tokens, row, with_lora=with_lora)
        return [item for layer, number in kinds for item in repeated(of_layer(layer), number)]

    def fresh(self, tokens: float, row: float, *, keeps: bool) -> Moved:
        """Memory that a pass over a micro-batch takes, and gives back."""
        kinds = self.layers(tokens, row, with_lora=keeps)
        numbers = max(passing_numbers(layer) for layer, _ in kinds)
        if keeps and self.load.recompute:
            numbers += max(kept_numbers(layer) for layer, _ in kinds)
            numbers += sum(number * layer.shard * self.args.hidden_size for layer, number in kinds)
        elif keeps:
            numbers += sum(number * kept_numbers(layer) for layer, number in kinds)
        num_bytes = numbers * self.load.number_bytes
        return Moved(part="memory from the system", kernel=FRESH, num_bytes=num_bytes)

    def messages(self, tokens: float) -> Work:
        """To the next stage, and the shape that goes ahead of it; the receiver waits for both."""
        if self.stages == 1:
            return []
        tp, cp = self.layout.tensor_model_parallel_size, self.layout.context_parallel_size
        num_bytes = tokens / tp / cp * self.args.hidden_size * self.load.number_bytes
        part = "messages between stages"
        send = lambda size, times: Collective(
            part=part, kind="send", group="pp", num_bytes=size, times=times
        )
        number = 2.0 if self.stages > 2 else 1.0  # a stage in the middle receives and sends
        return [send(num_bytes, number), send(SHAPE_BYTES, number)]

    def around_layers(self, tokens: float, *, backward: bool) -> Work:
        """Embedding, final norm and gathered hidden states, and their backward."""
        tp, cp = self.layout.tensor_model_parallel_size, self.layout.context_parallel_size
        numbers = tokens / cp * self.args.hidden_size
        num_bytes = numbers * self.load.number_bytes
        work: Work = [Moved(kernel="rms_norm", num_bytes=(3 if backward else 2) * num_bytes / tp)]
        if tp > 1:
            part = "tensor-parallel collectives"
            kinds = ["reduce_scatter"] if backward else ["reduce_scatter", "all_gather"]
            work += [
                Collective(part=part, kind=kind, group="tp", num_bytes=num_bytes) for kind in kinds
            ]
        if not backward:
            work.append(Moved(kernel="copy", num_bytes=2 * num_bytes / tp))
            number = PASS_LAUNCHES + PASS_TP_LAUNCHES * (tp > 1) + PASS_CP_LAUNCHES * (cp > 1)
            work.append(Launches(kind="forward", times=number))
        return work

    def of_response_rows(self, kind: str, row: float) -> Work:
        """The hidden states of the response rows to the context-parallel ranks that take them
        through the loss, as many from each rank as from the one that has most: of a row the ranks
        have chunks, and a response begins in the last one.
        """
        cp, load = self.layout.context_parallel_size, self.load
        if cp == 1:
            return []
        chunk = row / (2 * cp)
        most = min(load.response_tokens, chunk - 1)
        rows = cp * self.rows / self.micro_batches * most
        part = "hidden states of context-parallel ranks"
        num_bytes = rows * self.args.hidden_size * load.number_bytes
        return [Collective(part=part, kind=kind, group="cp", num_bytes=num_bytes)]


def teacher(step: Step) -> Work:
    """The teacher's forward over a micro-batch."""
    load = step.load
    tokens = step.rows * load.teacher_row_tokens / step.micro_batches
    lora = load.has_teacher_adapter
    return [
        *step.through_layers(forward, tokens, load.teacher_row_tokens, with_lora=lora),
        *step.around_layers(tokens, backward=False),
        *step.of_response_rows("all_gather", load.teacher_row_tokens),
        *step.messages(tokens),
        step.fresh(tokens, load.teacher_row_tokens, keeps=False),
    ]


def student(step: Step) -> Work:
    """The student's forward and backward over a micro-batch, but for the loss, which only the last
    stage has; with recomputation the layers' forward twice.
    """
    load, tokens = step.load, step.student_tokens
    through = lambda of_layer: step.through_layers(
        of_layer, tokens, load.row_tokens, with_lora=True
    )
    work = repeated(through(forward), 1 + load.recompute) + through(backward)
    work += step.around_layers(tokens, backward=False) + step.around_layers(tokens, backward=True)
    work.append(step.fresh(tokens, load.row_tokens, keeps=True))
    return [*work, *repeated(step.messages(tokens), 2)]


def loss(step: Step) -> Work:
    """Both sides' logits, their divergence, the gradient of the hidden states; the teacher's hidden
    states were kept.
    """
    args, load, layout = step.args, step.load, step.layout
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    rows = step.rows * load.response_tokens / step.micro_batches / cp
    columns, hidden = args.padded_vocab_size(tp) // tp, args.hidden_size
    product = lambda rows, columns, inner: Product(
        part="lm_head",
        rows=rows,
        columns=columns,
        inner=inner,
        number_bytes=load.number_bytes,
    )
    work: Work = [
        *repeated([product(rows, columns, hidden)], 2),
        product(rows, hidden, columns),
        Moved(kernel="divergence", num_bytes=LOSS_PASSES * rows * columns * 4),
        Launches(kind="backward", times=LOSS_LAUNCHES),
        *repeated([Waits()], 3),
    ]
    if tp > 1:  # statistics of the rows: 12 and 4 numbers in fp64
        part = "tensor-parallel collectives"
        size = rows * 8
        work += [
            Collective(part=part, kind="all_gather", group="tp", num_bytes=12 * size * tp),
            Collective(part=part, kind="all_reduce", group="tp", num_bytes=4 * size),
        ]
    for kind in ("all_gather", "reduce_scatter"):
        work += step.of_response_rows(kind, load.row_tokens)
    return work


def lora_sizes(step: Step) -> tuple[int, int]:
    """Parameters of LoRA on the rank that has most: of attention and lm_head, of its experts."""
    is_dense = lambda target: target.rpartition(".")[2] not in EXPERTS
    dense = replace(step.load, targets=[name for name in step.load.targets if is_dense(name)])
    of_dense = lora_parameters(step.args, step.layout, dense)
    return of_dense, lora_parameters(step.args, step.layout, step.load) - of_dense


def replicated_sizes(step: Step) -> int:
    """Parameters of LoRA whose gradients are partial sums on tensor-parallel ranks: W_down of q, k,
    v and the lm_head, W_up of o, with fewer key/value heads than ranks W_up of k and v.
    """
    args, tp = step.args, step.layout.tensor_model_parallel_size
    shared = args.num_key_value_heads * args.head_dim if tp > args.num_key_value_heads else 0
    sizes = dict.fromkeys(("q_proj", "o_proj"), args.hidden_size)
    sizes |= dict.fromkeys(("k_proj", "v_proj"), args.hidden_size + shared)
    of_layer = lambda names: sum(sizes.get(name, 0) for name in names)
    layers = of_stage(args, step.layout, step.load, None, of_layer)
    return step.load.lora_rank * (layers + args.hidden_size * (HEAD in step.load.targets))


def smallest_bucket(num_ranks: int) -> int:
    """Bytes of gradients that are worth a collective of their own, as gradients.py cuts them: what
    is less than two such buckets is reduced at once, after the backward.
    """
    return max(64 * 2**20, 512 * 2**10 * num_ranks)


def reduction(step: Step) -> Work:
    """LoRA's gradients, in fp32: over the ranks that hold the same parameters."""
    dense, experts = lora_sizes(step)
    part = "gradient reduction"
    of = lambda group, size: Collective(part=part, kind="all_reduce", group=group, num_bytes=size)
    work = [of("dp_cp", 4 * dense), of("expt_dp", 4 * experts), of("dp_cp", 4)]
    if step.layout.tensor_model_parallel_size > 1:
        work.append(of("tp", 4 * replicated_sizes(step)))
    return [item for item in work if item.num_bytes]


def optimizer(step: Step) -> Work:
    """The gradient's norm, AdamW, LoRA's columns in the experts' weights written again."""
    dense, experts = lora_sizes(step)
    size = 4 * (dense + experts)
    one = lambda group: Collective(
        part="numbers that all ranks need", kind="all_reduce", group=group, num_bytes=4
    )
    return [
        Moved(part="AdamW", kernel="adamw", num_bytes=UPDATE_PASSES * size),
        Moved(part="gradients", kernel="copy", num_bytes=GRADIENT_PASSES * size),
        Moved(part="experts' columns", kernel="copy", num_bytes=3 * 4 * experts),
        Launches(kind="forward", times=UPDATE_LAUNCHES),
        *repeated([Waits()], 3),
        *repeated([one("world")], 4),
    ]
