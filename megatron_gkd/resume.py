"""How a run goes on: from a checkpoint or in a new stage; when it saves and prunes; what is left
when its steps have gone bad.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_gkd.checkpoint import (
    STATE,
    checkpoint_folder,
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    note_latest,
    read_state,
    remove_old,
    save_checkpoint,
)
from megatron_gkd.config import Config, default_settings
from megatron_gkd.data import SampleDataset
from megatron_gkd.lora.adapter import applied
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.lora_settings import scale_divisor
from megatron_gkd.lora_targets import describe_targets
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.optimizer import Optimizer, Update
from megatron_gkd.parallel import Parallel, log_rank_0
from megatron_gkd.run import Progress, Run

_WILL_DIFFER = "the resumed run will differ from one that was never stopped"


def resume(
    config: Config,
    model: torch.nn.Module,
    model_args: ModelArgs,
    optimizer: Optimizer,
    parallel: Parallel,
    adapter: PeftAdapter | None,
    folder: Path | None,
    train_data: SampleDataset,
    eval_data: SampleDataset | None,
) -> Progress:
    """The state of the checkpoint `folder`, if one is resumed (its LoRA weights, `adapter`, are in
    the model). Another rank or other linears than the checkpoint's begin a new stage at step 0.
    """
    if folder is None or adapter is None:
        return Progress()
    rank, scale, targets = applied(model)
    before = _lora_of(folder, adapter)
    divisor = scale_divisor(before["rank"], before.get("use_rslora", False))
    same_scale = math.isclose(scale, before["alpha"] / divisor)
    lora = {"rank": rank, "targets": targets, "towers": config.lora.lora_towers}
    if not same_scale or lora != {name: before[name] for name in lora}:
        log_rank_0(
            parallel,
            f"New stage from {folder}: LoRA rank {before['rank']} -> {rank}, alpha "
            f"{before['alpha']:g} -> {config.lora.alpha:g}, on {describe_targets(targets)}"
            f"{' and the towers' if config.lora.lora_towers else ''}. The "
            "function is unchanged; the optimizer starts anew at step 0",
        )
        return Progress()
    state = read_state(folder, "settings", *Progress.__dataclass_fields__)
    load_checkpoint(
        folder,
        model=model,
        model_args=model_args,
        parallel=parallel,
        optimizer=optimizer,
        teacher=config.distill.teacher_follows,
    )
    # a checkpoint of an earlier version was made with the defaults of what came later
    settings = default_settings() | state["settings"]
    for name, value in run_settings(config, parallel).items():
        if settings.get(name) != value:
            log_rank_0(
                parallel, f"Note: {name} was {settings.get(name)} and is {value}: {_WILL_DIFFER}"
            )
    if parallel.rank == 0:  # it goes through all rows
        for note in changed_rows(state.get("data", {}), train_data, eval_data):
            log_rank_0(parallel, note)
    total_steps = config.train.max_steps
    log_rank_0(parallel, f"Resumed {folder} at step {state['step']} of {total_steps}")
    if state["step"] >= total_steps:
        log_rank_0(
            parallel,
            f"Nothing is left to do: the checkpoint is at step {state['step']}, the run ends at "
            f"{total_steps} (--max_steps, --num_train_epochs)",
        )
    progress = Progress(**{name: state[name] for name in Progress.__dataclass_fields__})
    return replace(progress, bad_in_a_row=0)


NUM_BLOCKS = 64  # of rows, with a digest each


def data_state(
    train_data: SampleDataset, eval_data: SampleDataset | None
) -> dict[str, dict[str, Any] | None]:
    """What a resumed run should have again: numbers of rows, and digests of NUM_BLOCKS parts of
    what was made of them, by flag.
    """
    return {
        flag: {"rows": len(data), "digests": data.digests(_rows_of_block(len(data)))}
        if data
        else None
        for flag, data in (("dataset", train_data), ("val_dataset", eval_data))
    }


def _rows_of_block(num_rows: int) -> int:
    return math.ceil(num_rows / NUM_BLOCKS)


def changed_rows(
    before: dict[str, Any], train_data: SampleDataset, eval_data: SampleDataset | None
) -> list[str]:
    """A line for each part of the data whose rows are others than in `before`, with the place of
    the first; of a checkpoint that does not tell none.
    """
    notes = []
    for flag, data in (("dataset", train_data), ("val_dataset", eval_data)):
        if flag not in before:
            continue
        then = before[flag] or {"rows": 0, "digests": []}
        num_rows = len(data) if data else 0
        block = max(1, _rows_of_block(then["rows"]))
        found = data.digests(block) if data else []
        if found == then["digests"]:
            continue
        change = f"had {then['rows']} rows and has {num_rows}"
        if num_rows == then["rows"]:
            change = f"has {num_rows} rows as before, but not the same"
        same = [old == new for old, new in zip(then["digests"], found)]
        first = block * (same.index(False) if False in same else len(same))
        if data and first < num_rows:
            last = min(first + block, num_rows) - 1
            change += f", the first other one is {data.location(first)}"
            change += f", or follows it up to {data.location(last)}" * (last > first)
        notes.append(f"Note: {flag} {change}: {_WILL_DIFFER}")
    return notes


def _lora_of(folder: Path, adapter: PeftAdapter) -> dict[str, Any]:
    """Rank, alpha, targets and whether on the towers, of the LoRA of the checkpoint `folder`;
    --save_only_model leaves no state, only the adapter in it. The targets are those of the weights:
    runs of earlier versions wrote down linears whose layers had none.
    """
    found = {"targets": adapter.targets}
    if (folder / STATE).is_file():
        return read_state(folder)["lora"] | found
    return found | {
        "rank": adapter.rank,
        "alpha": adapter.stated_alpha,
        "use_rslora": adapter.use_rslora,
        "towers": bool(adapter.towers),
    }


# Settings that may change on resume without a note: the first group changes no number, or names
# rows, which are compared themselves; the second is covered by global_batch_size and total_steps;
# how a step's rows are cut into micro-batches changes rounding and dropout's draws, as another
# layout does.
FREE_SETTINGS = {
    "dataset",
    "val_dataset",
    "prepared_rows",
    "prepared_rows_gib",
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
    "max_tokens_per_micro_batch",
    "max_steps",
    "num_train_epochs",
}


def run_settings(config: Config, parallel: Parallel) -> dict[str, Any]:
    """What makes the numbers of a run, by name: a resumed one should have the same."""
    groups = config.to_dict()
    found = {
        name: value
        for group in ("data", "distill", "rollout", "train")
        for name, value in groups[group].items()
        if name not in FREE_SETTINGS
    }
    found |= {"torch_dtype": config.model.torch_dtype, "lora_dropout": config.lora.lora_dropout}
    return found | {
        "global_batch_size": config.train.global_batch_size(parallel.dp_size),
        "total_steps": config.train.max_steps,
    }


def note_start(config: Config, parallel: Parallel, resume_folder: Path | None) -> None:
    """Write down what this run goes on from, which is its newest checkpoint so far; tell of those
    that an earlier run left. Rank 0 alone.
    """
    if parallel.rank != 0:
        return
    earlier = [folder.name for _, folder in checkpoints(config.run.output_dir)]
    if earlier and resume_folder is None:
        log_rank_0(
            parallel,
            f"Note: an earlier run's checkpoints stay in {config.run.output_dir} "
            f"({', '.join(earlier)}); latest_checkpoint names this run's newest",
        )
    note_latest(config.run.output_dir, resume_folder)


def save_if_due(run: Run, update: Update, ends: bool) -> None:
    """After a step whose update was `update`: prune, and write a checkpoint where one is due.
    `ends`: the run ends with this step, which always saves.

    The newest checkpoint pushes older ones out only after a good step has followed it, and while
    steps are bad none is written: the weights may be what is wrong. Collectives: those of
    `save_checkpoint`.
    """
    step, progress = run.progress.step, run.progress
    if run.saved_step and update.applied:
        _prune(run)
    run.save_owed |= step % run.config.run.save_steps == 0
    if not ends and (progress.bad_in_a_row or not run.save_owed):
        return
    folder = save_checkpoint(
        run.config.run.output_dir,
        step,
        model=run.model,
        model_args=run.model_args,
        parallel=run.parallel,
        alpha=run.config.lora.alpha,
        use_rslora=run.config.lora.use_rslora,
        dropout=run.config.lora.lora_dropout,
        base_model=run.config.model.model,
        optimizer=None if run.config.run.save_only_model else run.optimizer,
        state=_state(run) if run.parallel.rank == 0 else {},  # it goes through all rows
        teacher=run.config.distill.teacher_follows,
    )
    run.saved_step, run.save_owed = step, False
    log_rank_0(run.parallel, f"saved {folder}")
    if ends and not progress.bad_in_a_row:
        _prune(run)


def _state(run: Run) -> dict[str, Any]:
    """Of trainer_state.json what the run knows."""
    return vars(run.progress) | {
        "settings": run_settings(run.config, run.parallel),
        "data": data_state(run.train_data, run.eval_data),
    }


def _prune(run: Run) -> None:
    """Leave --save_total_limit checkpoints, the newest that was written among them."""
    if run.parallel.rank == 0:
        remove_old(run.config.run.output_dir, run.saved_step, run.config.run.save_total_limit)


def stopped_line(run: Run) -> str:
    """What a run that was asked to stop says at its end, when it has saved."""
    settings, step = run.config.run, run.progress.step
    way_on = "--resume_from_checkpoint latest"
    if settings.save_only_model:
        way_on = f"--adapter {checkpoint_folder(settings.output_dir, step)} (--save_only_model)"
    return f"SIGTERM: stopped after step {step} of {run.total_steps}; go on with {way_on}"


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
