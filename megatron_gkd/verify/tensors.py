"""Tensor by tensor: a checkpoint against its folder, a merged folder against base and adapter, an
adapter's records.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_gkd.checkpoint_files import STATE
from megatron_gkd.families import tensor_prefixes
from megatron_gkd.formats.manifest import (
    MANIFEST,
    describe_file,
    list_extra_files,
    read_manifest,
)
from megatron_gkd.formats.megatron_folder import MegatronFolder
from megatron_gkd.formats.safetensors_folder import SafetensorsFolder
from megatron_gkd.formats.sources import is_converted, open_source
from megatron_gkd.formats.stored_tensor import LazyTensor, row_blocks
from megatron_gkd.formats.torch_dist import TRACKER, TorchDist, find_torch_dist
from megatron_gkd.formats.weight_map import checkpoint_slices, stored_entries
from megatron_gkd.lora.adapter_sum import AdapterSum, open_adapters
from megatron_gkd.lora.peft_config import CONFIG, TENSORS, saved_modules
from megatron_gkd.lora.peft_writer import read_record
from megatron_gkd.lora_targets import HEAD, LINEARS
from megatron_gkd.model.args import read_model_args
from megatron_gkd.model.tensor_slice import TensorSlice

_MOST_LINES = 20  # printed of what differs
_BLOCKS = re.compile(r"^(model\.)?(layers\.\d+\.)?(.*experts\.)?(?(3)\d+\.)")


@dataclass(frozen=True)
class Folders:
    """What is compared: the reference, and the folders that should hold the same model, an adapter
    of it, and it with the adapter added.
    """

    hf_model: Path
    checkpoint: Path | None = None
    adapter: Path | None = None
    merged: Path | None = None


@dataclass
class Comparison:
    """What differs, a line each, and for each kind of tensor how many there are and the largest
    difference.
    """

    problems: list[str] = field(default_factory=list)
    kinds: dict[str, tuple[int, float]] = field(default_factory=dict)

    def count(self, kind: str, difference: float) -> None:
        number, largest = self.kinds.get(kind, (0, 0.0))
        self.kinds[kind] = (number + 1, max(largest, difference))

    def lines(self) -> list[str]:
        return [
            f"{kind:28} {number:6} tensors, largest difference {largest:.1e}"
            for kind, (number, largest) in self.kinds.items()
        ]


def kind_of(name: str) -> str:
    """self_attn.q_proj, mlp.experts.up_proj, ... of the decoder's tensors; of the others the part:
    talker, visual, ...
    """
    inside = name
    for prefix in tensor_prefixes():
        inside = inside.removeprefix(prefix)
    if not inside.startswith(("model.", "lm_head.")):
        return inside.split(".")[0]
    return _BLOCKS.sub(r"\3", inside).removesuffix(".weight")


def compare_checkpoint(hf_model: Path, checkpoint: Path, tolerance: float) -> Comparison:
    """Names, dtypes, shapes, bits (or values to a tolerance), padding that is not zero. Raises
    ValueError or FileNotFoundError when one is no such model. A checkpoint of another writer is
    compared in the decoder.
    """
    reference = open_source(hf_model, None, "verify")
    folder = find_torch_dist(checkpoint)
    if folder is None:
        raise FileNotFoundError(
            f"--checkpoint {checkpoint}: neither {TRACKER} nor a torch_dist checkpoint is there"
        )
    found = MegatronFolder(folder, reference.model_args)
    complete = is_converted(folder)
    decoder = checkpoint_slices(reference.model_args)
    expected = {n: t for n, t in reference.tensors.items() if complete or n in decoder}
    comparison = compare_tensors(expected, found.tensors, tolerance)
    for entry in stored_entries(reference.model_args).values():
        padding = TensorSlice(found.prefix + entry.key, (slice(entry.num_rows, None),))
        if entry.is_padded and found.checkpoint.read(padding).any():
            comparison.problems.append(
                f"{padding.name}: the rows from {entry.num_rows} on, which pad the vocabulary, "
                "are not all zero"
            )
    return comparison


def compare_tensors(
    expected: Mapping[str, LazyTensor], found: Mapping[str, LazyTensor], tolerance: float = 0.0
) -> Comparison:
    """In blocks of rows: bit by bit, or with a tolerance in fp32 whatever the two types are."""
    comparison = Comparison([f"{name}: missing" for name in expected if name not in found])
    comparison.problems += [f"{name}: unknown" for name in found if name not in expected]
    for name in [name for name in expected if name in found]:
        ours, theirs = found[name], expected[name]
        kinds = [(t.get_dtype(), t.get_shape()) for t in (ours, theirs)]
        if kinds[0][1] != kinds[1][1] or kinds[0][0] != kinds[1][0] and not tolerance:
            comparison.problems.append(
                f"{name}: {kinds[0][0]} {kinds[0][1]}, expected {kinds[1][0]} {kinds[1][1]}"
            )
            continue
        first_row, largest = None, 0.0
        for rows in row_blocks(theirs):
            row, difference = _first_difference(ours[(rows,)], theirs[(rows,)], tolerance)
            largest = max(largest, difference)
            if first_row is None and row is not None:
                first_row = rows.start + row
        comparison.count(kind_of(name), largest)
        if first_row is not None:
            comparison.problems.append(
                f"{name}: differs from row {first_row} on, by up to {largest:.1e}"
            )
    return comparison


def _first_difference(ours: Tensor, theirs: Tensor, tolerance: float) -> tuple[int | None, float]:
    """(the first row that differs by more than allowed, the largest difference: inf where one is
    not a number).
    """
    ours, theirs = (
        tensor.reshape(len(tensor) if tensor.dim() else 1, -1).contiguous()
        for tensor in (ours, theirs)
    )
    if ours.dtype == theirs.dtype and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
        return None, 0.0
    difference = (ours.float() - theirs.float()).abs().nan_to_num(nan=math.inf)
    wrong = (
        difference > tolerance if tolerance else ours.view(torch.uint8) != theirs.view(torch.uint8)
    )
    rows = wrong.any(dim=1).nonzero()
    return int(rows[0]) if len(rows) else None, difference.max().item()


def compare_merged(
    hf_model: Path, adapters: AdapterSum, merged: Path, tolerance: float
) -> Comparison:
    """A merged folder against base plus adapters, added again."""
    base, found = open_source(hf_model, None, "verify"), SafetensorsFolder(merged)
    expected = {name: _Merged(tensor, name, adapters) for name, tensor in base.tensors.items()}
    return compare_tensors(expected, found.tensors, tolerance)


class _Merged:
    """A tensor of the base with the adapters added as it is read: a `LazyTensor`."""

    def __init__(self, base: LazyTensor, name: str, adapters: AdapterSum):
        self.base, self.name, self.adapters = base, name, adapters
        self.get_dtype, self.get_shape = base.get_dtype, base.get_shape
        self.num_bytes = base.num_bytes

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        return self.adapters.change(self.name, index[0], self.base[index])


def check_adapter(adapter: Path) -> Comparison | None:
    """Rank, alpha and linears against what was written down when the weights were (beside them, and
    in their file), files against the manifest. None where there is nothing of the kind.
    """
    config = json.loads((adapter / CONFIG).read_text())
    problems: list[str] = []
    records = {TENSORS: read_record(adapter)}
    if (adapter / STATE).is_file():
        records[STATE] = json.loads((adapter / STATE).read_text())["lora"]
    for file, lora in records.items():
        if not lora:
            continue
        named = config.get("target_modules") or []
        of_decoder = [n for n in named if n in (*LINEARS, HEAD) or n.startswith("layers.")]
        trained = saved_modules(lora["targets"], [n for n in named if n not in of_decoder])
        expected = [n for n in trained["target_modules"] if n in of_decoder or n not in named]
        in_order = set(of_decoder) == set(expected)
        found = config | {"targets": expected if in_order else of_decoder}
        found["use_rslora"] = bool(config.get("use_rslora"))
        for setting, value in {
            "r": lora["rank"],
            "lora_alpha": lora["alpha"],
            "use_rslora": lora.get("use_rslora", False),
            "targets": expected,
            "layers_to_transform": trained.get("layers_to_transform"),
        }.items():
            if found.get(setting) != value:
                problems.append(
                    f"{adapter / CONFIG}: {setting} is {found.get(setting)}, "
                    f"trained with {value} ({file})"
                )
    manifest = read_manifest(adapter)
    if manifest:
        problems += _changed_files(adapter, manifest.files)
    return Comparison(problems) if manifest or any(records.values()) else None


def compare_manifests(hf_model: Path, checkpoint: Path) -> Comparison:
    """Without reading a tensor: the checkpoint's manifest against the folder's, or its headers; the
    small files; that the files of the tensors are there in their sizes.
    """
    folder = find_torch_dist(checkpoint)
    if folder is None:
        raise FileNotFoundError(
            f"--checkpoint {checkpoint}: neither {TRACKER} nor a torch_dist checkpoint is there"
        )
    checkpoint = folder.parent
    manifest, known = read_manifest(checkpoint), read_manifest(hf_model)
    if manifest is None:
        raise FileNotFoundError(
            f"{checkpoint}: no {MANIFEST}; --quick compares manifests, leave it out"
        )
    TorchDist(folder)  # raises where a file is missing or too short
    reference = SafetensorsFolder(hf_model)
    described = {
        name: {"dtype": t.dtype_name, "shape": list(t.size), "bytes": t.num_bytes}
        for name, t in reference.tensors.items()
    }
    problems = []
    for name in sorted(described.keys() | manifest.tensors.keys()):
        expected = dict(described.get(name, {}))
        if known and name in known.tensors:
            expected["sha256"] = known.tensors[name]["sha256"]
        found = manifest.tensors.get(name, {})
        different = (
            [key for key in expected if expected[key] != found.get(key)]
            if expected and found
            else ["presence"]
        )
        if different:
            problems.append(f"{name}: differs in {', '.join(different)}")
    names = list_extra_files(hf_model, besides=reference.headers)
    problems += [f"{name}: not in the checkpoint" for name in names if name not in manifest.files]
    problems += _changed_files(
        hf_model, {name: manifest.files[name] for name in names if name in manifest.files}
    )
    return Comparison(problems + _changed_files(checkpoint, manifest.files))


def _changed_files(folder: Path, files: dict[str, dict]) -> list[str]:
    problems = []
    for name, known in files.items():
        if not (folder / name).is_file():
            problems.append(f"{folder / name}: missing, {MANIFEST} lists it")
        elif describe_file(folder / name) != known:
            problems.append(f"{folder / name}: not the file that {MANIFEST} lists")
    return problems


def report_tensors(folders: Folders, tolerance: float, quick: bool) -> bool:
    """The part that needs no model. Prints; returns whether all is as it should be. Raises
    ValueError where --quick has nothing to compare.
    """
    hf_model, checkpoint, adapter = folders.hf_model, folders.checkpoint, folders.adapter
    bits = f"to {tolerance:g}" if tolerance else "bit by bit"
    found = []
    if checkpoint:
        what = f"{checkpoint} to {hf_model}"
        if quick:
            find = lambda: compare_manifests(hf_model, checkpoint)
            found.append(_report(f"{what}, manifests", find))
        else:
            find = lambda: compare_checkpoint(hf_model, checkpoint, tolerance)
            found.append(_report(f"{what}, tensors, {bits}", find))
    if adapter:
        found.append(_report(f"{adapter}, its records", lambda: check_adapter(adapter)))
    if folders.merged:
        merged = folders.merged
        adapters = open_adapters([str(adapter)], [], read_model_args(hf_model))
        find = lambda: compare_merged(hf_model, adapters, merged, tolerance)
        found.append(_report(f"{merged} to base + adapter, tensors, {bits}", find))
    if quick and all(passed is None for passed in found):
        raise ValueError("--quick: there is nothing to compare, the adapter has no records")
    return all(passed is not False for passed in found)


def _report(what: str, compare_both: Callable[[], Comparison | None]) -> bool | None:
    """Print the outcome and what differs; None where there was nothing to compare."""
    try:
        comparison = compare_both()
    except (ValueError, FileNotFoundError) as error:
        comparison = Comparison([str(error)])
    if comparison is None:
        print(f"{what}: no records to compare with")
        return None
    problems = comparison.problems
    print(f"{what}: {f'{len(problems)} DIFFER' if problems else 'ok'}")
    for problem in problems[:_MOST_LINES]:
        print(f"  {problem}")
    if len(problems) > _MOST_LINES:
        print(f"  and {len(problems) - _MOST_LINES} more")
    for line in comparison.lines():
        print(f"    {line}")
    return not problems
