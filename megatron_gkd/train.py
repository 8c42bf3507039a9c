"""GKD LoRA self-distillation: `torchrun [...] -m megatron_gkd.train FLAGS` (all flags: --help,
megatron_gkd/config.py).

data set -> batch -> [rollout] -> teacher forward (LoRA off) -> student forward (LoRA on) ->
divergence -> LoRA gradients -> update
"""

import logging
import math
import os
import signal
import sys
import tempfile
import time
import warnings
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace

if (
    __name__ == "__main__"
    # every rank would repeat these while megatron-core is imported; megatron_gkd.doctor says what
    # is installed
):
    for message in (
        "Transformer Engine and Apex are not",
        "Apex is not installed",
        "full scope is deprecated",
        "`torch.distributed.*deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("transformers.modeling_rope_utils").setLevel(
        logging.ERROR
    )  # does not know the talker's rotary keys
    from megatron_gkd.flags import exit_with
    from megatron_gkd.startup import import_problem

    if problem := import_problem():  # megatron-core's import would end in its traceback
        exit_with(ValueError(problem))

import torch
from safetensors import SafetensorError

from megatron_gkd import parallel as parallel_layout
from megatron_gkd.build import Parts, build, check_signal, load_data
from megatron_gkd.checkpoint import (
    STATE,
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    note_latest,
    read_state,
    remove_old,
    save_checkpoint,
)
from megatron_gkd.config import Config, describe_layout, parse_config_or_exit
from megatron_gkd.data import SampleDataset, eval_loader, num_steps_of_epochs, step_loader
from megatron_gkd.data.batch import Batch
from megatron_gkd.flags import exit_with
from megatron_gkd.forward import (
    Groups,
    TokenSums,
    student_forward,
    student_forward_backward,
    teacher_forward,
)
from megatron_gkd.lora.adapter import applied
from megatron_gkd.media.towers import StepMedia
from megatron_gkd.metrics import MetricsWriter, peak_memory_bytes
from megatron_gkd.model.args import read_model_args
from megatron_gkd.optimizer import Update, learning_rate
from megatron_gkd.parallel import Parallel, log_rank_0
from megatron_gkd.rollout.backend import Writer
from megatron_gkd.rollout.rollout import Rollout, make_rollout

PHASES = ("data_time", "rollout_time", "teacher_time", "student_time", "optimizer_time")


