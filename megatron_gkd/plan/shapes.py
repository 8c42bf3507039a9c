"""The sizes of a micro-batch's tensors on a rank, of which activations.py and passes.py make bytes.

Letters as in the model's files: T positions of the packed sequence, S = T / CP of them on a
context-parallel rank, n = S / TP in a tensor-parallel rank's shard; H hidden size, I width of an
expert, K experts a token; Q and G columns of a rank's queries and of its keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.model.args import ModelArgs

Device = Literal["cuda", "cpu"]
ROW_SLACK = 1.2
"""Rows of the rank whose experts are chosen most, over those of equal ranks: an assumption, where
experts are spread over ranks"""


def attention_rows(args: ModelArgs, tp: int) -> tuple[int, int]:
    """(query, key or value) rows of a rank, which has at least one whole key/value head."""
    groups = max(args.num_key_value_heads / tp, 1)
    return args.num_attention_heads // tp * args.head_dim, round(groups) * args.head_dim


@dataclass(frozen=True)
class Shapes:
    """Of one micro-batch of `tokens` positions on a rank."""

    args: ModelArgs
    layout: ParallelConfig
    tokens: int
    """T"""
    number_bytes: int
    device: Device = "cuda"
    one_length: bool = False
    """Whether all of several rows are equally long, or there is one: one call of attention"""
    routed_rows: int | None = None
    """P, where it is known; otherwise ROW_SLACK times as many as on equal ranks"""

    @property
    def sequence(self) -> int:
        """S"""
        return self.tokens // self.layout.context_parallel_size

    @property
    def shard(self) -> int:
        """n"""
        return self.sequence // self.layout.tensor_model_parallel_size

    @property
    def queries(self) -> int:
        """Q"""
        return attention_rows(self.args, self.layout.tensor_model_parallel_size)[0]

    @property
    def keys(self) -> int:
        """G"""
        return attention_rows(self.args, self.layout.tensor_model_parallel_size)[1]

    @property
    def heads(self) -> int:
        return self.args.num_attention_heads // self.layout.tensor_model_parallel_size

    @property
    def num_local_experts(self) -> int:
        return self.args.num_experts // self.layout.expert_model_parallel_size

    @property
    def gathers(self) -> bool:
        """Whether the experts' ranks gather each other's tokens (model/dispatcher.py)."""
        tp, ep = self.layout.tensor_model_parallel_size, self.layout.expert_model_parallel_size
        return 1 < ep <= self.args.num_experts_per_tok and tp % ep == 0

    @property
    def exchanges(self) -> bool:
        """Whether they send (token, expert) pairs to each other."""
        return self.layout.expert_model_parallel_size > 1 and not self.gathers

    @property
    def rows(self) -> int:
        """P, the (token, expert) pairs of this rank's experts."""
        equal = self.shard * self.args.num_experts_per_tok
        if self.layout.expert_model_parallel_size == 1:
            return equal
        return round(equal * ROW_SLACK) if self.routed_rows is None else self.routed_rows

    @property
    def seen(self) -> int:
        """Rows [_, H] that the experts' block gets, and gives."""
        if self.gathers:
            return self.shard * self.layout.expert_model_parallel_size
        return self.rows if self.exchanges else self.shard


def low_numbers(names: Sequence[str], rank: int, of: tuple[str, ...]) -> int:
    """Of the linear of experts that holds the projections `of`: its LoRA's low numbers, R, a
    multiple of 8 (lora/grouped.py). names: those with LoRA.
    """
    return -(-rank * sum(name in names for name in of) // 8) * 8
