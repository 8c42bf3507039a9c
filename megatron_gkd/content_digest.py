"""Digests that stand for files and for this package's code."""

import hashlib
import os
from functools import cache
from pathlib import Path

import megatron_gkd

_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 256  # of a folder's weights; each file has some
_LEAST_SAMPLES = 4
_LARGEST_HEADER = 100_000_000  # of a safetensors file; the library refuses a longer one
_WEIGHTS = (".safetensors", ".distcp")
_SETTINGS = ("config.json", "adapter_config.json")  # of what the weights compute
_DIGITS = 16


@cache
def code_digest() -> str:
    """Of all Python files of this package."""
    found, root = hashlib.blake2b(digest_size=8), Path(megatron_gkd.__file__).parent
    for path in sorted(root.rglob("*.py")):
        found.update(str(path.relative_to(root)).encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def weights_digest(folder: str) -> str:
    """Of the weights in a folder, a Hugging Face model, a Megatron checkpoint or an adapter: names
    and sizes of the files, what safetensors files say of their tensors, a sample of all bytes,
    whose places depend on the sizes alone, and the files that say what is computed with them
    (rotary base, experts a token, alpha). The error of the system where they cannot be read, which
    is a value to compare as well.
    """
    try:
        files = sorted(Path(folder).rglob("*"))
        paths = [path for path in files if path.suffix in _WEIGHTS]
        found = hashlib.blake2b(digest_size=_DIGITS // 2)
        for path in paths:
            found.update(str(path.relative_to(folder)).encode())
            _add_file(found, path, max(_NUM_SAMPLES // len(paths), _LEAST_SAMPLES))
        for path in files:
            if path.name in _SETTINGS:
                found.update(str(path.relative_to(folder)).encode())
                found.update(path.read_bytes())
        return found.hexdigest() if paths else f"no weights in {folder}"
    except OSError as error:
        return str(error)


def _add_file(found: "hashlib.blake2b", path: Path, num_samples: int) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        found.update(size.to_bytes(8, "little"))
        if path.suffix == ".safetensors":
            header = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            found.update(os.pread(descriptor, min(header, size, _LARGEST_HEADER), 8))
        last = max(size - _SAMPLE_BYTES, 0)
        for number in range(num_samples):
            found.update(os.pread(descriptor, _SAMPLE_BYTES, last * number // (num_samples - 1)))
    finally:
        os.close(descriptor)
