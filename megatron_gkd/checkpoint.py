"""Checkpoints: a PEFT adapter folder that also holds all that is needed to go on. Written under
another name and renamed, independent of the layout.

OUTPUT/checkpoint-STEP/
    adapter_{config.json,model.safetensors}    what `peft` loads
    teacher/                      the same two of a teacher that follows the student (lora/average)
    optimizer.safetensors         AdamW's moments, under the adapter's tensor names
    trainer_state.json            step and counters; random state is a function of (seed, step)
    checkpoint_manifest.json      bytes and digest of each of these, written last, read first
OUTPUT/latest_checkpoint          name of the last run's newest, empty before its first

All ranks write into these files (checkpoint_files.py), so all must see the output folder.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from megatron_gkd.checkpoint_files import (
    OPTIMIZER,
    STATE,
    TEACHER_FOLDER,
    check_written,
    create_files,
    num_places,
    tensor_files,
    write_share,
)
from megatron_gkd.checkpoint_manifest import (
    MANIFEST,
    sums_over_ranks,
    what_is_wrong,
    write_manifest,
)
from megatron_gkd.checkpoint_state import check_step, read_state
from megatron_gkd.checkpoint_values import what_cannot_be
from megatron_gkd.formats.job import sync
from megatron_gkd.links import check_link
from megatron_gkd.lora.adapter import adapter_slices
from megatron_gkd.lora.peft_config import TENSORS
from megatron_gkd.lora.slots import TEACHER
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.optimizer import MOMENTS, Optimizer
from megatron_gkd.parallel import (
    Parallel,
    agreed,
    from_rank_0,
    log_rank_0,
    text_of_rank,
)
from megatron_gkd.run_folder import write_atomically

LATEST = "latest_checkpoint"
_FOLDER = re.compile(r"checkpoint-(\d+)")


def checkpoint_folder(output_dir: str | Path, step: int) -> Path:
    """OUTPUT/checkpoint-STEP."""
    return Path(output_dir, f"checkpoint-{step}")


def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints in a run folder, oldest first."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        step = step_of(path)
        if step is not None and (path / TENSORS).is_file():
            found.append((step, path))
    return sorted(found)


def step_of(folder: Path) -> int | None:
    """N of a folder checkpoint-N; None for another name."""
    match = _FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def find_checkpoint(resume_from: str, output_dir: str | Path) -> Path | None:
    """The folder that `--resume_from_checkpoint` names. `latest` is the last run's newest, None if
    it has none yet.

    Raises FileNotFoundError for a folder that is not there.
    """
    if resume_from == "latest":
        there = (path for path in latest_first(output_dir) if (path / TENSORS).is_file())
        return next(there, None)
    if not (Path(resume_from) / TENSORS).is_file():
        check_link(Path(resume_from) / TENSORS, f"--resume_from_checkpoint {resume_from}: ")
        raise FileNotFoundError(
            f"--resume_from_checkpoint {resume_from}: no {TENSORS} there; expected a "
            "checkpoint-STEP folder, or latest"
        )
    return Path(resume_from)


def latest_of_rank_0(output_dir: str | Path, parallel: Parallel) -> Path | None:
    """What rank 0 finds as `latest`, on every rank: for some seconds a network file system may show
    an earlier one to another machine, whose ranks would go on from other weights. Of checkpoints
    that are not what was written the newest whole one before them, with a line for each.

    Raises OSError, on every rank, where rank 0 cannot read the folder, ValueError where none of its
    checkpoints is whole. Collectives: those of `agreed`; for each checkpoint that is looked at
    those of `text_of_rank` and `what_is_wrong`.
    """
    found: list[Path] = []
    with agreed(parallel.device, f"--resume_from_checkpoint latest, in {output_dir}: "):
        if parallel.rank == 0:
            found = latest_first(output_dir)
    wrong = ""
    for folder, wrong in looked_at(output_dir, found, parallel):
        if not wrong:
            return folder
        log_rank_0(
            parallel, f"Note: {folder.name} is skipped, an earlier one is looked for: {wrong}"
        )
    if wrong:
        raise ValueError(
            f"--resume_from_checkpoint latest: no checkpoint in {output_dir} is whole, the last "
            f"that was looked at: {wrong}; start anew in another --output_dir"
        )
    return None


def looked_at(
    output_dir: str | Path, found: Sequence[Path], parallel: Parallel
) -> Iterator[tuple[Path, str]]:
    """Each of rank 0's checkpoints `found` in `output_dir`, in turn, with why a run cannot go on
    from it, the same on every rank; "" where it can. Collectives: for each that is asked for those
    of `text_of_rank`, `what_is_wrong` and `what_cannot_be`; `text_of_rank` at the end.
    """
    for place in count():
        name = found[place].name if place < len(found) else ""
        name = text_of_rank(name, 0, parallel.device)
        if not name:
            return
        folder = Path(output_dir, name)
        yield folder, why_not(folder, parallel)


def latest_first(output_dir: str | Path) -> list[Path]:
    """`latest`, then the checkpoints before it, newest first; those without an adapter too."""
    note = Path(output_dir, LATEST)
    name = note.read_text().strip() if note.is_file() else None
    steps = [
        (step, path)
        for path in Path(output_dir).glob("checkpoint-*")
        if (step := step_of(path)) is not None and path.is_dir()
    ]
    last = next((step for step, path in steps if path.name == name), None)
    if name == "":
        return []
    return [path for step, path in sorted(steps, reverse=True) if last is None or step <= last]


def why_not(folder: Path, parallel: Parallel) -> str:
    """Why a run cannot go on from `folder`, the same on every rank; "" where it can. Collectives:
    those of `what_is_wrong` and, where that finds nothing, of `what_cannot_be`.
    """
    error = ""
    if parallel.rank == 0:
        try:
            if not (folder / TENSORS).is_file():
                raise FileNotFoundError(f"{folder / TENSORS} is missing")
            if (folder / STATE).is_file():
                check_step(folder, read_state(folder)["step"])
        except (OSError, ValueError) as caught:
            error = str(caught)
    wrong = what_is_wrong(folder, None, parallel, error)
    return wrong or what_cannot_be(folder, None, parallel)


def check_whole(folder: Path, names: Sequence[str] | None, parallel: Parallel, flag: str) -> None:
    """Raise ValueError, on every rank, where the files of the folder that `flag` names, or of them
    those of `names`, are not what its manifest says, or hold numbers that no run can go on from;
    with the checkpoint before it that has none of this. Without a manifest numbers alone are looked
    at. OSError, on every rank, where rank 0 cannot list the checkpoints before it. Collectives:
    those of `what_is_wrong` and `what_cannot_be`; where something is wrong those of `agreed` and
    `looked_at`.
    """
    wrong, as_they_are = what_is_wrong(folder, names, parallel), ""
    if wrong:
        as_they_are = f", or remove {folder / MANIFEST} to use the files as they are"
    wrong = wrong or what_cannot_be(folder, names, parallel)
    if not wrong:
        return
    own_step, before = step_of(folder), list[Path]()
    refusal = f"{flag} {folder}: {wrong}; give another checkpoint"
    with agreed(parallel.device, f"{refusal}; those beside it cannot be read: "):
        if own_step and parallel.rank == 0:
            before = [path for step, path in checkpoints(folder.parent) if step < own_step]
    good = (path for path, error in looked_at(folder.parent, before[::-1], parallel) if not error)
    newest = next(good, None)
    earlier = f" ({newest} is the newest good one before it)" if newest else ""
    raise ValueError(f"{refusal}{earlier}{as_they_are}")


def note_latest(output_dir: str | Path, folder: Path | None) -> None:
    """Write down which checkpoint of `output_dir` is its last run's newest; None, or one that lies
    elsewhere: it has none yet.
    """
    line = ""
    if folder is not None and folder.resolve().parent == Path(output_dir).resolve():
        line = f"{folder.name}\n"
    write_atomically(Path(output_dir, LATEST), line)


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    *,
    model: nn.Module,
    model_args: ModelArgs,
    parallel: Parallel,
    alpha: float,
    use_rslora: bool = False,
    dropout: float,
    base_model: str,
    optimizer: Optimizer | None,
    state: dict[str, Any],
    teacher: bool = False,
) -> Path:
    """Write OUTPUT/checkpoint-STEP. `optimizer=None` writes the adapter alone; teacher: the
    teacher's adapter too, which is as large as the student's; state: only rank 0's is written.

    `model` is the bare decoder stage. A kill at any moment leaves the earlier checkpoints, and this
    one whole or not at all. Raises OSError, on every rank, where one of them cannot write, whatever
    the reason; nothing half-written stays. Collectives: four maxima of one number over the world,
    a broadcast of two numbers and one for each tower, and a sum of four numbers for each of
    `tensor_files`; where a rank has failed, a broadcast of its message.
    """
    final = checkpoint_folder(output_dir, step)
    partial = final.with_name(f".{final.name}.partial")
    device, part = parallel.device, f"rank {parallel.rank} cannot write its part of {partial}"
    writes = f"{part} (earlier checkpoints stay as they are): "
    places = [0] * num_places(model_args)
    try:
        with agreed(device, writes):
            if parallel.rank == 0:
                _tidy(Path(output_dir))
                partial.mkdir(parents=True)
                places = create_files(
                    partial,
                    model,
                    model_args,
                    optimizer,
                    state | {"step": step},
                    alpha=alpha,
                    use_rslora=use_rslora,
                    dropout=dropout,
                    base_model=base_model,
                    teacher=teacher,
                )
        places = from_rank_0(places, device)
        with agreed(device, writes):
            written = write_share(
                partial, places, model, model_args, parallel, optimizer, teacher=teacher
            )
        with agreed(device, writes):
            check_written(written)
        names = tensor_files(optimizer is not None, teacher)
        own = [written[partial / name].digest if partial / name in written else 0 for name in names]
        digests = dict(zip(names, sums_over_ranks(own, device), strict=True))
        with agreed(device, writes):
            if parallel.rank == 0:
                write_manifest(partial, step, digests)
                _replace(partial, final)
                note_latest(output_dir, final)
    except BaseException:  # a full disk: what was written so far would keep it full
        if parallel.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def remove_old(output_dir: str | Path, step: int, save_total_limit: int) -> None:
    """Keep the newest `save_total_limit` of the checkpoints up to `step`. Those of later steps are
    an earlier run's: they neither count nor go.
    """
    so_far = [path for number, path in checkpoints(output_dir) if number <= step]
    for path in so_far[:-save_total_limit]:
        # a kill meanwhile leaves no half-removed checkpoint under its name
        gone = path.with_name(f".{path.name}.partial")
        path.rename(gone)
        _remove(gone)


def load_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    model_args: ModelArgs,
    parallel: Parallel,
    optimizer: Optimizer,
    teacher: bool = False,
) -> None:
    """Set LoRA weights, moments, update count and loss scale to those of the checkpoint, exactly;
    teacher: the teacher's LoRA too, where the checkpoint has it. Any parallel layout. No
    collectives.

    Raises FileNotFoundError or ValueError naming the file when it is not complete.
    """
    state, moments = read_state(folder), optimizer.moments()
    teacher_path = folder / TEACHER_FOLDER / TENSORS
    names = [TENSORS, OPTIMIZER]
    names += [f"{TEACHER_FOLDER}/{TENSORS}"] if teacher and state.get("teacher") else []
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing; the checkpoint is not complete, resume from another "
                "one"
            )
    with _opened(folder / TENSORS) as weights, _opened(folder / OPTIMIZER) as states:
        for part in adapter_slices(model, model_args, parallel):
            name, index = part.stored.name, part.stored.index
            part.view.copy_(weights.get_slice(name)[index])
            for kind in MOMENTS:
                moments[part.parameter][kind][part.where].copy_(
                    states.get_slice(f"{name}.{kind}")[index]
                )
    if teacher and teacher_path.is_file():
        with _opened(teacher_path) as weights:
            for part in adapter_slices(model, model_args, parallel, TEACHER):
                part.view.copy_(weights.get_slice(part.stored.name)[part.stored.index])
    optimizer.num_updates = state["num_updates"]
    optimizer.load_scaler_state(state["loss_scale"])


def _opened(path: Path) -> Any:
    """The safetensors file at `path`; ValueError naming it where it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); resume from another checkpoint") from error


def _replace(partial: Path, final: Path) -> None:
    """Rename the finished folder into place; one of the same step (another run came by here) steps
    aside first.
    """
    sync(partial)
    aside = final.with_name(f".{final.name}.old")
    if final.exists():
        final.rename(aside)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _tidy(output_dir: Path) -> None:
    """What a kill left: a half-written folder goes, one that was moved aside comes back."""
    for path in output_dir.glob(".checkpoint-*"):
        final = path.with_name(path.stem.removeprefix("."))
        if path.suffix == ".old" and not final.exists():
            path.rename(final)
        elif path.suffix in (".old", ".partial"):
            _remove(path)


def _remove(folder: Path) -> None:
    """NFS keeps files that a process of this machine has open: what cannot go is no reason to end a
    run, and stays under its hidden name until a later save tries again.
    """
    try:
        shutil.rmtree(folder)
    except OSError as error:
        print(f"Note: {folder} is not removed, the next save tries again: {error}", flush=True)
