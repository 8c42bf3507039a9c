"""Steps that have gone bad: when a run ends for them or warns, what is left, what it says at the
end.
"""

from pathlib import Path

from megatron_gkd.checkpoint import checkpoints, latest_first, looked_at, step_of
from megatron_gkd.checkpoint_files import STATE
from megatron_gkd.checkpoint_state import read_state
from megatron_gkd.parallel import Parallel, agreed, from_rank_0, log_rank_0
from megatron_gkd.run import Progress, Run

ZERO_GRADIENTS = 10  # in a row, that are no chance


def check_health(run: Run) -> None:
    """Raise FloatingPointError where --max_bad_steps steps in a row were bad, on every rank; warn
    once where training has stopped to learn: an update that was too large has moved the weights to
    where the loss has no slope. Collectives: where it raises those of `last_good_checkpoint`.
    """
    progress, most = run.progress, run.config.train.max_bad_steps
    if progress.bad_in_a_row >= most:
        raise FloatingPointError(
            f"{progress.bad_in_a_row} steps in a row had NaN or Inf in rollout, loss or gradient "
            f"(--max_bad_steps {most}); "
            f"all were skipped. {last_good_checkpoint(run)} "
            f"{non_finite_hint(progress)}"
        )
    if progress.zero_gradients_in_a_row == ZERO_GRADIENTS:
        first = progress.step - ZERO_GRADIENTS + 1
        log_rank_0(
            run.parallel,
            f"Warning: the gradient was exactly 0 in the {ZERO_GRADIENTS} updates since step "
            f"{first}: nothing is learned any more, whatever the loss says. An update before may "
            "have been too large: go on from a checkpoint of before with a lower --learning_rate "
            "(zero_gradient_steps counts them)",
        )


def summary(progress: Progress, rows_of_step: int) -> str:
    """What a run says at its end of the steps that taught nothing; empty where there were none."""
    parts = []
    if skipped := progress.skipped_steps:
        parts.append(
            f"{skipped} were skipped (NaN, Inf, a float16 overflow, or no token with a loss; "
            f"{skipped * rows_of_step} rows)"
        )
    if zero := progress.zero_gradient_steps:
        parts.append(f"{zero} had a gradient of exactly 0")
    return f"Of {progress.step} steps {' and '.join(parts)}" if parts else ""


def last_good_checkpoint(run: Run) -> str:
    """Where a run whose steps are all bad may go on: for its last message, the same on every rank.
    A checkpoint that was written right after the last good step may hold what ruined the others.

    Collectives: those of `agreed`; those of `looked_at`, for the checkpoints of this run until one
    is from before; those of `agreed` and a broadcast of one number for each that is not.
    """
    parallel, output_dir = run.parallel, run.config.run.output_dir
    last_good, found, said = run.progress.step - run.progress.bad_in_a_row, list[Path](), []
    try:
        with agreed(parallel.device, ""):
            if parallel.rank == 0:
                so_far = {path for step, path in checkpoints(output_dir) if step <= last_good}
                found = [path for path in latest_first(output_dir) if path in so_far]
        for folder, wrong in looked_at(output_dir, found, parallel):
            step = step_of(folder)
            if wrong:
                said.append(f"{folder} is no way on: {wrong}")
            elif step is not None and step < last_good:
                return "; ".join((*said, f"{folder} is from before."))
            else:
                said.append(
                    f"{folder} was written right after the last good step, which may have ruined "
                    "the weights"
                )
                with agreed(parallel.device, ""):
                    bad_before = _bad_before(folder, parallel)
                last_good -= from_rank_0([bad_before], parallel.device)[0]
    except (OSError, ValueError) as error:
        said.append(f"checkpoints cannot be read: {error}")
    resumed = run.config.run.resume_from_checkpoint
    if resumed and Path(resumed).resolve().parent != Path(output_dir).resolve():
        return "; ".join((*said, f"the run went on from {resumed}."))
    none = "there is no earlier checkpoint." if said else "There is no checkpoint yet."
    return "; ".join((*said, none))


def _bad_before(folder: Path, parallel: Parallel) -> int:
    """Steps that were bad one after the other when rank 0's checkpoint was written."""
    has_state = parallel.rank == 0 and (folder / STATE).is_file()
    return read_state(folder).get("bad_in_a_row", 0) if has_state else 0


def non_finite_hint(progress: Progress) -> str:
    """What to try against NaN and Inf."""
    if progress.skipped_steps == progress.step:
        return (
            "No step was good: look for NaN and Inf in the weights of --model and --adapter; "
            "try --torch_dtype bfloat16 or float32"
        )
    return (
        "Try a lower --learning_rate, --torch_dtype bfloat16 instead of float16, "
        "a longer --warmup_ratio, a lower --lmbda"
    )
