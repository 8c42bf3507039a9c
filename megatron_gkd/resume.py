"""How a run goes on, from a checkpoint or in a new stage; when it saves and prunes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_gkd.checkpoint import (
    checkpoint_folder,
    checkpoints,
    load_checkpoint,
    note_latest,
    remove_old,
    save_checkpoint,
)
from megatron_gkd.checkpoint_files import STATE
from megatron_gkd.checkpoint_state import read_state
from megatron_gkd.config import Config, default_settings
from megatron_gkd.data import SampleDataset
from megatron_gkd.formats.safetensors_file import FLOAT32_BYTES
from megatron_gkd.identity import (
    WILL_DIFFER,
    changed_identity,
    changed_rows,
    data_state,
    run_settings,
)
from megatron_gkd.lora.adapter import applied
from megatron_gkd.lora.peft_config import CONFIG
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.lora_settings import scale_divisor
from megatron_gkd.lora_targets import describe_targets
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.optimizer import Optimizer, Update
from megatron_gkd.output_dir import check_space
from megatron_gkd.parallel import Parallel, agreed, first_error, log_rank_0
from megatron_gkd.run import Progress, Run

# of `Progress`, in checkpoints of all versions
_COUNTED_ALWAYS = ("step", "on_policy_steps", "skipped_steps", "bad_in_a_row")


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
    identity: dict[str, Any],
) -> Progress:
    """The state of the checkpoint `folder`, if one is resumed (its LoRA weights, `adapter`, are in
    the model). Another rank or other linears than the checkpoint's begin a new stage at step 0.
    identity: `identity_state`, of rank 0 alone.

    Raises ValueError naming a file of the checkpoint that contradicts another one of it, or rows or
    base weights that are not those of the checkpoint. Collectives: those of `first_error`.
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
    state = read_state(folder, "settings", *_COUNTED_ALWAYS)
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
                parallel, f"Note: {name} was {settings.get(name)} and is {value}: {WILL_DIFFER}"
            )
    error = ""
    if parallel.rank == 0:  # it goes through all rows
        error = _changed_inputs(config, folder, state, train_data, eval_data, identity)
    if error := first_error(error, parallel.device):
        raise ValueError(error)
    total_steps = config.train.max_steps
    log_rank_0(parallel, f"Resumed {folder} at step {state['step']} of {total_steps}")
    if state["step"] >= total_steps:
        log_rank_0(
            parallel,
            f"Nothing is left to do: the checkpoint is at step {state['step']}, the run ends at "
            f"{total_steps} (--max_steps, --num_train_epochs)",
        )
    known = {name: state[name] for name in Progress.__dataclass_fields__ if name in state}
    progress = Progress(**known)
    return replace(progress, bad_in_a_row=0)


def _changed_inputs(
    config: Config,
    folder: Path,
    state: dict[str, Any],
    train_data: SampleDataset,
    eval_data: SampleDataset | None,
    identity: dict[str, Any],
) -> str:
    """Why the run cannot go on: its rows or base weights are not the checkpoint's, and
    --allow_changed_inputs does not say that they are meant to be others. Prints what is a note.
    """
    changes, notes = changed_rows(state.get("data", {}), train_data, eval_data), list[str]()
    if "identity" in state:
        changed, notes = changed_identity(state["identity"], identity, config.model.model)
        changes += changed
    else:
        print(f"Note: {folder} is of an earlier version: its base weights are not compared")
    of_training = [one for one in changes if not one.startswith("val_dataset ")]
    if of_training and not config.faults.allow_changed_inputs:
        return (
            f"--resume_from_checkpoint {folder}: {'; '.join(of_training)}. Give it what it was "
            "trained with, or go on with other inputs on purpose: --allow_changed_inputs true"
        )
    for one in (*changes, *notes):
        print(f"Note: {one}: {WILL_DIFFER}", flush=True)
    return ""


def _lora_of(folder: Path, adapter: PeftAdapter) -> dict[str, Any]:
    """Rank, alpha, targets and whether on the towers, of the LoRA of the checkpoint `folder`;
    --save_only_model leaves no state, only the adapter in it. The targets are those of the weights:
    runs of earlier versions wrote down linears whose layers had none.
    """
    found = {"targets": adapter.targets}
    if (folder / STATE).is_file():
        lora = read_state(folder)["lora"]
        for name, setting in (("alpha", "lora_alpha"), ("use_rslora", "use_rslora")):
            stated, known = adapter.config.get(setting, False), lora.get(name, False)
            if stated != known:
                raise ValueError(
                    f"{folder / CONFIG}: {setting} is {stated}, and {STATE} beside it says "
                    f"{known}: one of them was changed or is of another checkpoint; write the "
                    "number there that the adapter was trained with"
                )
        return lora | found
    return found | {
        "rank": adapter.rank,
        "alpha": adapter.stated_alpha,
        "use_rslora": adapter.use_rslora,
        "towers": bool(adapter.towers),
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


def check_room(
    config: Config, parallel: Parallel, num_parameters: dict[str, int], step: int
) -> None:
    """Raise OSError, on every rank, where not even one checkpoint fits on the disk; say where not
    all do that the run will hold. step: that it begins with. Collectives: those of `agreed`.
    """
    adapters = num_parameters["trainable"] * (1 + config.distill.teacher_follows)
    moments = 0 if config.run.save_only_model else 2 * num_parameters["trainable"]
    left, every = config.train.max_steps - step, config.run.save_steps
    with agreed(parallel.device, ""):
        if parallel.rank == 0:
            note = check_space(
                config.run.output_dir,
                FLOAT32_BYTES * (adapters + moments),
                -(-max(left, 0) // every),
                config.run.save_total_limit,
            )
            if note:
                log_rank_0(parallel, note)


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


def way_on(run: Run) -> str:
    """The flag that goes on from the checkpoint that the run has just written."""
    settings = run.config.run
    if settings.save_only_model:
        folder = checkpoint_folder(settings.output_dir, run.progress.step)
        return f"--adapter {folder} (--save_only_model)"
    return "--resume_from_checkpoint latest"


def _state(run: Run) -> dict[str, Any]:
    """Of trainer_state.json what the run knows."""
    return vars(run.progress) | {
        "settings": run_settings(run.config, run.parallel),
        "data": data_state(run.train_data, run.eval_data),
        "identity": run.identity,
    }


def _prune(run: Run) -> None:
    """Leave --save_total_limit checkpoints, the newest that was written among them."""
    if run.parallel.rank == 0:
        remove_old(run.config.run.output_dir, run.saved_step, run.config.run.save_total_limit)
