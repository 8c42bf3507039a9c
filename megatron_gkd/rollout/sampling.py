"""The next token of every row from vocabulary shards, with the filters of `transformers`.

Filters are applied as in `transformers`: repetition penalty, temperature, top-k, top-p. They give
each row one cut-off value, below which a rank drops columns of its own shard. The draw is
Gumbel-max: argmax of score + noise, a local argmax and one exchange of candidates. The noise of a
column is a hash of (seed, row id, step, column), so the same seed gives the same text at every
layout.

Deviation from `transformers`: among equal scores at the cut-off all are kept (there, top-p keeps
some of them, by sort order). Legend: B rows, C columns of this rank's shard, `group` the
tensor-parallel group.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw; the flags' defaults are in `RolloutConfig`. Raises ValueError naming the setting
    that is out of range.
    """

    temperature: float
    """0 is greedy: the largest score, the lowest id among equals; top_p and top_k then change
    nothing.
    """
    top_p: float
    """Keep the smallest set of most probable tokens that has this probability; 1 keeps all."""
    top_k: int
    """Keep the k most probable tokens; 0 keeps all."""
    repetition_penalty: float
    """Divides positive and multiplies negative logits of tokens in the prompt or the text so far; 1
    changes nothing.
    """

    def __post_init__(self) -> None:
        for name, allowed, is_allowed in (
            ("temperature", "at least 0", 0 <= self.temperature < float("inf")),
            ("top_p", "in (0, 1]", 0 < self.top_p <= 1),
            ("top_k", "at least 0", self.top_k >= 0),
            ("repetition_penalty", "above 0", 0 < self.repetition_penalty < float("inf")),
        ):
            if not is_allowed:
                raise ValueError(f"sampling: {name} is {getattr(self, name)}, it must be {allowed}")


class Sampler:
    """Draws for a fixed set of rows; remembers which tokens each row has seen.

    first_column: token id of this rank's first column. row_ids int64 [B] identify the rows in the
    noise.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        seed: int,
        row_ids: Tensor,
        first_column: int,
        num_columns: int,
        vocab_size: int,
        group: Any,
    ):
        self.sampling = sampling
        self.vocab_size = vocab_size
        self.group = group
        self.columns = first_column + torch.arange(num_columns, device=row_ids.device)
        self.row_keys = _mix(row_ids + _mix(torch.full_like(row_ids, seed)))
        # The last column, one more than the shard has, takes the tokens of other shards.
        self.seen = torch.zeros(
            row_ids.numel(), num_columns + 1, dtype=torch.bool, device=row_ids.device
        )

    def observe(self, tokens: Tensor) -> None:
        """Note tokens [B, n] as seen by their rows; negative ids are skipped."""
        local = tokens - self.columns[0]
        num_columns = self.columns.numel()
        self.seen.scatter_(
            1, torch.where((local >= 0) & (local < num_columns), local, num_columns), True
        )

    def filtered(self, logits: Tensor) -> Tensor:
        """logits [B, C] fp32 -> scores [B, C], -inf where filtered out; `draw` draws from their
        softmax.

        Collectives: with top-k one all-gather of k values for each row; with top-p but no top-k one
        of all logits (any number of tokens may be needed for a probability: the sort needs every
        column).
        """
        sampling = self.sampling
        scores = logits.masked_fill(self.columns >= self.vocab_size, float("-inf"))
        if sampling.repetition_penalty != 1:
            penalised = torch.where(
                scores < 0,
                scores * sampling.repetition_penalty,
                scores / sampling.repetition_penalty,
            )
            scores = torch.where(self.seen[:, :-1], penalised, scores)
        if sampling.temperature > 0:
            scores = scores / sampling.temperature
            if sampling.top_k or sampling.top_p < 1:
                scores = scores.masked_fill(
                    scores < cut_off(scores, sampling.top_k, sampling.top_p, self.group),
                    float("-inf"),
                )
        return scores

    def draw(self, logits: Tensor, step: int) -> Tensor:
        """logits [B, C] fp32 of the last position -> next tokens [B] int64, equal on all ranks of
        the group.

        A row with a logit that is NaN or infinite gets -1. Collectives: those of `filtered`, and
        one all-gather of 3 numbers for each row.
        """
        not_finite = ~logits.isfinite() & (self.columns < self.vocab_size)
        scores = self.filtered(logits).double()
        if self.sampling.temperature > 0:
            scores = scores + self.noise(step)
        # Among equal scores argmax takes the first, here and over the ranks: the lowest id.
        best = scores.argmax(dim=1, keepdim=True)
        candidate = torch.cat(
            (
                scores.gather(1, best),
                self.columns[best].double(),
                not_finite.any(dim=1, keepdim=True).double(),
            ),
            dim=1,
        )
        candidates = torch.stack(_all_gather(candidate, self.group))  # [TP, B, 3]
        owner = candidates[..., 0].argmax(dim=0, keepdim=True)
        tokens = candidates[..., 1].gather(0, owner)[0].long()
        return tokens.masked_fill(candidates[..., 2].any(dim=0), -1)

    def noise(self, step: int) -> Tensor:
        """Standard Gumbel noise [B, C] fp64, a pure function of (seed, row id, step, column)."""
        step_keys = _mix(self.row_keys + step + 1)
        bits = _mix(step_keys[:, None] + self.columns * _GOLDEN)
        uniform = (_shift(bits, 11).double() + 0.5) * 2.0**-53
        return -torch.log(-torch.log(uniform))


def cut_off(scores: Tensor, top_k: int, top_p: float, group: Any) -> Tensor:
    """The lowest score [B, 1] that top-k (0 = off) and then top-p (1 = off) keep, from this rank's
    scores [B, C]. Collectives: one all-gather of the k best scores, or of all where top-k is off.
    """
    values = scores.topk(min(top_k, scores.shape[1]), dim=1).values if top_k else scores
    values = torch.cat(_all_gather(values, group), dim=1).sort(dim=1, descending=True).values
    if top_k:
        values = values[:, :top_k]
    num_kept = torch.full_like(values[:, :1], values.shape[1], dtype=torch.int64)
    if top_p < 1:
        probabilities = values.double().softmax(dim=1)
        probability_before = probabilities.cumsum(dim=1) - probabilities
        num_kept = (probability_before < top_p).sum(dim=1, keepdim=True)
        num_kept = num_kept.clamp(min=1)  # 0 only where a score is NaN
    return values.gather(1, num_kept - 1)


def _all_gather(x: Tensor, group: Any) -> list[Tensor]:
    if group is None or group.size() == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


# splitmix64 (Steele, Lea, Flood 2014) in int64 arithmetic, which wraps around: its published
# constants as signed numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """int64 -> int64; each bit of the result depends on every bit of x."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift(x, 31)
