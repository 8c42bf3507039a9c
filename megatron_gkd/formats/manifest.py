"""What a converted folder holds besides its tensors: conversion_manifest.json, with size and
SHA-256 of every tensor and file, and the extra files (configs, tokenizer, processor, licence, ...),
which are copied.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_gkd.formats.safetensors_folder import INDEX
from megatron_gkd.formats.stored_tensor import LazyTensor, StoredTensor
from megatron_gkd.json_fields import TEXT, Form, check_fields, read_object

MANIFEST = "conversion_manifest.json"
# Names of pickles, and of what may hold one.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
_TENSOR = {"dtype": str, "shape": list, "bytes": int, "sha256": str}
_FILE = {"bytes": int, "sha256": str}


def _all_are(value: Any, fields: dict[str, type]) -> bool:
    """Whether `value` is an object of objects that have all these fields."""
    return isinstance(value, dict) and all(
        isinstance(of, dict) and all(type(of.get(name)) is kind for name, kind in fields.items())
        for of in value.values()
    )


_FORMS = {
    "made_by": TEXT,
    "tensors": Form("dtype, shape, bytes and sha256 by tensor", lambda of: _all_are(of, _TENSOR)),
    "files": Form("bytes and sha256 by file", lambda of: _all_are(of, _FILE)),
}
_NOT_COPIED = (".git", ".cache")  # a clone's and a download's own records, as large as the model


@dataclass
class Manifest:
    """`tensors`: name -> dtype, shape, bytes, sha256, as in a Hugging Face folder; `files`: path ->
    bytes, sha256.
    """

    made_by: str
    tensors: dict[str, dict] = field(default_factory=dict)
    files: dict[str, dict] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def check(self, folder: Path, tensors: Mapping[str, LazyTensor]) -> None:
        """Raise FileNotFoundError or ValueError naming a file or one of `tensors` that is missing
        from `folder`, unknown, or not as it was written. Reads the files, which are small, and no
        tensor.
        """
        for name, known in self.files.items():
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing: {MANIFEST} lists it")
            if describe_file(folder / name) != known:
                raise ValueError(
                    f"{folder / name}: not the file that {MANIFEST} lists "
                    "(changed or damaged since)"
                )
        for name in sorted(tensors.keys() ^ self.tensors.keys()):
            what = "is not in the folder" if name in self.tensors else f"is unknown to {MANIFEST}"
            raise ValueError(
                f"{folder}: tensor {name} {what} (the folder was changed after it was written)"
            )
        for name, tensor in tensors.items():
            found, known = (tensor.get_dtype(), tensor.get_shape()), self.tensors[name]
            if found != (known["dtype"], known["shape"]):
                raise ValueError(
                    f"{folder}: tensor {name} is {found[0]} {found[1]}, "
                    f"{MANIFEST} says {known['dtype']} {known['shape']}"
                )

    def check_tensor(self, name: str, sha256: str, where: Path) -> None:
        """Raise ValueError when the tensor's bytes are not those that were written."""
        known = self.tensors[name]
        if known["sha256"] != sha256:
            raise ValueError(
                f"{where}: tensor {name} has SHA-256 {sha256[:16]}..., {MANIFEST} says "
                f"{known['sha256'][:16]}...; the folder was changed or damaged after it was written"
            )


def read_manifest(folder: Path) -> Manifest | None:
    """None where the folder has none. Raises ValueError naming a file that is not one."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    found = read_object(path, "a manifest; remove it if it is not ours")
    stated = {"made_by": None} | {name: found[name] for name in _FORMS if name in found}
    check_fields(path, stated, _FORMS, "; remove the file if it is not ours")
    return Manifest(**stated)


def describe_file(path: Path) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def describe_tensors(
    tensors: Mapping[str, StoredTensor], hashes: Mapping[str, str]
) -> dict[str, dict]:
    """`Manifest.tensors` of these tensors, in their order."""
    return {
        name: {
            "dtype": tensor.dtype_name,
            "shape": list(tensor.size),
            "bytes": tensor.num_bytes,
            "sha256": hashes[name],
        }
        for name, tensor in tensors.items()
    }


def list_extra_files(folder: Path, besides: Iterable[str]) -> list[str]:
    """Paths in `folder`, sorted: all but the index, the manifest and the names (weights, folders)
    in `besides`.

    Raises ValueError naming a pickle: such a file can run any code when it is opened, and none is
    needed.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if relative.parts[0] in {*_NOT_COPIED, *besides} or not path.is_file():
            continue
        if path.suffix.lower() in PICKLES:
            raise ValueError(
                f"{path} is a pickle, which is neither read nor copied: move it out of the folder"
            )
        if relative.parts not in ((INDEX,), (MANIFEST,)):
            found.append(str(relative))
    return found


def copy_extra_files(
    source: Path, names: list[str], target: Path, manifest: Manifest, known: Manifest | None
) -> None:
    """Copy the files and write them into `manifest`. Raises ValueError when one is not what `known`
    says.
    """
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
        manifest.files[name] = describe_file(target / name)
        expected = known.files.get(name) if known else None
        if expected and expected != manifest.files[name]:
            raise ValueError(
                f"{source / name}: not the file that {MANIFEST} lists (changed or damaged since)"
            )


def total_bytes(folder: Path, names: list[str]) -> int:
    return sum((folder / name).stat().st_size for name in names)