def train(config: Config, parallel: Parallel) -> None:
    """The whole run. Every rank calls it; rank 0 speaks and writes."""
    model_args = read_model_args(config.model.model)
    log_rank_0(parallel, describe_layout(parallel.world_size, model_args, config))
    if not config.data.check_data:
        check_writable(config.run.output_dir)
    train_data, eval_data = load_data(config, model_args, parallel)
    if config.data.check_data:
        log_rank_0(parallel, "--check_data: every row is good; no training was asked for")
        return
    global_batch_size = (
        config.train.per_device_train_batch_size
        * config.train.gradient_accumulation_steps
        * parallel.dp_size
    )
    if config.train.max_steps < 0:
        num_steps = num_steps_of_epochs(
            len(train_data), global_batch_size, config.train.num_train_epochs
        )
        config = replace(config, train=replace(config.train, max_steps=num_steps))
    total_steps = config.train.max_steps
    check_signal(config, train_data.report, total_steps)
    kinds = {kind for data in (train_data, eval_data) if data for kind in data.report.num_media}
    parts = build(
        config, model_args, parallel, audio="audio" in kinds, visual=bool(kinds - {"audio"})
    )
    progress = resume(config, parts, parallel, total_steps, global_batch_size)
    writer = MetricsWriter(
        config.run.output_dir,
        total_steps,
        progress.step,
        enabled=parallel.rank == 0,
        tensorboard=config.run.tensorboard,
    )
    if parallel.rank == 0:
        earlier = [folder.name for _, folder in checkpoints(config.run.output_dir)]
        if earlier and parts.resume_folder is None:
            log_rank_0(
                parallel,
                f"Note: an earlier run's checkpoints stay in {config.run.output_dir} ({', '.join(earlier)}); latest_checkpoint names this run's newest",
            )
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
        pad_to_multiple_of=parallel.sequence_multiple,
    )
    rollout = None
    if config.distill.seq_kd or config.distill.may_be_on_policy:
        rollout = make_rollout(
            config.rollout,
            model=parts.model,
            model_args=parts.model_args,
            parallel=parallel,
            data=train_data,
            model_folder=config.model.model,
            seed=config.train.seed,
        )
    if progress.step == 0 and eval_data:
        writer.log_eval(evaluate(config, parts, eval_data, parallel, step=0))

    saved, due = 0, False  # the step of this run's newest checkpoint, and whether one is owed
    with (
        closing(loader),
        closing(rollout) if rollout else nullcontext(),
        stop_signal() as asked_to_stop,
    ):
        while progress.step < total_steps:
            clock = Clock(parallel.device)
            parallel_layout.seed_step(config.train.seed, progress.step, parallel)
            batches = [batch.to(parallel.device) for batch in next(loader)]
            clock.lap("data_time")
            media = StepMedia(parts.towers, [batch.media for batch in batches])
            on_policy = draw(config.train.seed, progress.step) < config.distill.lmbda_at(
                progress.step
            )
            author: Writer | None = (
                "student" if on_policy else "teacher" if config.distill.seq_kd else None
            )  # None: the data set's own responses
            if rollout is not None and author is not None:
                batches = respond(rollout, batches, progress.step, author, media, parallel)
            clock.lap("rollout_time")
            rate = learning_rate(
                progress.step + 1,
                total_steps,
                peak=config.train.learning_rate,
                warmup_ratio=config.train.warmup_ratio,
                kind=config.train.lr_scheduler_type,
            )
            if batches:
                teacher_hidden = teacher_forward(parts.model, batches, parallel, media)
                clock.lap("teacher_time")
                parts.optimizer.zero_grad()
                sums = student_forward_backward(
                    parts.ddp,
                    batches,
                    teacher_hidden,
                    parts.loss,
                    parallel,
                    media,
                    Groups.of(train_data.report),
                )
                means = sums.means(parallel)
                clock.lap("student_time")
                update = parts.optimizer.step(rate, means["loss"])
                clock.lap("optimizer_time")
            else:
                means, update = (
                    TokenSums.unknown(parallel.device).means(parallel),
                    Update(applied=False, grad_norm=math.nan),
                )

            progress.count(update, on_policy)
            step = progress.step
            counts = step_counts(batches, bool(asked_to_stop), rollout, parallel)
            last = step == total_steps or counts["stop"]
            if step == 1 or step % config.run.logging_steps == 0 or last or not update.applied:
                metrics = {
                    "step": step,
                    "epoch": step * global_batch_size / len(train_data),
                } | means
                metrics |= {
                    "grad_norm": update.grad_norm,
                    "learning_rate": rate,
                    "on_policy": on_policy,
                }
                metrics |= step_metrics(
                    counts, clock, progress, global_batch_size, means["num_tokens"]
                )
                writer.log_train(metrics)
            if progress.bad_in_a_row >= config.train.max_bad_steps:
                raise FloatingPointError(
                    f"{progress.bad_in_a_row} steps in a row had NaN or Inf in rollout, loss or gradient (--max_bad_steps {config.train.max_bad_steps}); "
                    f"all were skipped. {sound_checkpoint(config.run.output_dir, progress)} {what_to_try(progress)}"
                )
            stop = counts["stop"]
            if eval_data and (step % config.run.eval_steps == 0 or step == total_steps):
                writer.log_eval(evaluate(config, parts, eval_data, parallel, step))
                stop = parallel_layout.any_rank(
                    bool(asked_to_stop), parallel.device
                )  # evaluation may take longer than a step
            ends = step == total_steps or stop
            if (
                saved and update.applied and parallel.rank == 0
            ):  # the newest has proved itself: it may push others out
                remove_old(config.run.output_dir, saved, config.run.save_total_limit)
            due |= step % config.run.save_steps == 0
            if ends or (
                due and not progress.bad_in_a_row
            ):  # while steps are bad the weights may be what is wrong
                folder = save(config, parts, parallel, progress, total_steps, global_batch_size)
                saved, due = step, False
                log_rank_0(parallel, f"saved {folder}")
                if ends and not progress.bad_in_a_row and parallel.rank == 0:
                    remove_old(config.run.output_dir, saved, config.run.save_total_limit)
            if stop and step < total_steps:
                way_on = (
                    f"--adapter {folder} (--save_only_model)"
                    if config.run.save_only_model
                    else "--resume_from_checkpoint latest"
                )
                log_rank_0(
                    parallel,
                    f"SIGTERM: stopped after step {step} of {total_steps}; go on with {way_on}",
                )
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


