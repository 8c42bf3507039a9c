"""Steps that have gone bad: when a run ends for them or warns, what is left, what it says at the
end.
"""

from megatron_gkd.checkpoint import checkpoints, find_checkpoint
from megatron_gkd.parallel import log_rank_0
from megatron_gkd.run import Progress, Run

ZERO_GRADIENTS = 10  # in a row, that are no chance


def check_health(run: Run) -> None:
    """Raise FloatingPointError where --max_bad_steps steps in a row were bad, on every rank; warn
    once where training has stopped to learn: an update that was too large has moved the weights to
    where the loss has no slope.
    """
    progress, most = run.progress, run.config.train.max_bad_steps
    if progress.bad_in_a_row >= most:
        raise FloatingPointError(
            f"{progress.bad_in_a_row} steps in a row had NaN or Inf in rollout, loss or gradient "
            f"(--max_bad_steps {most}); "
            f"all were skipped. {last_good_checkpoint(run.config.run.output_dir, progress)} "
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


def last_good_checkpoint(output_dir: str, progress: Progress) -> str:
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
