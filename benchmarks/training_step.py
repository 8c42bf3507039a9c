"""A training step of a decoder: teacher, student, optimizer, each timed; the peak of memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from benchmarks.meter import resident_bytes
from benchmarks.real_decoder import SEED
from megatron_gkd.data import Batch
from megatron_gkd.forward import LossSettings, student_forward_backward, teacher_forward
from megatron_gkd.gradients import in_gradient_reducer
from megatron_gkd.loss import Divergence
from megatron_gkd.metrics import Clock
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.optimizer import Optimizer
from megatron_gkd.parallel import Parallel, seed_step

GIB = 2**30
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class StepResult:
    """What one training step took and gave, on this rank; the table's columns."""

    teacher_seconds: float
    student_seconds: float  # forward and backward
    optimizer_seconds: float
    step_seconds: float
    student_tokens_per_second: float  # of its view, all ranks, prompts too, by step_seconds
    peak_allocated_gib: float
    peak_reserved_gib: float | None  # None on CPU
    jsd: float  # nats a response token
    grad_norm: float


class Training:
    """A decoder with the loss and the optimizer that `megatron_gkd.train` has by default."""

    def __init__(self, parallel: Parallel, model_args: ModelArgs, model: GPTModel) -> None:
        self.parallel, self.model = parallel, model
        self.reduced = in_gradient_reducer(model)
        adam = dict(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, max_grad_norm=1.0)
        self.optimizer = Optimizer(self.reduced, parallel, dtype=model.config.params_dtype, **adam)
        divergence = Divergence("jsd", beta=0.5, temperature=2.0)
        self.loss = LossSettings(divergence, 0.0, model_args.vocab_size)
        self.clock = Clock(parallel.device)

    def step(
        self, batches: Sequence[Batch], step: int, learning_rate: float = LEARNING_RATE
    ) -> StepResult:
        """Step number `step` on these micro-batches; the device is waited for after each phase.
        Collectives: those of a training step. Raises FloatingPointError where it is not finite.
        """
        parallel, clock = self.parallel, self.clock
        seed_step(SEED, step, parallel)
        reset_peak(parallel.device)
        clock.restart()
        teacher_hidden = teacher_forward(self.model, batches, parallel)
        clock.lap("teacher_time")
        self.optimizer.zero_grad()
        sums = student_forward_backward(self.reduced, batches, teacher_hidden, self.loss, parallel)
        means = sums.means(parallel)
        clock.lap("student_time")
        update = self.optimizer.step(learning_rate, means["loss"])
        clock.lap("optimizer_time")
        if not update.applied:
            raise FloatingPointError(f"step {step}: the loss or a gradient is not finite")
        num_tokens = sum(sum(batch.student.lengths) for batch in batches) * parallel.dp_size
        allocated, reserved = peak_gib(parallel.device)
        return StepResult(
            teacher_seconds=clock.laps["teacher_time"],
            student_seconds=clock.laps["student_time"],
            optimizer_seconds=clock.laps["optimizer_time"],
            step_seconds=clock.step_time,
            student_tokens_per_second=num_tokens / clock.step_time,
            peak_allocated_gib=allocated,
            peak_reserved_gib=reserved,
            jsd=means["jsd"],
            grad_norm=update.grad_norm,
        )


def reset_peak(device: torch.device) -> None:
    """Wait for the device; `peak_gib` counts from here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: torch.device) -> tuple[float, float | None]:
    """Most GiB (allocated, reserved) since `reset_peak`; on CPU (resident, None)."""
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device)
        return allocated / GIB, torch.cuda.max_memory_reserved(device) / GIB
    return resident_bytes("VmHWM") / GIB, None
