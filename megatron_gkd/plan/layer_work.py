"""What one decoder layer does with a micro-batch: forward, and backward with LoRA's gradients.

Legend: T positions of a rank's part of the rows (C context-parallel ranks share them), T / TP of
them in its shard; H hidden size, q and k numbers of its query heads and of its key heads, I width
of an expert, E experts on the rank, K experts a token, P = T K / TP rows of experts (with experts
over several ranks the mean, times `imbalance`), r LoRA's rank.

What is counted: model/experts.py, lora/modules.py, model/dispatcher.py; tests/test_plan_work.py
compares with the counts of a dispatch mode.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.plan.shapes import attention_rows
from megatron_gkd.plan.work import (
    Attention,
    Collective,
    Item,
    Launches,
    Moved,
    Product,
    Waits,
    Work,
)

# Launches of a layer, by the dispatch mode's count (docs/training_step.md): without LoRA, what LoRA
# on all linears adds forward, and backward.
BASE_LAUNCHES, LORA_LAUNCHES, BACKWARD_LAUNCHES = 26, 12, 101
# What layouts add: (forward without LoRA, with LoRA, backward).
TP_LAUNCHES, CP_LAUNCHES = (1, 2, 6), (6, 6, 32)
GATHER_LAUNCHES, EXCHANGE_LAUNCHES = (1, 1, 2), (10, 10, 3)


@dataclass(frozen=True)
class Layer:
    """A layer's sizes on this rank, with `tokens` of its micro-batch in `row` long rows."""

    tokens: float
    """T"""
    row: float
    args: ModelArgs
    layout: ParallelConfig
    number_bytes: int
    rank: int
    targets: Sequence[str] = ()
    """The linears of this layer with LoRA; none: the base alone"""
    imbalance: float = 1.0
    """Rows of the rank whose experts have most, over the mean, where several ranks have experts"""

    @property
    def tp(self) -> int:
        return self.layout.tensor_model_parallel_size

    @property
    def cp(self) -> int:
        return self.layout.context_parallel_size

    @property
    def ep(self) -> int:
        return self.layout.expert_model_parallel_size

    @property
    def shard(self) -> float:
        return self.tokens / self.tp

    @property
    def gathers(self) -> bool:
        """Whether experts are shared inside a tensor-parallel group, as GatherDispatcher does."""
        return 1 < self.ep <= self.args.num_experts_per_tok and self.tp % self.ep == 0

    @property
    def exchanges(self) -> bool:
        return self.ep > 1 and not self.gathers

    @property
    def experts(self) -> int:
        return self.args.num_experts // self.ep

    @property
    def pairs(self) -> float:
        """P, of this rank's experts."""
        share = self.imbalance if self.ep > 1 else 1.0
        return self.shard * self.args.num_experts_per_tok * share

    @property
    def summed(self) -> float:
        """Rows of the experts' sums: of a token each, after an exchange of every pair."""
        return self.pairs if self.exchanges else self.shard * (self.ep if self.gathers else 1)

    @property
    def ordered(self) -> float:
        """Pairs whose order a rank makes: where tokens are gathered, those of all experts."""
        return self.shard * self.args.num_experts_per_tok * self.ep if self.gathers else self.pairs

    @property
    def sum_kernel(self) -> str:
        """Where tokens are gathered, one that leaves out the rows of other ranks' experts."""
        return "sum_own_rows" if self.gathers else "sum_rows"

    @property
    def widths(self) -> tuple[int, int]:
        """q, k."""
        return attention_rows(self.args, self.tp)

    @property
    def qkv_rank(self) -> int:
        return self.rank * len({"q_proj", "k_proj", "v_proj"} & set(self.targets))

    @property
    def output_rank(self) -> int:
        return self.rank * ("o_proj" in self.targets)

    @property
    def gate_up_rank(self) -> int:
        number = self.rank * len({"gate_proj", "up_proj"} & set(self.targets))
        return -(-number // 8) * 8

    @property
    def down_rank(self) -> int:
        return -(-self.rank * ("down_proj" in self.targets) // 8) * 8

    def dense(self, rows: float, columns: float, inner: float, **more: bool) -> Product:
        # a side of LoRA's: bound by memory
        low = {self.qkv_rank, self.output_rank} - {0}
        part = "LoRA's products" if {rows, columns, inner} & low else "dense products"
        return Product(
            part=part,
            rows=rows,
            columns=columns,
            inner=inner,
            number_bytes=self.number_bytes,
            **more,
        )

    def grouped(self, columns: float, inner: float, low: bool = False) -> Product:
        return Product(
            part="LoRA's grouped products" if low else "grouped products",
            rows=self.pairs,
            columns=columns,
            inner=inner,
            groups=self.experts,
            number_bytes=self.number_bytes,
        )

    def outer(self, rows: float, columns: float) -> Product:
        return Product(
            part="LoRA's grouped products",
            rows=rows,
            columns=columns,
            inner=self.pairs,
            groups=self.experts,
            outer=True,
            number_bytes=self.number_bytes,
        )

    def moved(self, kernel: str, numbers: float) -> Moved:
        return Moved(kernel=kernel, num_bytes=numbers * self.number_bytes)

    def attention(self, backward: bool) -> Attention:
        return Attention(
            pairs=self.tokens * self.row / 2, row=self.row, heads=self.widths[0], backward=backward
        )

    def of_sequence(self, kind: str, width: float) -> Work:
        """A collective of [T, width] over the tensor-parallel ranks."""
        if self.tp == 1 or not width:
            return []
        num_bytes = self.tokens * width * self.number_bytes
        part = "tensor-parallel collectives"
        return [Collective(part=part, kind=kind, group="tp", num_bytes=num_bytes)]

    def of_keys(self, kind: str) -> Work:
        """Keys and values of the whole rows, over the context-parallel ranks."""
        if self.cp == 1:
            return []
        num_bytes = self.tokens * self.cp * 2 * self.widths[1] * self.number_bytes
        part = "keys and values of context-parallel ranks"
        return [Collective(part=part, kind=kind, group="cp", num_bytes=num_bytes)]

    def of_experts(self, *, back: bool, with_ids: bool, with_probabilities: bool) -> Work:
        """Tokens to the ranks of their experts, or with `back` the sums to theirs. What a rank
        gives of an exchange stays the same: who has more experts' rows receives more.
        """
        hidden, chosen = self.args.hidden_size, self.args.num_experts_per_tok
        if self.gathers:
            kind, tokens = ("reduce_scatter" if back else "all_gather"), self.shard * self.ep
            sizes = [tokens * hidden * self.number_bytes]
        elif self.exchanges:
            kind, tokens = "all_to_all", self.shard * chosen
            sizes = [tokens * hidden * self.number_bytes]
        else:
            return []
        if with_probabilities:  # fp32, of K experts of a token
            sizes.append(self.shard * chosen * 4 * (self.ep if self.gathers else 1))
        if with_ids:  # int32: the ids, or the counts of all experts
            sizes.append(
                self.shard * chosen * 4 * self.ep if self.gathers else self.args.num_experts * 4
            )
        part = "expert all-to-all" if self.exchanges else "gathering tokens for experts"
        return [Collective(part=part, kind=kind, group="ep", num_bytes=size) for size in sizes]

    def launches(self, kind: str, index: int, number: float) -> Launches:
        """`number` and what the layout adds of its column `index`."""
        for more, holds in (
            (TP_LAUNCHES, self.tp > 1),
            (CP_LAUNCHES, self.cp > 1),
            (GATHER_LAUNCHES, self.gathers),
            (EXCHANGE_LAUNCHES, self.exchanges),
        ):
            number += more[index] * holds
        return Launches(kind=kind, times=number)


def share_with_lora(targets: Sequence[str]) -> float:
    """Of seven linears; what LoRA launches is taken in proportion."""
    return (
        len(set(targets) & {*"q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()}) / 7
    )


def kept_numbers(of: Layer) -> float:
    """That a layer keeps for its backward: inputs and results of the norms, the projection, rotated
    queries and keys, attention's result, gate_up's output.
    """
    (queries, keys), args = of.widths, of.args
    of_sequence = 4 * of.shard * args.hidden_size + of.tokens * (3 * queries + 3 * keys)
    return of_sequence + of.pairs * 2 * args.moe_intermediate_size


def passing_numbers(of: Layer) -> float:
    """That a layer's experts need besides, one pass after the other."""
    return of.pairs * 2 * (of.args.hidden_size + of.args.moe_intermediate_size)


def forward(of: Layer) -> Work:
    """A layer's forward, of the base alone or with LoRA."""
    args, (queries, keys) = of.args, of.widths
    hidden, inner, width = args.hidden_size, args.moe_intermediate_size, queries + 2 * keys
    low_in, low_out = of.gate_up_rank, of.down_rank
    work: Work = [
        of.moved("rms_norm", 2 * of.shard * 2 * hidden),
        *of.of_sequence("all_gather", hidden),
        of.dense(of.tokens, width, hidden),
        of.moved("norm_rotary", of.tokens * 2 * (queries + keys)),
        *of.of_keys("all_gather"),
        of.attention(backward=False),
        of.dense(of.tokens, hidden, queries),
        *of.of_sequence("reduce_scatter", hidden),
        of.moved("add", 2 * of.shard * 3 * hidden),
        of.dense(of.shard, args.num_experts, hidden),
        Moved(kernel="router", num_bytes=of.shard * args.num_experts * 4 * 4),
        *of.of_experts(back=False, with_ids=True, with_probabilities=True),
        Moved(kernel="order_pairs", num_bytes=of.ordered * 4 * 4),
        *_sorted(of, back=False),
        of.moved("gather_rows", of.pairs * (2 * hidden + low_in)),
        of.grouped(2 * inner, hidden + low_in),
        of.moved("activation", of.pairs * (3 * inner + low_out)),
        of.grouped(hidden, inner + low_out),
        of.moved(of.sum_kernel, (of.pairs + of.summed) * hidden),
        *of.of_experts(back=True, with_ids=False, with_probabilities=False),
        *_sorted(of, back=True),
        *_low_forward(of),
    ]
    number = BASE_LAUNCHES + LORA_LAUNCHES * share_with_lora(of.targets)
    work.append(of.launches("forward", 1 if of.targets else 0, number))
    if of.ep > 1:
        work.append(Waits())
    return work


def _sorted(of: Layer, *, back: bool) -> Work:
    """Rows before the exchange, sorted by expert, and the sums after it."""
    if not of.exchanges:
        return []
    rows, hidden = of.shard * of.args.num_experts_per_tok, of.args.hidden_size
    if back:
        return [of.moved("sum_rows", (rows + of.shard) * hidden)]
    return [
        of.moved("gather_rows", 2 * rows * hidden),
        Moved(kernel="order_pairs", num_bytes=rows * 4 * 4),
    ]


def _low_forward(of: Layer) -> Work:
    """LoRA's products beside the base's and in front of the experts'."""
    args, (queries, keys) = of.args, of.widths
    hidden, inner, width = args.hidden_size, args.moe_intermediate_size, queries + 2 * keys
    work: list[Item] = []
    if of.qkv_rank:
        work += [
            of.dense(of.shard, of.qkv_rank, hidden),
            *of.of_sequence("all_gather", of.qkv_rank),
            of.dense(of.tokens, width, of.qkv_rank, adds=True),
        ]
    if of.output_rank:
        work += [
            of.dense(of.tokens, of.output_rank, queries),
            *of.of_sequence("reduce_scatter", of.output_rank),
            of.dense(of.shard, hidden, of.output_rank, adds=True),
        ]
    if of.gate_up_rank:
        work.append(of.grouped(of.gate_up_rank, hidden, low=True))
    if of.down_rank:
        work.append(of.grouped(of.down_rank, inner, low=True))
    return work


def backward(of: Layer) -> Work:
    """A layer's backward: gradients of its input and of LoRA's matrices; the base is frozen."""
    args, (queries, keys) = of.args, of.widths
    hidden, inner, width = args.hidden_size, args.moe_intermediate_size, queries + 2 * keys
    low_in, low_out = of.gate_up_rank, of.down_rank
    work: Work = [
        *of.of_experts(back=False, with_ids=False, with_probabilities=False),
        *_sorted(of, back=False),
        of.moved("gather_rows", of.pairs * 2 * hidden),
        of.grouped(inner + low_out, hidden),
        of.moved("activation_backward", of.pairs * 6 * inner),
        of.grouped(hidden + low_in, 2 * inner),
        of.moved(of.sum_kernel, (of.pairs + of.summed) * hidden),
        *of.of_experts(back=True, with_ids=False, with_probabilities=True),
        *_sorted(of, back=True),
        of.dense(of.shard, hidden, args.num_experts),
        Moved(kernel="router", num_bytes=of.shard * args.num_experts * 4 * 4),
        *of.of_sequence("all_gather", hidden),
        of.dense(of.tokens, queries, hidden),
        of.attention(backward=True),
        *of.of_keys("reduce_scatter"),
        of.moved("norm_rotary_backward", of.tokens * 3 * width),
        of.dense(of.tokens, hidden, width),
        *of.of_sequence("reduce_scatter", hidden),
        of.moved("rms_norm_backward", 2 * of.shard * 3 * hidden),
        of.moved("add", 2 * of.shard * 3 * hidden),
        *_low_backward(of),
    ]
    number = BACKWARD_LAUNCHES * (0.4 + 0.6 * share_with_lora(of.targets))
    work.append(of.launches("backward", 2, number))
    return work


def _low_backward(of: Layer) -> Work:
    args, (queries, keys) = of.args, of.widths
    hidden, inner, width = args.hidden_size, args.moe_intermediate_size, queries + 2 * keys
    work: list[Item] = []
    if rank := of.qkv_rank:
        work += [
            of.dense(of.tokens, rank, width),
            of.dense(width, rank, of.tokens),
            *of.of_sequence("reduce_scatter", rank),
            of.dense(of.shard, hidden, rank),
            of.dense(rank, hidden, of.shard),
            of.moved("add", of.shard * 3 * hidden),
        ]
    if rank := of.output_rank:
        work += [
            of.dense(of.shard, rank, hidden),
            of.dense(hidden, rank, of.shard),
            *of.of_sequence("all_gather", rank),
            of.dense(of.tokens, queries, rank),
            of.dense(rank, queries, of.tokens),
            of.moved("add", of.tokens * 3 * queries),
        ]
    if low := of.gate_up_rank:
        work += [
            of.grouped(hidden, low, low=True),
            of.moved("add", of.pairs * 2 * hidden),
            of.moved("gather_rows", of.pairs * 2 * hidden),
            of.outer(2 * inner, low),
            of.outer(low, hidden),
        ]
    if low := of.down_rank:
        work += [
            of.grouped(inner, low, low=True),
            of.moved("add", of.pairs * 2 * inner),
            of.outer(hidden, low),
            of.outer(low, inner),
        ]
    return work
