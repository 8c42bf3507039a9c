"""GKD LoRA self-distillation: `torchrun [...] -m megatron_gkd.train FLAGS` (all flags: --help,
megatron_gkd/config.py).

data set -> batch -> [rollout] -> teacher forward (LoRA off) -> student forward (LoRA on) ->
divergence -> LoRA gradients -> update
"""

import math
import os
import sys
import time
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

from megatron_gkd import startup
from megatron_gkd.config import Config, parse_config_or_exit
from megatron_gkd.flags import exit_with
from megatron_gkd.output_stream import outlive_readers
from megatron_gkd.stop_requests import (
    FOLDER_LOST,
    StopRequests,
    end_at_once_on_signals,
    exit_status,
    launcher,
    stop_requests,
    stopped_line,
)

if __name__ == "__main__":  # before the imports below, which take seconds
    LAUNCHER = launcher()
    end_at_once_on_signals()
    outlive_readers()
    CONFIG = parse_config_or_exit(sys.argv[1:])
    startup.prepare_imports()

from safetensors import SafetensorError

from megatron_gkd.build import build_run
from megatron_gkd.data.batch import Batch
from megatron_gkd.forward import student_forward, student_forward_backward, teacher_forward
from megatron_gkd.health import check_health, summary
from megatron_gkd.identity import check_same_start
from megatron_gkd.liveness import Membership, joined
from megatron_gkd.media.towers import StepMedia
from megatron_gkd.metrics import StepCounts, TokenSums
from megatron_gkd.model.transformer_config import DTYPES
from megatron_gkd.optimizer import Update
from megatron_gkd.output_lock import OutputLock
from megatron_gkd.parallel import (
    Parallel,
    destroy,
    initialize,
    log_rank_0,
    resolve_device,
    use_deterministic_kernels,
    world_max,
)
from megatron_gkd.resume import save_if_due, way_on
from megatron_gkd.run import Run, StepResult
from megatron_gkd.run_data import check_data, print_row
from megatron_gkd.run_folder import was_begun_by_this_job

REFUSALS = (ValueError, OSError, FloatingPointError, SafetensorError)
"""Errors that end a run with a line"""
BATCHES_BETWEEN_LOOKS = 8  # of an evaluation: whether the run is asked to stop


def train(config: Config, parallel: Parallel, requests: StopRequests, member: Membership) -> int:
    """The whole run; returns the request that has stopped it early, otherwise 0. Every rank calls
    it; rank 0 prints and writes.
    """
    lock = OutputLock(config.run.output_dir, requests.folder_lost, partial(log_rank_0, parallel))
    with lock, closing(build_run(config, parallel, lock)) as run:
        if owes_evaluation(run):
            log_evaluation(run, requests)
        requests.save_first()
        note_progress(run, member)
        with closing(run.batches()) as steps:
            for batches in steps:
                result = train_step(run, batches)
                run.count(result)
                counts = StepCounts.of(
                    result.batches,
                    result.num_truncated,
                    requests.number,
                    run.memory.most(),
                    parallel,
                )
                stop = still_ours(counts.stop, config)
                if run.is_logging_step(result, bool(stop)):
                    run.log_step(result, counts)
                check_health(run)
                save_if_due(run, result.update, ends=bool(stop) or run.is_complete)
                note_progress(run, member)
                if run.is_eval_step and (run.is_complete or not stop):
                    stop = still_ours(log_evaluation(run, requests), config)
                    if stop and run.saved_step < run.progress.step:
                        save_if_due(run, result.update, ends=True)
                ends = run.is_complete or stop
                if ends and (line := summary(run.progress, run.global_batch_size)):
                    log_rank_0(parallel, line)
                if stop and not run.is_complete:
                    step, steps_of_run = run.progress.step, run.total_steps
                    log_rank_0(parallel, stopped_line(stop, step, steps_of_run, way_on(run)))
                    return stop
    return 0


def still_ours(stop: int, config: Config) -> int:
    """The request `stop`, the same on every rank. Raises OSError, on every rank, where it is that
    another run has taken --output_dir.
    """
    if stop == FOLDER_LOST:
        raise OSError(
            f"--output_dir {config.run.output_dir}: another run has taken it "
            "(--take_over_output_dir); this one ends and writes nothing more"
        )
    return stop


def going_on(config: Config) -> Config:
    """The settings of a run that torchrun has started again: from its newest checkpoint."""
    if os.environ.get("RANK", "0") == "0":
        print("Started again: as with --resume_from_checkpoint latest", flush=True)
    return replace(config, run=replace(config.run, resume_from_checkpoint="latest"))


def note_progress(run: Run, member: Membership) -> None:
    """What the other ranks are told where this one does not answer any more."""
    step, is_resumed = run.progress.step, member.step is None and run.progress.step > 0
    member.step = step
    if is_resumed or run.saved_step == step > 0:
        member.way_on = f"go on with {way_on(run)}, from step {step}"


