"""What a run measures: sums over response tokens, counts over the global batch, seconds, bytes.

The sums are made where the loss is (forward.py), the rest where the loop is (train.py);
run_folder.py writes them down.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_gkd.data.batch import Batch
from megatron_gkd.data.report import DataReport
from megatron_gkd.loss import LinearJsdOutput
from megatron_gkd.parallel import Parallel

PHASES = ("data_time", "rollout_time", "teacher_time", "student_time", "optimizer_time")

# Per-token results that are summed over the response tokens, in this order.
SUMMED = (
    "loss",
    "jsd",
    "sft_loss",
    "kl_forward",
    "kl_reverse",
    "entropy_student",
    "entropy_teacher",
    "top1_agreement",
    "token_correct",
)
MEAN_NAMES = {"token_correct": "token_accuracy"}  # means that have another name than the sum
MEANS = tuple(MEAN_NAMES.get(name, name) for name in SUMMED)
# Columns of the sums behind SUMMED: |the rollout's log-probability - the student forward's|, the
# tokens that have one, all tokens; their weights, which the mean of the loss is divided by; with
# --importance_clip the ratios of written tokens, and how many were above it.
GAP, NUM_WRITTEN, NUM_TOKENS, WEIGHT, RATIO, NUM_CLIPPED = range(len(SUMMED), len(SUMMED) + 6)
# The means that are also kept for each source and pair of views.
GROUPED = ("jsd", "sft_loss", "top1_agreement", "token_accuracy", "num_tokens")


@dataclass(frozen=True)
class Groups:
    """The parts of the data that have sums of their own, by names that all ranks agree on; empty
    where the only part would be the whole.
    """

    sources: tuple[str, ...] = ()
    media_pairs: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.sources) + len(self.media_pairs)

    @classmethod
    def of(cls, report: DataReport) -> "Groups":
        """A data set's sources, and what student and teacher perceive in it, where there are
        several.
        """
        names = (tuple(sorted(found)) for found in (report.sources, report.media))
        return cls(*(found if len(found) > 1 else () for found in names))


NO_GROUPS = Groups()


class Importance(NamedTuple):
    """Of written tokens, fp32 [N] each."""

    ratio: Tensor
    """The probability that the loss sees, over that with which the rollout drew the token"""
    factor: Tensor
    """The same, at most --importance_clip: of the token's loss"""


@dataclass
class TokenSums:
    """Sums over response tokens of one pass, float64 [1 + G, len(SUMMED) + 6]: of all and of each
    of the G groups.
    """

    values: Tensor
    groups: Groups = NO_GROUPS

    @classmethod
    def zero(cls, device: torch.device, groups: Groups = NO_GROUPS) -> "TokenSums":
        return cls(
            torch.zeros(1 + len(groups), NUM_CLIPPED + 1, dtype=torch.float64, device=device),
            groups,
        )

    def spoil(self) -> None:
        """Tokens that should be in the sums have no values: all means become NaN."""
        self.values[:, :GAP] = math.nan

    @property
    def weight(self) -> Tensor:
        """Sum of the tokens' weights on this rank, float64: what the loss is divided by."""
        return self.values[0, WEIGHT]

    def add(
        self,
        output: LinearJsdOutput,
        batch: Batch,
        share: slice = slice(None),
        weight: Tensor | None = None,
        importance: Importance | None = None,
    ) -> None:
        """The tokens of a micro-batch. share: those of its student's response rows, in their order,
        that `output` is about, its loss times their weight [N] (None: 1) and their importance.
        """
        summed = [getattr(output, name).detach().double() for name in SUMMED]
        ones = torch.ones_like(summed[0])
        gap, is_written = torch.zeros_like(ones), torch.zeros_like(ones)
        ratio = is_clipped = gap
        weight = ones if weight is None else weight.double()
        if importance is not None:
            ratio = importance.ratio.double()
            is_clipped = (importance.ratio > importance.factor).double()
        if batch.log_probabilities is not None:
            # cross-entropy at temperature 1: minus the log-probability that the loss saw
            assert output.sft_loss is not None, "the batch has labels"
            drawn = batch.log_probabilities[share]
            gap, is_written = (drawn + output.sft_loss.detach()).abs(), ones
        counted = (gap.double(), is_written, ones, weight, ratio, is_clipped)
        values = torch.stack([*summed, *counted])
        self.values[0] += values.sum(dim=1)
        if len(self.groups):
            of_rows = enumerate(batch.student.num_targets)
            rows = [row for row, number in of_rows for _ in range(number)][share]
            number = {
                name: index
                for index, name in enumerate(
                    (*self.groups.sources, *self.groups.media_pairs), start=1
                )
            }
            for names in (
                batch.sources if self.groups.sources else [],
                batch.media_pairs if self.groups.media_pairs else [],
            ):
                if names:
                    self.values.index_add_(
                        0,
                        torch.tensor([number[names[row]] for row in rows], device=values.device),
                        values.T,
                    )

    def means(self, parallel: Parallel) -> dict[str, Any]:
        """Means over the global batch (of `loss` the weighted one), NaN where it has no token, and
        `num_tokens`; where tokens were written `rollout_logprob_gap`, with --importance_clip
        `importance_ratio` and `importance_clipped`; of groups a few under `by_source` and
        `by_media` (those that have tokens).
        Collectives: a sum over data- and context-parallel ranks, a broadcast from the last stage.
        """
        sums = self.values.clone()
        torch.distributed.all_reduce(sums, group=parallel.groups.dp_cp)
        if parallel.pp_size > 1:
            torch.distributed.broadcast(sums, parallel.last_stage_rank, group=parallel.groups.pp)
        rows = sums.tolist()  # the one wait for the device
        every, *parts = (
            {name: value / (row[NUM_TOKENS] or math.nan) for name, value in zip(MEANS, row)}
            | {"num_tokens": int(row[NUM_TOKENS])}
            for row in rows
        )
        if every["num_tokens"]:
            every["loss"] = rows[0][SUMMED.index("loss")] / (rows[0][WEIGHT] or 1)
        if rows[0][NUM_WRITTEN]:
            every["rollout_logprob_gap"] = rows[0][GAP] / rows[0][NUM_WRITTEN]
        if rows[0][RATIO]:
            every["importance_ratio"] = rows[0][RATIO] / rows[0][NUM_WRITTEN]
            every["importance_clipped"] = rows[0][NUM_CLIPPED] / rows[0][NUM_WRITTEN]
        short = [{name: means[name] for name in GROUPED} for means in parts]
        split = {
            "by_source": dict(zip(self.groups.sources, short)),
            "by_media": dict(zip(self.groups.media_pairs, short[len(self.groups.sources) :])),
        }
        split = {
            key: {name: means for name, means in found.items() if means["num_tokens"]}
            for key, found in split.items()
        }
        return every | {key: found for key, found in split.items() if found}


