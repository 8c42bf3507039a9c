"""GKD LoRA self-distillation: `torchrun [...] -m megatron_gkd.train FLAGS` (all flags: --help, megatron_gkd/config.py).

    data set -> batch -> [rollout] -> teacher forward (LoRA off) -> student forward (LoRA on) -> divergence -> LoRA gradients -> update
"""

import logging
import math
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

if __name__ == "__main__":  # every rank would repeat these while megatron-core is imported; megatron_gkd.doctor says what is installed
    for message in ("Transformer Engine and Apex are not", "Apex is not installed", "full scope is deprecated", "`torch.distributed.*deprecated"):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("transformers.modeling_rope_utils").setLevel(logging.ERROR)  # does not know the talker's rotary keys

import torch

from megatron_gkd import parallel as parallel_layout
from megatron_gkd.checkpoint import load_checkpoint, note_latest, read_state, save_checkpoint
from megatron_gkd.config import Config, describe_layout, parse_config_or_exit
from megatron_gkd.data import eval_loader, num_steps_of_epochs, step_loader
from megatron_gkd.forward import TokenSums, student_forward, student_forward_backward, teacher_forward
from megatron_gkd.lora.adapter import applied
from megatron_gkd.metrics import MetricsWriter, peak_memory_bytes
from megatron_gkd.model.config import read_model_shape
from megatron_gkd.optimizer import learning_rate
from megatron_gkd.parallel import Parallel, say
from megatron_gkd.parts import Parts, build, load_data, make_rollout


def train(config: Config, parallel: Parallel) -> None:
    """The whole run. Every rank calls it; rank 0 speaks and writes."""
    shape = read_model_shape(config.model.model)
    say(parallel, describe_layout(parallel.world_size, config))
    train_data, eval_data = load_data(config, shape, parallel)
    if config.data.check_data:
        say(parallel, "--check_data: every row is good; no training was asked for")
        return
    parts = build(config, shape, parallel)
    global_batch_size = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps * parallel.dp_size
    total_steps = config.train.max_steps
    if total_steps < 0:
        total_steps = num_steps_of_epochs(len(train_data), global_batch_size, config.train.num_train_epochs)
    progress = resume(config, parts, parallel, total_steps, global_batch_size)
    writer = MetricsWriter(config.run.output_dir, total_steps, progress.step, enabled=parallel.rank == 0, tensorboard=config.run.tensorboard)
    if parallel.rank == 0:
        note_latest(config.run.output_dir, parts.resume_folder)
    loader = step_loader(
        train_data,
        per_device_batch_size=config.train.per_device_train_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        dp_rank=parallel.dp_rank,
        dp_size=parallel.dp_size,
        seed=config.train.seed,
        start_step=progress.step,
        num_steps=total_steps,
        num_workers=config.data.dataloader_num_workers,
        pad_token_id=train_data.pad_token_id,
        pad_to_multiple_of=parallel.tp_size,
    )
    student_rollout = make_rollout(config, parts.shape, parallel, train_data.pad_token_id)
    teacher_rollout = make_rollout(config, parts.shape, parallel, train_data.pad_token_id, teacher_writes=True)
    if progress.step == 0 and eval_data:
        writer.log_eval(evaluate(config, parts, eval_data, parallel, step=0))

    with stop_signal() as asked_to_stop:
        while progress.step < total_steps:
            clock = Clock(parallel.device)
            parallel_layout.seed_step(config.train.seed, progress.step, parallel)
            batches = [batch.to(parallel.device) for batch in next(loader)]
            on_policy = draw(config.train.seed, progress.step) < config.distill.lmbda_at(progress.step)
            if on_policy:
                batches = student_rollout.respond(parts.model, batches, progress.step)
            elif config.distill.seq_kd:
                batches = teacher_rollout.respond(parts.model, batches, progress.step)
            clock.lap("rollout_time")
            teacher_hidden = teacher_forward(parts.model, batches, parallel)
            clock.lap("teacher_time")
            parts.optimizer.zero_grad()
            sums = student_forward_backward(parts.ddp, batches, teacher_hidden, parts.loss, parallel)
            means = sums.means(parallel)
            clock.lap("student_time")
            rate = learning_rate(
                progress.step + 1,
                total_steps,
                peak=config.train.learning_rate,
                warmup_ratio=config.train.warmup_ratio,
                kind=config.train.lr_scheduler_type,
            )
            update = parts.optimizer.step(rate, means["loss"])
            clock.lap("optimizer_time")

            progress.count(update, on_policy)
            step = progress.step
            counts = step_counts(batches, bool(asked_to_stop), config.rollout.max_completion_length, parallel)
            last = step == total_steps or counts["stop"]
            if step == 1 or step % config.run.logging_steps == 0 or last or not update.applied:
                metrics = {"step": step, "epoch": step * global_batch_size / len(train_data)} | means
                metrics |= {"grad_norm": update.grad_norm, "learning_rate": rate, "on_policy": on_policy}
                metrics |= step_metrics(counts, clock, progress, global_batch_size, means["num_tokens"])
                writer.log_train(metrics)
            if progress.bad_in_a_row >= config.train.max_bad_steps:
                raise FloatingPointError(
                    f"{progress.bad_in_a_row} steps in a row had NaN or Inf in loss or gradient (--max_bad_steps {config.train.max_bad_steps}); "
                    "all were skipped, the last checkpoint is sound. Try a lower --learning_rate, --torch_dtype bfloat16 instead of float16, "
                    "a longer --warmup_ratio, a lower --lmbda"
                )
            if eval_data and (step % config.run.eval_steps == 0 or step == total_steps):
                writer.log_eval(evaluate(config, parts, eval_data, parallel, step))
            if step % config.run.save_steps == 0 or last:
                folder = save(config, parts, parallel, progress, total_steps, global_batch_size)
                say(parallel, f"saved {folder}")
            if counts["stop"] and step < total_steps:
                say(parallel, f"SIGTERM: stopped after step {step} of {total_steps}; go on with --resume_from_checkpoint latest")
                break
    writer.close()


