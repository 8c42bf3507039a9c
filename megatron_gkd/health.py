"""Steps that have gone bad: when a run ends for them, and what is left."""

from megatron_gkd.checkpoint import checkpoints, find_checkpoint
from megatron_gkd.run import Progress, Run


def check_health(run: Run) -> None:
    """Raise FloatingPointError where --max_bad_steps steps in a row were bad, on every rank."""
    progress, most = run.progress, run.config.train.max_bad_steps
    if progress.bad_in_a_row >= most:
        raise FloatingPointError(
            f"{progress.bad_in_a_row} steps in a row had NaN or Inf in rollout, loss or gradient "
            f"(--max_bad_steps {most}); "
            f"all were skipped. {last_good_checkpoint(run.config.run.output_dir, progress)} "
            f"{non_finite_hint(progress)}"
        )


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
