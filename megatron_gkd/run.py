"""What a run is made of and where it stands: `Run`, built by build.py, used up by train.py."""

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_gkd.config import Config
from megatron_gkd.data import SampleDataset, eval_loader, step_loader
from megatron_gkd.data.batch import Batch, Packing, collate
from megatron_gkd.data.loader import Numbered
from megatron_gkd.data.micro_batches import Budget, attention_tokens, most_tokens
from megatron_gkd.data.order import StepRows
from megatron_gkd.device_memory import DeviceMemory
from megatron_gkd.lora.average import follow
from megatron_gkd.media.towers import StepMedia, Towers
from megatron_gkd.metrics import Clock, Groups, StepCounts
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.optimizer import Optimizer, Update, learning_rate
from megatron_gkd.parallel import Parallel, log_rank_0, seed_step
from megatron_gkd.recompute import Recomputation
from megatron_gkd.rollout.backend import Author
from megatron_gkd.rollout.rollout import Rollout
from megatron_gkd.rollout_log import RolloutLog
from megatron_gkd.run_folder import MetricsWriter
from megatron_gkd.token_loss import LossSettings


@dataclass
class Progress:
    """Where a run stands; all of it is in trainer_state.json."""

    step: int = 0
    on_policy_steps: int = 0
    skipped_steps: int = 0
    bad_in_a_row: int = 0
    has_learned: bool = False
    """Some update had a gradient that was not exactly 0"""
    zero_gradient_steps: int = 0
    """Updates after that one whose gradient was exactly 0"""
    zero_gradients_in_a_row: int = 0

    def count(self, update: Update, on_policy: bool) -> None:
        """One more step is done, or was skipped. A float16 overflow is skipped but not bad; an
        empty step is what the steps before it were.
        """
        self.step += 1
        self.on_policy_steps += on_policy
        self.skipped_steps += not update.applied
        if update.applied or update.overflowed:
            self.bad_in_a_row = 0
        elif self.bad_in_a_row or not update.empty:
            self.bad_in_a_row += 1
        if update.applied:
            is_zero = self.has_learned and update.grad_norm == 0
            self.zero_gradient_steps += is_zero
            self.zero_gradients_in_a_row = self.zero_gradients_in_a_row + 1 if is_zero else 0
            self.has_learned = self.has_learned or update.grad_norm != 0


@dataclass(frozen=True)
class StepResult:
    """What one step did on this rank. `batches` are those that were trained on, with the responses
    of an on-policy step; none where the step was skipped for its rollout.
    """

    batches: list[Batch]
    num_samples: int
    """Rows that each row of the data became: several where the rollout wrote several responses"""
    num_truncated: int
    """Responses that the rollout cut before they ended."""
    on_policy: bool
    learning_rate: float
    means: dict[str, Any]
    """Means over the global batch (`TokenSums.means`)."""
    update: Update


@dataclass
class Run:
    """Everything that the loop uses. `model` is this rank's stage of the decoder, `ddp` the same in
    megatron-core's gradient reducer; `rollout` is None where the run never needs it.
    """

    config: Config
    parallel: Parallel
    model_args: ModelArgs
    model: torch.nn.Module
    ddp: DistributedDataParallel
    optimizer: Optimizer
    loss: LossSettings
    packing: Packing
    """How rows become one sequence"""
    budget: Budget
    """What a micro-batch of a step may hold"""
    train_data: SampleDataset
    eval_data: SampleDataset | None
    rollout: Rollout | None
    writer: MetricsWriter
    progress: Progress
    identity: dict[str, Any]
    """Of trainer_state.json what stands for base weights, versions and code (identity.py)"""
    clock: Clock
    memory: DeviceMemory
    eval_rollout: Rollout | None = None
    """For the evaluation data, greedily: where that has prompts alone or --log_rollouts asks"""
    rollout_log: RolloutLog | None = None
    """With --log_rollouts"""
    recomputation: Recomputation | None = None
    """With --recompute auto"""
    saved_step: int = 0
    """The step of the newest checkpoint that this process has written."""
    save_owed: bool = False
    """A step of --save_steps has passed without a checkpoint, because steps were bad."""

    @property
    def towers(self) -> Towers | None:
        """None on later stages and where no row has media."""
        towers: Any = self.model.towers
        return towers

    @property
    def train_groups(self) -> Groups:
        """Parts of the training data whose means are logged apart."""
        return Groups.of(self.train_data.report)

    @property
    def eval_groups(self) -> Groups:
        """The same of the evaluation data, which the run must have."""
        assert self.eval_data is not None
        return Groups.of(self.eval_data.report)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, resumed or not."""
        return self.config.train.max_steps

    @property
    def global_batch_size(self) -> int:
        """Samples of a step over all data-parallel ranks."""
        return self.config.train.global_batch_size(self.parallel.dp_size)

    @property
    def is_complete(self) -> bool:
        return self.progress.step >= self.total_steps

    def is_on_policy(self, step: int) -> bool:
        """Whether the student writes the responses of step `step` (from 0): the same on all ranks
        and after a resume.
        """
        return draw(self.config.train.seed, step) < self.config.distill.lmbda_at(step)

    def step_lengths(self, step: int) -> np.ndarray:
        """Tokens that each row of the training data has in a step: where a rollout will write its
        response, room for the longest.
        """
        lengths = self.train_data.lengths
        if self.author(self.is_on_policy(step)) is None:
            return lengths.views
        return lengths.prompts + self.config.rollout.max_completion_length

    def author(self, on_policy: bool) -> Author | None:
        """Who writes the responses of a step; None: they are the data set's own."""
        if on_policy:
            return "student"
        return "teacher" if self.config.distill.seq_kd else None

    def is_logging_step(self, result: StepResult, stop: bool) -> bool:
        """Whether the step that was just counted has a line in metrics.jsonl; a skipped one has."""
        step = self.progress.step
        due = step == 1 or step % self.config.run.logging_steps == 0
        return due or self.is_complete or stop or not result.update.applied

    @property
    def is_eval_step(self) -> bool:
        """Whether an evaluation follows the step that was just counted."""
        due = self.progress.step % self.config.run.eval_steps == 0
        return bool(self.eval_data) and (due or self.is_complete)

    def batches(self) -> Generator[list[Batch], None, None]:
        """This rank's micro-batches of each step that is left, on the device, with every random
        generator seeded for the step: a function of (seed, step). Close it (contextlib.closing) in
        whatever way the run ends.
        """
        train, parallel = self.config.train, self.parallel
        step_rows = StepRows(
            self.train_data.lengths.has_response,
            lambda step: self.author(self.is_on_policy(step)) is None,
            self.global_batch_size,
            train.seed,
        )
        loader = step_loader(
            self.train_data,
            step_rows,
            self.step_lengths,
            global_batch_size=self.global_batch_size,
            budget=self.budget,
            dp_rank=parallel.dp_rank,
            dp_size=parallel.dp_size,
            start_step=self.progress.step,
            num_steps=self.total_steps,
            num_workers=self.config.data.dataloader_num_workers,
        )
        with closing(loader):
            while not self.is_complete:
                self.clock.restart()
                seed_step(train.seed, self.progress.step, parallel)
                batches = [self.packed(numbered) for numbered in next(loader)]
                self.clock.lap("data_time")
                yield batches

    def eval_batches(self) -> Iterator[tuple[list[Batch], StepMedia, bool]]:
        """This rank's micro-batches of the evaluation data, on the device, with their media, and
        whether a rollout wrote them: each row once over all ranks, padding samples where a rank has
        none.

        Rows with a response come a micro-batch at a time. The student answers the prompts alone
        first, as many of them at a time as a step has; no batch where logits were not finite.
        """
        assert self.eval_data is not None
        has_response, lengths = self.eval_data.lengths.has_response, self.eval_data.lengths
        for batch in self._eval_rows(np.flatnonzero(has_response), lengths.views):
            yield [batch], StepMedia(self.towers, [batch.media]), False
        without = np.flatnonzero(~has_response)
        written = lengths.prompts + self.config.rollout.max_completion_length
        for first in range(0, len(without), self.global_batch_size):
            some = without[first : first + self.global_batch_size]
            yield *self._answered(list(self._eval_rows(some, written))), True

    def _eval_rows(
        self, rows: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray
    ) -> Iterator[Batch]:
        assert self.eval_data is not None
        loader = eval_loader(
            self.eval_data,
            rows,
            lengths,
            budget=self.eval_budget,
            dp_rank=self.parallel.dp_rank,
            dp_size=self.parallel.dp_size,
        )
        yield from map(self.packed, loader)

    def _answered(self, prompts: list[Batch]) -> tuple[list[Batch], StepMedia]:
        """Prompts of the evaluation data with the responses that the student would now give."""
        assert self.eval_rollout is not None, "build_run makes one wherever it is needed"
        step, media = self.progress.step, StepMedia(self.towers, [each.media for each in prompts])
        try:
            batches = self.eval_rollout.respond(prompts, step, "student", media)
        except FloatingPointError as error:
            log_rank_0(self.parallel, f"Evaluation after step {step}: {error}")
            return [], media
        return batches, media.regrouped([each.media for each in batches])

    def packed(self, numbered: list[Numbered]) -> Batch:
        """Samples of a micro-batch -> the batch, on the device."""
        numbers, samples = zip(*numbered)
        return collate(samples, self.packing, numbers).to(self.parallel.device)

    @property
    def eval_budget(self) -> Budget:
        """What a micro-batch of an evaluation may hold."""
        return eval_budget(self.config, self.model_args)

    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        train = self.config.train
        return learning_rate(
            self.progress.step + 1,
            self.total_steps,
            peak=train.learning_rate,
            warmup_ratio=train.warmup_ratio,
            kind=train.lr_scheduler_type,
        )

    def update(self, learning_rate: float, means: dict[str, Any]) -> Update:
        """The student's update, which a teacher that follows the student then moves after; a step
        that is skipped moves neither. means: of the step, the same on all ranks. Collectives: those
        of `Optimizer.step`.
        """
        if not means["num_tokens"]:  # AdamW would go on with its moments and decay the weights
            log_rank_0(
                self.parallel,
                f"Step {self.progress.step + 1} is skipped: --skip_first_tokens "
                f"{self.config.distill.skip_first_tokens} leaves no token of its responses",
            )
            return Update(applied=False, grad_norm=math.nan, empty=True)
        # no rank updates where the loss or a gradient is not finite on any
        update = self.optimizer.step(learning_rate, means["loss"])
        num_updates = self.progress.step - self.progress.skipped_steps + update.applied
        rate = self.config.distill.teacher_rate(num_updates)
        if update.applied and rate:
            follow(self.model, rate)
        return update

    def student_pass(self, batches: list[Batch]) -> AbstractContextManager[None]:
        """Around the student's forward and backward; see `Recomputation.student_pass`."""
        return self.recomputation.student_pass(batches) if self.recomputation else nullcontext()

    def count(self, result: StepResult) -> None:
        """The step is over: `progress.step` is its number, from 1."""
        self.progress.count(result.update, result.on_policy)

    def log_step(self, result: StepResult, counts: StepCounts) -> None:
        """Write down the step that was just counted, and some of the responses that it wrote."""
        self.writer.log_train(self.step_metrics(result, counts))
        if self.rollout_log is not None:
            author = self.author(result.on_policy)
            lines = self.rollout_log.of_step(result.batches, self.progress.step, author)
            self.writer.log_rollouts(lines)

    def step_metrics(self, result: StepResult, counts: StepCounts) -> dict[str, Any]:
        """The line of metrics.jsonl for the step that was just counted: nats, tokens of both views
        per second, seconds, GiB.
        """
        step, step_time = self.progress.step, self.clock.step_time
        of_template = {}
        if self.config.data.teacher_template:
            of_template = {"failed_teacher_views": counts.failed_teacher_views}
        return {
            "step": step,
            "epoch": step * self.global_batch_size / len(self.train_data),
            **result.means,
            "grad_norm": result.update.grad_norm,
            "learning_rate": result.learning_rate,
            "on_policy": result.on_policy,
            "response_length": (counts.response_tokens or math.nan)  # a step without a batch
            / (self.global_batch_size * result.num_samples),
            "cut_tokens": counts.cut_tokens,
            "truncated_responses": counts.truncated_responses,
            **of_template,
            "on_policy_share": self.progress.on_policy_steps / step,
            "skipped_steps": self.progress.skipped_steps,
            "zero_gradient_steps": self.progress.zero_gradient_steps,
            "micro_batches": counts.num_micro_batches,
            "padding": counts.padding,
            "tokens_per_second": counts.num_tokens / step_time,
            "peak_memory_gib": counts.peak_memory_bytes / 2**30,
            "step_time": step_time,
            **self.clock.laps,
        }

    def close(self) -> None:
        """The end of the run, however it ends: its files, and the engine of its rollouts."""
        self.writer.close()
        if self.rollout is not None:
            self.rollout.close()


def draw(seed: int, step: int) -> float:
    """Uniform in [0, 1), the same on all ranks and after a resume."""
    return torch.rand(
        (), generator=torch.Generator().manual_seed(seed * 1_000_003 + step), dtype=torch.float64
    ).item()


def packing(pad_token_id: int, parallel: Parallel, skip_first_tokens: int = 0) -> Packing:
    """How rows become one sequence in this layout."""
    multiples = parallel.sequence_multiple, parallel.row_multiple
    return Packing(pad_token_id, *multiples, skip_first_tokens)


def step_budget(config: Config, model_args: ModelArgs) -> Budget:
    """What a micro-batch of a step may hold. Pipeline stages get at least
    --gradient_accumulation_steps micro-batches, which keep them busy.
    """
    train = config.train
    is_staged = config.parallel.pipeline_model_parallel_size > 1
    return Budget(
        train.micro_batch_tokens(config.data.max_length),
        attention_tokens(model_args),
        at_least=train.gradient_accumulation_steps if is_staged else 1,
    )


def eval_budget(config: Config, model_args: ModelArgs) -> Budget:
    """What a micro-batch of an evaluation may hold."""
    tokens = config.train.micro_batch_tokens(config.data.max_length, evaluates=True)
    return Budget(tokens, attention_tokens(model_args))


def largest_micro_batch(
    config: Config, data: SampleDataset, budget: Budget, packing: Packing, dp_size: int
) -> int:
    """Positions that a micro-batch of a step can have: an upper bound."""
    lengths, distill = data.lengths, config.distill
    longest = int(lengths.views.max())
    if distill.writes_responses:
        written = lengths.prompts.max() + config.rollout.max_completion_length
        longest = max(longest, int(written))
        if config.data.teacher_template:  # whose views are as long as what the student writes
            longest = max(longest, config.data.max_length + config.rollout.max_completion_length)
    num_rows = config.train.global_batch_size(dp_size) * config.rollout.num_generations
    most = most_tokens(longest, num_rows, budget, packing.row_multiple)
    return -(-most // packing.sequence_multiple) * packing.sequence_multiple