@dataclass
class Progress:
    """Where a run stands; all of it is in trainer_state.json."""

    step: int = 0
    on_policy_steps: int = 0
    skipped_steps: int = 0
    bad_in_a_row: int = 0

    def count(self, update, on_policy: bool) -> None:
        self.step += 1
        self.on_policy_steps += on_policy
        self.skipped_steps += not update.applied
        self.bad_in_a_row = 0 if update.applied or update.overflowed else self.bad_in_a_row + 1


def resume(config: Config, parts: Parts, parallel: Parallel, total_steps: int, global_batch_size: int) -> Progress:
    """The state of the checkpoint, if one is resumed. Another rank or other linears than the checkpoint's begin a new stage at step 0."""
    if parts.resume_folder is None:
        return Progress()
    state = read_state(parts.resume_folder)
    rank, _, targets = applied(parts.model)
    same_scale = math.isclose(parts.alpha, state["lora"]["alpha"])
    if not same_scale or (rank, targets) != (state["lora"]["rank"], state["lora"]["targets"]):
        say(
            parallel,
            f"New stage from {parts.resume_folder}: LoRA rank {state['lora']['rank']} -> {rank}, alpha {state['lora']['alpha']:g} -> {parts.alpha:g}, "
            f"on {', '.join(targets)}. The function is unchanged; the optimizer starts anew at step 0",
        )
        return Progress()
    load_checkpoint(parts.resume_folder, model=parts.model, shape=parts.shape, parallel=parallel, optimizer=parts.optimizer)
    now = {"seed": config.train.seed, "global_batch_size": global_batch_size, "total_steps": total_steps}
    for name, value in now.items():
        if state[name] != value:
            say(parallel, f"Note: {name} was {state[name]} and is {value}: the resumed run will differ from one that was never stopped")
    say(parallel, f"Resumed {parts.resume_folder} at step {state['step']} of {total_steps}")
    return Progress(**{name: state[name] for name in Progress.__dataclass_fields__})