def resume(
    config: Config, parts: Parts, parallel: Parallel, total_steps: int, global_batch_size: int
) -> Progress:
    """The state of the checkpoint, if one is resumed. Another rank or other linears than the
    checkpoint's begin a new stage at step 0.
    """
    if parts.resume_folder is None:
        return Progress()
    rank, _, targets = applied(parts.model)
    before = lora_of(parts)
    same_scale = math.isclose(parts.alpha, before["alpha"])
    now = {"rank": rank, "targets": targets, "towers": config.lora.lora_towers}
    if not same_scale or now != {name: before[name] for name in now}:
        log_rank_0(
            parallel,
            f"New stage from {parts.resume_folder}: LoRA rank {before['rank']} -> {rank}, alpha {before['alpha']:g} -> {parts.alpha:g}, "
            f"on {', '.join(targets)}{' and the towers' if config.lora.lora_towers else ''}. The function is unchanged; the optimizer starts anew at step 0",
        )
        return Progress()
    state = read_state(parts.resume_folder, "settings", *Progress.__dataclass_fields__)
    load_checkpoint(
        parts.resume_folder,
        model=parts.model,
        model_args=parts.model_args,
        parallel=parallel,
        optimizer=parts.optimizer,
    )
    now = run_settings(config, global_batch_size, total_steps)
    for name, value in now.items():
        if state["settings"].get(name) != value:
            log_rank_0(
                parallel,
                f"Note: {name} was {state['settings'].get(name)} and is {value}: the resumed run will differ from one that was never stopped",
            )
    log_rank_0(parallel, f"Resumed {parts.resume_folder} at step {state['step']} of {total_steps}")
    if state["step"] >= total_steps:
        log_rank_0(
            parallel,
            f"Nothing is left to do: the checkpoint is at step {state['step']}, the run ends at {total_steps} (--max_steps, --num_train_epochs)",
        )
    progress = Progress(**{name: state[name] for name in Progress.__dataclass_fields__})
    return replace(progress, bad_in_a_row=0)


def lora_of(parts: Parts) -> dict:
    """Rank, alpha, targets and whether on the towers, of the LoRA of the checkpoint that is
    resumed; --save_only_model leaves it no state.
    """
    if (parts.resume_folder / STATE).is_file():
        return read_state(parts.resume_folder)["lora"]
    adapter = parts.adapter
    return {
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "targets": adapter.targets,
        "towers": bool(adapter.towers),
    }


# Where they may differ between a run and its continuation without a word: they change no number, or
# others stand for them.
FREE_SETTINGS = {
    "dataloader_num_workers",
    "dataset_num_proc",
    "media_cache",
    "check_data",
    "download_datasets",
    "allow_zero_signal",
    "max_bad_steps",
}
FREE_SETTINGS |= {
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
}


def run_settings(config: Config, global_batch_size: int, total_steps: int) -> dict:
    """What makes the numbers of a run, by name: a resumed one should have the same."""
    groups = config.to_dict()
    found = {
        name: value
        for group in ("data", "distill", "rollout", "train")
        for name, value in groups[group].items()
        if name not in FREE_SETTINGS
    }
    found |= {"torch_dtype": config.model.torch_dtype, "lora_dropout": config.lora.lora_dropout}
    return found | {"global_batch_size": global_batch_size, "total_steps": total_steps}


def check_writable(output_dir: str) -> None:
    """Raise OSError unless files can be written there: before minutes go into data and weights."""
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise NotADirectoryError(f"--output_dir {output_dir} is a file: choose another name")
    os.makedirs(output_dir, exist_ok=True)
    with tempfile.TemporaryFile(dir=output_dir):
        pass


def sound_checkpoint(output_dir: str, progress: Progress) -> str:
    """Where a run whose steps are all bad may go on: for its last message. One that was written
    right after the last good step may hold what ruined the others.
    """
    newest, last_good = find_checkpoint("latest", output_dir), progress.step - progress.bad_in_a_row
    found = [
        (number, folder)
        for number, folder in checkpoints(output_dir)
        if newest and number <= progress.step
    ]
    earlier = [folder for number, folder in found if number < last_good]
    after = [
        f"{folder} was written right after the last good step, which may have ruined the weights"
        for number, folder in found
        if number == last_good
    ]
    before = (
        [f"{earlier[-1]} is from before"]
        if earlier
        else ["there is no earlier checkpoint" if after else "There is no checkpoint yet"]
    )
    return "; ".join(after + before) + "."


def what_to_try(progress: Progress) -> str:
    """Against NaN and Inf."""
    if progress.skipped_steps == progress.step:
        return "No step was good: look for NaN and Inf in the weights of --model and --adapter; try --torch_dtype bfloat16 or float32"
    return "Try a lower --learning_rate, --torch_dtype bfloat16 instead of float16, a longer --warmup_ratio, a lower --lmbda"