def train_step(run: Run, batches: list[Batch]) -> StepResult:
    """[rollout] -> teacher (LoRA off) -> student (LoRA on) -> divergence -> LoRA gradients ->
    AdamW. Every rank calls it with its share of the global batch.
    """
    step, parallel, clock = run.progress.step, run.parallel, run.clock
    learning_rate = run.learning_rate()
    media = StepMedia(run.towers, [batch.media for batch in batches])
    on_policy = run.is_on_policy(step)
    num_samples = 1
    if author := run.author(on_policy):
        assert run.rollout is not None, "build_run makes one wherever a step may need it"
        batches = run.rollout.respond_or_skip(batches, step, author, media)
        num_samples = run.rollout.num_samples
        media = media.regrouped([batch.media for batch in batches])
    clock.lap("rollout_time")
    if batches:
        teacher_hidden = teacher_forward(run.model, batches, parallel, media)
        clock.lap("teacher_time")
        run.optimizer.zero_grad()
        with run.student_pass(batches):
            sums = student_forward_backward(
                run.ddp, batches, teacher_hidden, run.loss, parallel, media, run.train_groups
            )
        means = sums.means(parallel)
        clock.lap("student_time")
        update = run.update(learning_rate, means)
        clock.lap("optimizer_time")
    else:  # the logits of some rank's rollout were not finite: every rank skips the step
        means = TokenSums.zero(parallel.device).means(parallel)
        update = Update(applied=False, grad_norm=math.nan)
    return StepResult(
        batches=batches,
        num_samples=num_samples,
        num_truncated=run.rollout.num_truncated(batches) if run.rollout is not None else 0,
        on_policy=on_policy,
        learning_rate=learning_rate,
        means=means,
        update=update,
    )


def owes_evaluation(run: Run) -> bool:
    """Whether the weights that the run starts with are to be evaluated: before the first step, and
    where an earlier start was stopped between a step and its evaluation. Every rank calls it.
    """
    if not run.is_eval_step:
        return False
    step, last = run.progress.step, run.writer.last_evaluation
    owes = step == 0 or (last is not None and last < step)
    return bool(world_max(int(owes), run.parallel.device))  # what rank 0 finds in its files


def log_evaluation(run: Run, requests: StopRequests) -> int:
    """Evaluate and write it down, with answers of student and teacher where --log_rollouts asks for
    them; unless the run is asked to stop meanwhile, which it returns. Every rank calls it.
    """
    values, answers = evaluate(run, requests), []
    if values is not None and run.rollout_log is not None:
        if is_asked_to_stop(run, requests):
            values = None  # two more rollouts would be written
        else:
            answers = run.rollout_log.of_evaluation(run.progress.step)
    if values is not None:
        run.writer.log_eval(values)
        run.writer.log_rollouts(answers)
    return world_max(requests.number, run.parallel.device)


def is_asked_to_stop(run: Run, requests: StopRequests) -> bool:
    """Whether an evaluation is left to the resumed run: not where no steps are left. Every rank
    calls it. Collectives: then a maximum of one number over the world.
    """
    return not run.is_complete and bool(world_max(requests.number, run.parallel.device))


def evaluate(run: Run, requests: StopRequests) -> dict[str, Any] | None:
    """Teacher-forced means over the evaluation data: divergence, agreement, token accuracy; of
    prompts alone on the responses that the student would now write, greedily. None where a run
    that has steps left is asked to stop: a resumed one evaluates at its start.
    """
    started, parallel = time.perf_counter(), run.parallel
    sums = TokenSums.zero(parallel.device, run.eval_groups)
    for number, (batches, media, is_written) in enumerate(run.eval_batches()):
        # those that were written took a rollout, and so will the next
        looks = is_written or number % BATCHES_BETWEEN_LOOKS == 0
        if looks and is_asked_to_stop(run, requests):
            return None
        if not batches:  # the logits of some rank's rollout were not finite
            sums.spoil()
            continue
        teacher_hidden = teacher_forward(run.model, batches, parallel, media)
        student_forward(run.ddp, batches, teacher_hidden, run.loss, parallel, sums, media)
    means = sums.means(parallel)
    return {"step": run.progress.step, **means, "eval_time": time.perf_counter() - started}


def main(argv: list[str]) -> None:
    """The command line without the program's name. Every rank calls it."""
    run_from_config(parse_config_or_exit(argv))


def run_from_config(config: Config, launcher: int | None = None) -> None:
    """Set up the process group, run, tear down. An expected error ends the process with one line
    and exit status 2, a request to stop with its own. launcher: the process whose death is such a
    request.
    """
    if config.train.deterministic:
        use_deterministic_kernels()
    stopped = 0
    try:
        with stop_requests(launcher) as requests:
            if config.data.show_row is not None:
                print_row(config)
                return
            device = resolve_device(config.model.device)
            own_run = partial(was_begun_by_this_job, config.run.output_dir)
            with joined(device, config.faults, REFUSALS, own_run) as member:
                if member.goes_on:
                    config = going_on(config)
                check_same_start(config, device)  # before groups that may not be the same
                parallel = initialize(
                    device,
                    dtype=DTYPES[config.model.torch_dtype],
                    tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
                    pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
                    expert_model_parallel_size=config.parallel.expert_model_parallel_size,
                    context_parallel_size=config.parallel.context_parallel_size,
                    seed=config.train.seed,
                    timeout=timedelta(seconds=config.faults.group_timeout),
                )
                if config.data.check_data:
                    check_data(config, parallel)
                else:
                    stopped = train(config, parallel, requests, member)
                destroy()
    except REFUSALS as error:
        exit_with(error)
    if stopped:
        sys.exit(exit_status(stopped))


if __name__ == "__main__":
    run_from_config(CONFIG, LAUNCHER)