class Clock:
    """Seconds of the phases of a step, 0 for one that was left out. Waits for the device at each
    lap.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        """A step begins: all phases at 0."""
        self.laps = dict.fromkeys(PHASES, 0.0)
        self.started = self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The phase `name` ends here; it began at the last lap."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    @property
    def step_time(self) -> float:
        """Seconds from `restart` to the last lap."""
        return self.last - self.started


@dataclass(frozen=True)
class StepCounts:
    """Counts over the global batch, the most memory of any rank, and what has asked any rank to
    stop.
    """

    num_tokens: int
    """Of both views, prompts included."""
    num_places: int
    """Positions of both views, which are more by the padding"""
    num_micro_batches: int
    """Of one data-parallel rank"""
    cut_tokens: int
    truncated_responses: int
    failed_teacher_views: int
    response_tokens: int
    """Trained ones, with those that --skip_first_tokens leaves out of the loss"""
    peak_memory_bytes: float
    stop: int
    """The largest `StopRequests.number` of the ranks"""

    @property
    def padding(self) -> float:
        """The share of the positions that hold no token."""
        return 1 - self.num_tokens / self.num_places if self.num_places else 0.0

    @classmethod
    def of(
        cls,
        batches: Sequence[Batch],
        num_truncated: int,
        asked_to_stop: int,
        peak_memory_bytes: int,
        parallel: Parallel,
    ) -> "StepCounts":
        """From this rank's micro-batches, truncated responses, request to stop and most memory.
        Collectives: a sum of six numbers over data-parallel ranks, a maximum of two over the
        world.
        """
        views = [view for batch in batches for view in (batch.student, batch.teacher)]
        num_tokens = sum(
            length
            for batch in batches
            for view in (batch.student, batch.teacher)
            for length, row in zip(view.lengths, batch.rows)
            if row >= 0  # not a padding sample
        )
        sums = torch.tensor(
            [
                num_tokens,
                sum(view.size for view in views),
                sum(batch.cut_tokens for batch in batches),
                num_truncated,
                sum(batch.num_failed_views for batch in batches),
                sum(batch.response_tokens for batch in batches),
            ],
            dtype=torch.float64,
            device=parallel.device,
        )
        torch.distributed.all_reduce(sums, group=parallel.groups.dp)
        most = torch.tensor(
            [float(asked_to_stop), peak_memory_bytes],
            dtype=torch.float64,
            device=parallel.device,
        )
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        *counts, stop, peak = torch.cat((sums, most)).tolist()  # the one wait for the device
        num_tokens, num_places, *of_responses = map(int, counts)
        cut_tokens, num_truncated, num_failed, response_tokens = of_responses
        return cls(
            num_tokens,
            num_places,
            len(batches),
            cut_tokens,
            num_truncated,
            num_failed,
            response_tokens,
            peak_memory_bytes=peak,
            stop=int(stop),
        )