def save(
    config: Config,
    parts: Parts,
    parallel: Parallel,
    progress: Progress,
    total_steps: int,
    global_batch_size: int,
):
    """Write this step's checkpoint."""
    return save_checkpoint(
        config.run.output_dir,
        progress.step,
        model=parts.model,
        model_args=parts.model_args,
        parallel=parallel,
        alpha=parts.alpha,
        dropout=config.lora.lora_dropout,
        base_model=config.model.model,
        optimizer=None if config.run.save_only_model else parts.optimizer,
        state=vars(progress) | {"settings": run_settings(config, global_batch_size, total_steps)},
    )


def evaluate(
    config: Config, parts: Parts, data: SampleDataset, parallel: Parallel, step: int
) -> dict:
    """Teacher-forced means over the evaluation data: divergence, agreement, token accuracy."""
    started, sums = time.perf_counter(), TokenSums.zero(parallel.device, Groups.of(data.report))
    loader = eval_loader(
        data,
        per_device_batch_size=config.train.per_device_eval_batch_size,
        dp_rank=parallel.dp_rank,
        dp_size=parallel.dp_size,
        num_workers=0,
        pad_token_id=data.pad_token_id,
        pad_to_multiple_of=parallel.sequence_multiple,
    )
    for batch in loader:
        batches = [batch.to(parallel.device)]
        media = StepMedia(parts.towers, [batch.media for batch in batches])
        teacher_hidden = teacher_forward(parts.model, batches, parallel, media)
        student_forward(parts.ddp, batches, teacher_hidden, parts.loss, parallel, sums, media)
    return {"step": step} | sums.means(parallel) | {"eval_time": time.perf_counter() - started}


def respond(
    rollout: Rollout,
    batches: list[Batch],
    step: int,
    writer: Writer,
    media: StepMedia,
    parallel: Parallel,
) -> list[Batch]:
    """The batches with new responses; on all ranks none where the logits of any row were not
    finite.

    Collectives: the rollout's, and an exchange of what went wrong: replicas write apart, and must
    agree to skip the step.
    """
    written, error = [], ""
    try:
        written = rollout.respond(batches, step, writer, media)
    except FloatingPointError as caught:
        error = str(caught)
    errors = parallel_layout.all_gather_objects(error)
    if any(errors):
        of_rows = [
            text for text in errors if text and "a row of another rank" not in text
        ] or errors
        log_rank_0(
            parallel, f"Step {step + 1} is skipped: {max(of_rows, key=len)}"
        )  # the longest names the most rows
        return []
    return written


def draw(seed: int, step: int) -> float:
    """Uniform in [0, 1), the same on all ranks and after a resume."""
    return torch.rand(
        (), generator=torch.Generator().manual_seed(seed * 1_000_003 + step), dtype=torch.float64
    ).item()


class Clock:
    """Seconds of the phases of a step, 0 for one that was left out. Waits for the device at each
    lap.
    """

    def __init__(self, device: torch.device):
        self.device, self.laps = device, dict.fromkeys(PHASES, 0.0)
        self.started = self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now


def step_counts(
    batches: list[Batch], asked_to_stop: bool, rollout: Rollout | None, parallel: Parallel
) -> dict:
    """Counts over the global batch, the most memory of any rank, and whether any rank was asked to
    stop. Two small collectives.
    """
    sums = torch.tensor(
        [
            sum(
                int(batch.student.lengths.sum() + batch.teacher.lengths.sum()) for batch in batches
            ),
            sum(batch.cut_tokens for batch in batches),
            rollout.num_truncated(batches) if rollout is not None else 0,
        ],
        dtype=torch.float64,
        device=parallel.device,
    )
    torch.distributed.all_reduce(sums, group=parallel.groups.dp)
    most = torch.tensor(
        [float(asked_to_stop), peak_memory_bytes(parallel.device)],
        dtype=torch.float64,
        device=parallel.device,
    )
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return dict(zip(("tokens", "cut_tokens", "truncated_responses"), map(int, sums.tolist()))) | {
        "stop": bool(most[0]),
        "peak_memory": most[1].item(),
    }


def step_metrics(
    counts: dict, clock: Clock, progress: Progress, global_batch_size: int, num_tokens: int
) -> dict:
    """What a line of metrics says besides the means: counts, rates in tokens of both views a
    second, seconds, GiB.
    """
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
    """The command line: `argv` without the program's name, or that of the process. Every rank calls
    it.
    """
    config = parse_config_or_exit(sys.argv[1:] if argv is None else argv)
    if config.train.deterministic:
        parallel_layout.use_deterministic_kernels()
    try:
        parallel = parallel_layout.initialize(
            parallel_layout.resolve_device(config.model.device),
            tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
            expert_model_parallel_size=config.parallel.expert_model_parallel_size,
            seed=config.train.seed,
        )
        train(config, parallel)
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
        exit_with(error)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell says it: 128 + SIGINT
    parallel_layout.destroy()


if __name__ == "__main__":
    main()
