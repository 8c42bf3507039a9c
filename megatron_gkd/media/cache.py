"""Features of media on disk (`--media_cache`): one file per medium, shared by ranks, workers and
runs.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_gkd.formats.word_sum import word_sum
from megatron_gkd.media.medium import Medium, Reference

# Changes where the same file gives other features, or an entry has another form.
_VERSION = 3
UNUSABLE = (OSError, SafetensorError)  # of a cache that cannot be written


def cache_path(folder: str, reference: Reference, processor_digest: str) -> Path:
    """The cache file of a medium: its name is a hash of the processor files and the medium's bytes,
    or its path, size and time of change. Raises OSError if there is no such file.
    """
    kind = "track" if reference.is_track else reference.kind
    digest = hashlib.sha256(f"{_VERSION} {kind} {processor_digest}".encode())
    if reference.data is None:
        assert reference.path is not None
        status = os.stat(reference.path)
        digest.update(
            f"{os.path.realpath(reference.path)} {status.st_size} {status.st_mtime_ns}".encode()
        )
    else:
        digest.update(reference.data)
    name = digest.hexdigest()
    return Path(folder, name[:2], f"{name}.safetensors")


def read_cached(path: Path, kind: str) -> Medium | None:
    """The cached medium; None if there is none, its file is damaged or cannot be read, or is not
    what `write_cached` wrote.
    """
    try:
        with safe_open(path, framework="pt") as file:
            notes, features = file.metadata() or {}, file.get_tensor("features")
    except UNUSABLE:
        return None
    if features.dtype != torch.float32 or notes.pop("digest", None) != _digest(features, notes):
        return None
    grid_thw = tuple(json.loads(notes["grid_thw"])) or None
    return Medium(
        kind, features, grid_thw, int(notes["num_tokens"]), float(notes["seconds_per_grid"])
    )


def write_cached(path: Path, medium: Medium) -> None:
    """Writes a temporary file and renames it: another rank or worker finds a whole file or none.
    Raises one of UNUSABLE, having left nothing, if that is not possible.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = {
        "grid_thw": json.dumps(medium.grid_thw or []),
        "num_tokens": str(medium.num_tokens),
        "seconds_per_grid": repr(medium.seconds_per_grid),
    }
    features = medium.features.contiguous()
    notes["digest"] = _digest(features, notes)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(descriptor)
    try:
        save_file({"features": features}, temporary, metadata=notes)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_writable(folder: str) -> None:
    """Raises OSError if nothing can be written to the cache."""
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1))


def _digest(features: Tensor, notes: dict[str, str]) -> str:
    """Of the features' shape and values (float32, contiguous) and of the notes beside them."""
    content = features.numpy().reshape(-1).view(np.uint8).data
    parts = [list(features.shape), word_sum(content, 0), sorted(notes.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
