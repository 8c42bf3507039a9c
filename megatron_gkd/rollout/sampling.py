"""The next token of every row from vocabulary shards, on the device, with the filters of
`transformers`.

Filters are applied as in `transformers`: repetition penalty, temperature, top-k, top-p. With top-k
each rank sends its k best columns, and what follows concerns these candidates alone. The draw is
Gumbel-max: argmax of score + noise (noise.py), so the same seed gives the same text at every layout
and batch size.

Deviations from `transformers`: among scores equal to its cut-off top-k keeps any k, and top-p keeps
all. Legend: B rows,
C columns of this rank's shard, `group` the tensor-parallel group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.rollout.noise import gumbel, keys_of_rows, keys_of_step


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
    """Draws for rows whose state stays at fixed addresses; a smaller batch is the first rows.

    first_column: token id of this rank's first column; num_rows: of the largest batch.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        num_rows: int,
        first_column: int,
        num_columns: int,
        vocab_size: int,
        group: Any,
        device: torch.device,
        kernels: ModuleType,
    ):
        self.sampling = sampling
        self.first_column, self.num_columns = first_column, num_columns
        self.num_real = min(max(vocab_size - first_column, 0), num_columns)
        self.group, self.kernels = group, kernels
        self.row_keys = torch.zeros(num_rows, dtype=torch.int64, device=device)
        # The column behind the shard takes the tokens of other shards; 16: rows are aligned.
        self.seen = torch.zeros(num_rows, num_columns + 16, dtype=torch.bool, device=device)

    def begin(
        self,
        seed: int,
        row_ids: Sequence[int],
        prompts: Sequence[Sequence[int]],
        prompt_of_row: Sequence[int],
    ) -> None:
        """New texts: row_ids identify the rows in the noise; the row's prompt counts as seen."""
        device = self.row_keys.device
        ids = torch.tensor(row_ids, dtype=torch.int64, device=device)
        self.row_keys[: len(row_ids)] = keys_of_rows(ids, seed)
        self.seen.zero_()
        if self.sampling.repetition_penalty != 1:
            tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
            lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
            numbers = torch.arange(len(prompts), device=device).repeat_interleave(lengths)
            seen = self.seen.new_zeros(len(prompts), self.seen.shape[1])
            seen[numbers, self._local(tokens)] = True
            self.seen[: len(row_ids)] = seen[list(prompt_of_row)]

    def take(self, rows: Tensor) -> None:
        """The rows with these indices become the first ones."""
        for state in (self.row_keys, self.seen):
            state[: len(rows)] = state[rows]

    def _local(self, tokens: Tensor) -> Tensor:
        """Ids -> columns of `seen`."""
        local = tokens - self.first_column
        return local.where((local >= 0) & (local < self.num_columns), self.num_columns)

    def draw(self, logits: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """logits [B, C] fp32, overwritten -> the rows' tokens number `step` (int64 [1], on the
        device), [B] int64, and their log-probabilities, [B] fp32 in nats, under the softmax of the
        logits as they came; equal on all ranks of the group.

        A row with a logit that is NaN or infinite gets -1. Collectives: one all-gather, with top-k
        of 3 k + 1 numbers a row, otherwise of 4; with top-p but no top-k another one, of all logits
        (any number of tokens may be needed for a probability).
        """
        sampling = self.sampling
        has_candidates = sampling.temperature > 0 and sampling.top_k > 0
        found = self.kernels.scores_of(
            logits,
            self.seen[: len(logits)],
            self.num_real,
            penalty=sampling.repetition_penalty,
            temperature=sampling.temperature,
        )
        if has_candidates:
            score, column = found.top_k(min(sampling.top_k, self.num_columns))
        else:
            score, column = self._best(found.scores, step)
        parts = (
            score,
            logits.gather(1, column),
            column + self.first_column,
            found.log_sum[:, None],
        )
        candidates = torch.cat([part.double() for part in parts], dim=1)
        if self.group is not None and self.group.size() > 1:
            gathered = torch.stack(_all_gather(candidates, self.group), dim=1)  # [B, TP, 3 k + 1]
            log_sum = gathered[..., -1].logsumexp(dim=1)
            score, raw, column = (x.flatten(1) for x in gathered[..., :-1].tensor_split(3, dim=2))
            order = score.argsort(dim=1, descending=True, stable=True)
            score, raw, column = (x.gather(1, order) for x in (score, raw, column))
        else:
            log_sum = candidates[:, -1]
            score, raw, column = candidates[:, :-1].tensor_split(3, dim=1)
        if has_candidates:
            score = score[:, : sampling.top_k]
            dropped = score < _lowest_kept(score, sampling.top_p)
            score = score.masked_fill(dropped, -float("inf"))
            keys = keys_of_step(self.row_keys[: len(score)], step)
            score = score + gumbel(keys, column[:, : sampling.top_k].long())
        # Among equal scores the lowest id: ranks and their columns come in order.
        index = score.argmax(dim=1, keepdim=True)
        tokens = column.gather(1, index)[:, 0].long().where(log_sum.isfinite(), -1)
        if sampling.repetition_penalty != 1:
            self.seen[: len(tokens)].scatter_(1, self._local(tokens)[:, None], True)
        return tokens, (raw.gather(1, index)[:, 0] - log_sum).float()

    def _best(self, scores: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """The one candidate of this rank, score and column [B, 1]: greedy, or among all columns."""
        keys = None
        if self.sampling.temperature > 0:
            keys = keys_of_step(self.row_keys[: len(scores)], step)
            if self.sampling.top_p < 1:
                lowest = top_p_cut_off(scores, self.sampling.top_p, self.group)
                scores = scores.masked_fill(scores < lowest, -float("inf"))
        return self.kernels.best_of(scores, keys, self.first_column)


def top_p_cut_off(scores: Tensor, top_p: float, group: Any) -> Tensor:
    """The lowest score [B, 1] that top-p keeps, from this rank's scores [B, C]. Collectives: one
    all-gather of all scores.
    """
    values = torch.cat(_all_gather(scores, group), dim=1)
    return _lowest_kept(values.sort(dim=1, descending=True).values, top_p)


def _lowest_kept(values: Tensor, top_p: float) -> Tensor:
    """Scores [B, n] in falling order -> [B, 1], the last one that top-p keeps."""
    if top_p == 1:
        return values[:, -1:]
    # in units of 2^-52: sums of integers are exact, and the same bits in any order
    probabilities = (values.double().softmax(dim=1) * 2.0**52).long()
    probability_before = probabilities.cumsum(dim=1) - probabilities
    num_kept = (probability_before < top_p * 2.0**52).sum(dim=1, keepdim=True)
    return values.gather(1, num_kept.clamp(min=1) - 1)  # any of them where a score is NaN


def _all_gather(x: Tensor, group: Any) -> list[Tensor]:
    if group is None or group.size() == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts
