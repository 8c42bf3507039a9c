"""What a run is made of and where it stands: `Run`, built by build.py, used up by train.py."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_gkd.config import Config
from megatron_gkd.data import SampleDataset, eval_loader, step_loader
from megatron_gkd.data.batch import Batch
from megatron_gkd.forward import LossSettings
from megatron_gkd.media.towers import Towers
from megatron_gkd.metrics import Clock, Groups, StepCounts
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.optimizer import Optimizer, Update, learning_rate
from megatron_gkd.parallel import Parallel, seed_step
from megatron_gkd.rollout.backend import Author
from megatron_gkd.rollout.rollout import Rollout
from megatron_gkd.run_folder import MetricsWriter


@dataclass
class Progress:
    """Where a run stands; all of it is in trainer_state.json."""

    step: int = 0
    on_policy_steps: int = 0
    skipped_steps: int = 0
    bad_in_a_row: int = 0

    def count(self, update: Update, on_policy: bool) -> None:
        """One more step is done, or was skipped. A float16 overflow is skipped but not bad."""
        self.step += 1
        self.on_policy_steps += on_policy
        self.skipped_steps += not update.applied
        self.bad_in_a_row = 0 if update.applied or update.overflowed else self.bad_in_a_row + 1


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
    train_data: SampleDataset
    eval_data: SampleDataset | None
    rollout: Rollout | None
    writer: MetricsWriter
    progress: Progress
    clock: Clock
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
        loader = step_loader(
            self.train_data,
            per_device_batch_size=train.per_device_train_batch_size,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            dp_rank=parallel.dp_rank,
            dp_size=parallel.dp_size,
            seed=train.seed,
            start_step=self.progress.step,
            num_steps=self.total_steps,
            num_workers=self.config.data.dataloader_num_workers,
            pad_token_id=self.train_data.pad_token_id,
            pad_to_multiple_of=parallel.sequence_multiple,
        )
        with closing(loader):
            while not self.is_complete:
                self.clock.restart()
                seed_step(train.seed, self.progress.step, parallel)
                batches = [batch.to(parallel.device) for batch in next(loader)]
                self.clock.lap("data_time")
                yield batches

    def eval_batches(self) -> Iterator[Batch]:
        """This rank's micro-batches of the evaluation data, on the device: each row once over all
        ranks, padding samples at the end.
        """
        assert self.eval_data is not None
        loader = eval_loader(
            self.eval_data,
            per_device_batch_size=self.config.train.per_device_eval_batch_size,
            dp_rank=self.parallel.dp_rank,
            dp_size=self.parallel.dp_size,
            num_workers=0,
            pad_token_id=self.eval_data.pad_token_id,
            pad_to_multiple_of=self.parallel.sequence_multiple,
        )
        for batch in loader:
            yield batch.to(self.parallel.device)

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

    def count(self, result: StepResult) -> None:
        """The step is over: `progress.step` is its number, from 1."""
        self.progress.count(result.update, result.on_policy)

    def step_metrics(self, result: StepResult, counts: StepCounts) -> dict[str, Any]:
        """The line of metrics.jsonl for the step that was just counted: nats, tokens of both views
        per second, seconds, GiB.
        """
        step, step_time = self.progress.step, self.clock.step_time
        return {
            "step": step,
            "epoch": step * self.global_batch_size / len(self.train_data),
            **result.means,
            "grad_norm": result.update.grad_norm,
            "learning_rate": result.learning_rate,
            "on_policy": result.on_policy,
            "response_length": result.means["num_tokens"]
            / (self.global_batch_size * result.num_samples),
            "cut_tokens": counts.cut_tokens,
            "truncated_responses": counts.truncated_responses,
            "on_policy_share": self.progress.on_policy_steps / step,
            "skipped_steps": self.progress.skipped_steps,
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
