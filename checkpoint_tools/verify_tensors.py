"""Tensor by tensor: a checkpoint against its folder, a merged folder against base and adapter, an adapter's records."""

import json
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_tools.adapters import AdapterSum
from checkpoint_tools.manifest import NAME, describe_file, read_manifest
from checkpoint_tools.plans import plan_from
from checkpoint_tools.torch_dist_writer import HEADERS
from checkpoint_tools.travellers import list_travellers
from checkpoint_tools.units import row_blocks
from megatron_gkd.checkpoint import STATE
from megatron_gkd.lora.peft_folder import CONFIG
from megatron_gkd.model.folder import SafetensorsFolder
from megatron_gkd.model.megatron_folder import MegatronFolder
from megatron_gkd.model.table import places, stored_entries
from megatron_gkd.model.torch_dist import TRACKER, find_checkpoint


def compare_checkpoint(hf_model: Path, checkpoint: Path) -> list[str]:
    """What differs, a line each: names, dtypes, shapes, bits, padding that is not zero. Raises ValueError or
    FileNotFoundError when one is no such model. A checkpoint of another writer is compared in the decoder."""
    reference = plan_from(hf_model, None, "verify")
    folder = find_checkpoint(checkpoint)
    if folder is None:
        raise FileNotFoundError(f"--checkpoint {checkpoint}: neither {TRACKER} nor a torch_dist checkpoint is there")
    found = MegatronFolder(folder, reference.shape)
    complete = (folder.parent / HEADERS).is_dir()
    expected = {n: t for n, t in reference.tensors.items() if complete or n in places(reference.shape)}
    problems = compare_tensors(expected, found.tensors)
    for entry in stored_entries(reference.shape):
        key = found.prefix + entry.key
        if entry.is_padded and found.checkpoint.read(key, (), slice(entry.num_rows, None)).any():
            problems.append(f"{key}: the rows from {entry.num_rows} on, which pad the vocabulary, are not all zero")
    return problems


def compare_tensors(expected: dict, found: dict) -> list[str]:
    """Bit by bit, in blocks of rows."""
    problems = [f"{name}: missing" for name in expected if name not in found]
    problems += [f"{name}: unknown" for name in found if name not in expected]
    for name in [name for name in expected if name in found]:
        ours, theirs = found[name], expected[name]
        kinds = [(t.get_dtype(), t.get_shape()) for t in (ours, theirs)]
        if kinds[0] != kinds[1]:
            problems.append(f"{name}: {kinds[0][0]} {kinds[0][1]}, expected {kinds[1][0]} {kinds[1][1]}")
            continue
        for rows in row_blocks(theirs):
            problem = _first_difference(ours[(rows,)], theirs[(rows,)], rows.start)
            if problem:
                problems.append(f"{name}: {problem}")
                break
    return problems


def _first_difference(ours: Tensor, theirs: Tensor, first_row: int) -> str | None:
    bits = [
        tensor.reshape(len(tensor) if tensor.dim() else 1, -1).contiguous().view(torch.uint8)
        for tensor in (ours, theirs)
    ]
    if torch.equal(*bits):
        return None
    row = int((bits[0] != bits[1]).any(dim=1).nonzero()[0])
    return f"differs from row {first_row + row} on, there by up to {(ours.double() - theirs.double()).abs().max():.1e}"


def compare_merged(hf_model: Path, adapters: AdapterSum, merged: Path) -> list[str]:
    """A merged folder against base plus adapters, added again: bit by bit."""
    base, found = plan_from(hf_model, None, "verify"), SafetensorsFolder(merged)
    expected = {name: _Merged(tensor, name, adapters) for name, tensor in base.tensors.items()}
    return compare_tensors(expected, found.tensors)


class _Merged:
    """A tensor of the base with the adapters added as it is read."""

    def __init__(self, base, name: str, adapters: AdapterSum):
        self.base, self.name, self.adapters = base, name, adapters
        self.get_dtype, self.get_shape, self.num_bytes = base.get_dtype, base.get_shape, base.num_bytes

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        return self.adapters.change(self.name, index[0], self.base[index])


def check_adapter(adapter: Path) -> list[str]:
    """Rank and alpha against what the training run wrote down, files against the manifest, where there are any."""
    problems, config = [], json.loads((adapter / CONFIG).read_text())
    if (adapter / STATE).is_file():
        lora = json.loads((adapter / STATE).read_text())["lora"]
        for setting, trained in (("r", lora["rank"]), ("lora_alpha", lora["alpha"])):
            if config.get(setting) != trained:
                problems.append(
                    f"{adapter / CONFIG}: {setting} is {config.get(setting)}, the run trained with {trained}"
                )
    manifest = read_manifest(adapter)
    if manifest:
        problems += _changed_files(adapter, manifest.files)
    return problems


def compare_manifests(hf_model: Path, checkpoint: Path) -> list[str]:
    """Without reading a tensor: the checkpoint's manifest against the folder's, or its headers; the small files."""
    manifest, known = read_manifest(checkpoint), read_manifest(hf_model)
    if manifest is None:
        raise FileNotFoundError(f"{checkpoint}: no {NAME}; --quick compares manifests, leave it out")
    folder = SafetensorsFolder(hf_model)
    described = {
        name: {"dtype": t.dtype_name, "shape": list(t.size), "bytes": t.num_bytes} for name, t in folder.tensors.items()
    }
    problems = []
    for name in sorted(described.keys() | manifest.tensors.keys()):
        expected = dict(described.get(name, {}))
        if known and name in known.tensors:
            expected["sha256"] = known.tensors[name]["sha256"]
        found = manifest.tensors.get(name, {})
        different = [key for key in expected if expected[key] != found.get(key)] if expected and found else ["presence"]
        if different:
            problems.append(f"{name}: differs in {', '.join(different)}")
    names = list_travellers(hf_model, besides=folder.headers)
    problems += [f"{name}: not in the checkpoint" for name in names if name not in manifest.files]
    return problems + _changed_files(hf_model, {name: manifest.files[name] for name in names if name in manifest.files})


def _changed_files(folder: Path, files: dict[str, dict]) -> list[str]:
    changed = [name for name, known in files.items() if describe_file(folder / name) != known]
    return [f"{folder / name}: not the file that {NAME} lists" for name in changed]
