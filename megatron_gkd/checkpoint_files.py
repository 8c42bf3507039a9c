"""The files of a checkpoint, written by all ranks at once.

Rank 0 makes them in their final size, with their headers; then every rank writes to its own bytes:
of what several ranks hold equal copies of, each an equal share, so that no rank and no machine
writes more than the others. No tensor travels between ranks, and none is joined.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from megatron_gkd.errors import naming
from megatron_gkd.families import Family
from megatron_gkd.formats.job import sync
from megatron_gkd.formats.safetensors_file import (
    FLOAT32_BYTES,
    Edge,
    Run,
    Sizes,
    check_edges,
    first_bytes,
    make_header,
    total_bytes,
    write_header,
    write_runs,
)
from megatron_gkd.lora.adapter import (
    adapter_slices,
    adapter_tensors,
    applied,
    tower_loras,
    tower_tensors,
)
from megatron_gkd.lora.peft_config import CONFIG, TENSORS, peft_config, saved_targets
from megatron_gkd.lora.peft_writer import adapter_header, stored_names, stored_sizes
from megatron_gkd.lora.slots import STUDENT, TEACHER
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.tensor_slice import ParameterSlice
from megatron_gkd.optimizer import MOMENTS, Optimizer
from megatron_gkd.parallel import Parallel

OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
TEACHER_FOLDER = "teacher"


class Written(NamedTuple):
    """What a rank has written into one file: bytes, some of them to look at again, and their share
    of the file's digest.
    """

    num_bytes: int
    edges: list[Edge]
    digest: int


def create_files(
    folder: Path,
    model: nn.Module,
    model_args: ModelArgs,
    optimizer: Optimizer | None,
    state: dict[str, Any],
    *,
    alpha: float,
    use_rslora: bool,
    dropout: float,
    base_model: str,
    teacher: bool,
) -> list[int]:
    """On rank 0: all files of a checkpoint in `folder`, whole but for the numbers of the tensors
    that are trained. Returns what other ranks must know of them, `places`: bytes of the headers of
    adapter and optimizer, and LoRA parameters of each tower.
    """
    rank, _, targets = applied(model)
    towers, of_towers = list(tower_loras(model)), tower_tensors(model, model_args)
    lora: dict[str, Any] = {"rank": rank, "alpha": alpha, "targets": targets}
    lora["use_rslora"] = use_rslora
    config = peft_config(
        model_args.family, **lora, dropout=dropout, base_model=base_model, towers=towers
    )
    sizes = _adapter_sizes(model_args, rank, targets, of_towers)
    header, of_optimizer = adapter_header(sizes, **lora), b""
    for of_adapter in [folder, folder / TEACHER_FOLDER] if teacher else [folder]:
        of_adapter.mkdir(exist_ok=True)
        write_header(of_adapter / TENSORS, header, total_bytes(sizes))
        _save_json(config, of_adapter / CONFIG)
        sync(of_adapter)
    if optimizer is not None:
        sizes = _optimizer_sizes(model_args, rank, targets, of_towers)
        of_optimizer = make_header(sizes, {"format": "pt"})
        write_header(folder / OPTIMIZER, of_optimizer, total_bytes(sizes))
        full_state = state | {
            "num_updates": optimizer.num_updates,
            "loss_scale": optimizer.scaler_state(),
            "teacher": teacher,
            "lora": lora | {"dropout": dropout, "towers": bool(towers)},
        }
        _save_json(full_state, folder / STATE)
    of_each = [
        total_bytes({name: of_towers[name] for name in of_towers if name.startswith(prefix)})
        for prefix in _tower_prefixes(model_args)
    ]
    return [len(header), len(of_optimizer), *(number // FLOAT32_BYTES for number in of_each)]


def tensor_files(optimizer: bool, teacher: bool) -> list[str]:
    """The files that all ranks write, by their path in a checkpoint."""
    of_teacher = [f"{TEACHER_FOLDER}/{TENSORS}"] if teacher else []
    return [TENSORS, *of_teacher, *([OPTIMIZER] if optimizer else [])]


def num_places(model_args: ModelArgs) -> int:
    """How many numbers `create_files` returns."""
    return 2 + len(model_args.family.towers)


def write_share(
    folder: Path,
    places: Sequence[int],
    model: nn.Module,
    model_args: ModelArgs,
    parallel: Parallel,
    optimizer: Optimizer | None,
    *,
    teacher: bool,
) -> dict[Path, Written]:
    """Write this rank's share of every file, with `places` from rank 0's `create_files`. A file of
    which it has none is not opened. Host memory: BLOCK_BYTES; no collectives.
    """
    rank, _, targets = applied(model)
    header, of_optimizer, *tower_parameters = places
    # later stages have no towers; by name the tensors of one lie together, as one block of numbers
    of_towers: Sizes = tower_tensors(model, model_args) or {
        prefix: (number,)
        for prefix, number in zip(_tower_prefixes(model_args), tower_parameters)
        if number
    }
    stored = _adapter_sizes(model_args, rank, targets, of_towers)
    in_adapter = first_bytes(stored)
    moments = {} if optimizer is None else optimizer.moments()
    of_moments = _optimizer_sizes(model_args, rank, targets, of_towers)
    in_optimizer = {} if optimizer is None else first_bytes(of_moments)
    runs: dict[Path, list[Run]] = defaultdict(list)
    for slot in (STUDENT, TEACHER) if teacher else (STUDENT,):
        path = folder / TENSORS if slot == STUDENT else folder / TEACHER_FOLDER / TENSORS
        kinds = MOMENTS if optimizer is not None and slot == STUDENT else ()
        parts = adapter_slices(model, model_args, parallel, slot)
        for part, rows in shares(parts, model_args.family, len(kinds)):
            for name in stored_names(part.stored.name, model_args.family):
                start = 8 + header + in_adapter[name]
                runs[path] += _runs(part, rows, part.view, start, stored[name])
            for kind in kinds:
                name = f"{part.stored.name}.{kind}"
                values = moments[part.parameter][kind][part.where]
                start = 8 + of_optimizer + in_optimizer[name]
                runs[folder / OPTIMIZER] += _runs(part, rows, values, start, of_moments[name])
    return {path: Written(*write_runs(path, found)) for path, found in runs.items()}


def check_written(written: dict[Path, Written]) -> None:
    """Once all ranks have written: raise OSError where what this one wrote is not there. Reads a
    few bytes.
    """
    for path, (_, edges, _) in written.items():
        check_edges(path, edges)


def shares(
    parts: Iterable[ParameterSlice], family: Family, num_moments: int
) -> Iterator[tuple[ParameterSlice, slice]]:
    """What this rank writes of the slices that it holds: some with the rows of them. Where there
    are N equal copies, copy k writes the k-th of N parts of these slices in the order of their
    names: of equal bytes, but for one row. num_moments: that are written for each number.
    """
    by_copies = sorted(parts, key=lambda part: (part.copies, part.stored.name))
    for copies, group in groupby(by_copies, key=lambda part: part.copies):
        held = []
        for part in group:
            num_rows, num_columns = part.size
            times = len(stored_names(part.stored.name, family)) + num_moments
            held.append((part, num_rows, num_columns * times))
        total = sum(num_rows * of_row for _, num_rows, of_row in held)
        start, stop = (total * (copies.number + more) // copies.total for more in (0, 1))
        for part, num_rows, of_row in held:
            # rows that begin in start to stop, counted from this slice's first
            first, last = (min(max(-(-at // of_row), 0), num_rows) for at in (start, stop))
            if first < last:
                yield part, slice(first, last)
            start -= num_rows * of_row
            stop -= num_rows * of_row


def _runs(
    part: ParameterSlice, rows: slice, values: Tensor, start: int, size: Sequence[int]
) -> Iterator[Run]:
    """`rows` of `values`, which belong to the slice `part` of a tensor of shape `size` at byte
    `start`.
    """
    of_rows, of_columns = part.stored.slices
    num_columns = size[1]
    first = (of_rows.start or 0) + rows.start
    offset = first * num_columns + (of_columns.start or 0)
    block = values.detach()[rows]
    lines = [block] if block.shape[1] == num_columns else block
    for number, line in enumerate(lines):
        yield Run(start + FLOAT32_BYTES * (offset + number * num_columns), line.reshape(-1))


def _adapter_sizes(model_args: ModelArgs, rank: int, targets: list[str], of_towers: Sizes) -> Sizes:
    """Of TENSORS: also what `saved_targets` has and training has not, which stays zero."""
    sizes = {**adapter_tensors(model_args, rank, saved_targets(targets)), **of_towers}
    return stored_sizes(sizes, model_args.family)


def _optimizer_sizes(
    model_args: ModelArgs, rank: int, targets: list[str], of_towers: Sizes
) -> Sizes:
    sizes = {**adapter_tensors(model_args, rank, targets), **of_towers}
    return {f"{name}.{kind}": size for name, size in sizes.items() for kind in MOMENTS}


def _tower_prefixes(model_args: ModelArgs) -> list[str]:
    """What the names of each tower's tensors in an adapter begin with."""
    family = model_args.family
    return [f"{family.adapter_root}{tower.name}." for tower in family.towers]


def _save_json(content: dict, path: Path) -> None:
    with naming(path):
        path.write_text(json.dumps(content, indent=2) + "\n")
        sync(path)