def save(config: Config, parts: Parts, parallel: Parallel, progress: Progress, total_steps: int, global_batch_size: int):
    return save_checkpoint(
        config.run.output_dir,
        progress.step,
        model=parts.model,
        shape=parts.shape,
        parallel=parallel,
        alpha=parts.alpha,
        dropout=config.lora.lora_dropout,
        base_model=config.model.model,
        optimizer=None if config.run.save_only_model else parts.optimizer,
        state=vars(progress) | {"seed": config.train.seed, "global_batch_size": global_batch_size, "total_steps": total_steps},
        save_total_limit=config.run.save_total_limit,
    )


def evaluate(config: Config, parts: Parts, data, parallel: Parallel, step: int) -> dict:
    """Teacher-forced means over the evaluation data: divergence, agreement, token accuracy."""
    started, sums = time.perf_counter(), TokenSums.zero(parallel.device)
    loader = eval_loader(
        data,
        per_device_batch_size=config.train.per_device_eval_batch_size,
        dp_rank=parallel.dp_rank,
        dp_size=parallel.dp_size,
        num_workers=0,
        pad_token_id=data.pad_token_id,
        pad_to_multiple_of=parallel.tp_size,
    )
    for batch in loader:
        batches = [batch.to(parallel.device)]
        teacher_hidden = teacher_forward(parts.model, batches, parallel)
        student_forward(parts.ddp, batches, teacher_hidden, parts.loss, parallel, sums)
    return {"step": step} | sums.means(parallel) | {"eval_time": time.perf_counter() - started}


def draw(seed: int, step: int) -> float:
    """Uniform in [0, 1), the same on all ranks and after a resume."""
    return torch.rand((), generator=torch.Generator().manual_seed(seed * 1_000_003 + step), dtype=torch.float64).item()


class Clock:
    """Seconds of the phases of a step. Waits for the device at each lap."""

    def __init__(self, device: torch.device):
        self.device, self.laps = device, {}
        self.started = self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now


def step_counts(batches, asked_to_stop: bool, max_completion_length: int, parallel: Parallel) -> dict:
    """Counts over the global batch, the most memory of any rank, and whether any rank was asked to stop. Two small collectives."""
    lengths = torch.cat([batch.student.lengths - batch.student.prompt_lengths for batch in batches])
    generated = any(batch.on_policy for batch in batches)
    sums = torch.tensor(
        [
            sum(int(batch.student.lengths.sum() + batch.teacher.lengths.sum()) for batch in batches),
            sum(batch.cut_tokens for batch in batches),
            int((lengths >= max_completion_length).sum()) if generated else 0,
        ],
        dtype=torch.float64,
        device=parallel.device,
    )
    torch.distributed.all_reduce(sums, group=parallel.groups.dp)
    most = torch.tensor([float(asked_to_stop), peak_memory_bytes(parallel.device)], dtype=torch.float64, device=parallel.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return dict(zip(("tokens", "cut_tokens", "truncated_responses"), map(int, sums.tolist()))) | {"stop": bool(most[0]), "peak_memory": most[1].item()}


def step_metrics(counts: dict, clock: Clock, progress: Progress, global_batch_size: int, num_tokens: int) -> dict:
    step_time = clock.last - clock.started
    return {
        "response_length": num_tokens / global_batch_size,
        "cut_tokens": counts["cut_tokens"],
        "truncated_responses": counts["truncated_responses"],
        "on_policy_share": progress.on_policy_steps / progress.step,
        "skipped_steps": progress.skipped_steps,
        "tokens_per_second": counts["tokens"] / step_time,
        "peak_memory_gib": counts["peak_memory"] / 2**30,
        "step_time": step_time,
        **clock.laps,
    }


@contextmanager
def stop_signal():
    """Collects SIGTERM in a list instead of dying: the loop looks at it after each step."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: list[str] | None = None) -> None:
    config = parse_config_or_exit(sys.argv[1:] if argv is None else argv)
    try:
        parallel = parallel_layout.initialize(
            parallel_layout.resolve_device(config.model.device),
            tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
            expert_model_parallel_size=config.parallel.expert_model_parallel_size,
            seed=config.train.seed,
        )
        train(config, parallel)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            print(f"megatron_gkd: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    parallel_layout.destroy()


if __name__ == "__main__":
    main()
