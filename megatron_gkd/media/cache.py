"""Features of media on disk (`--media_cache`): one file per medium, shared by ranks, workers and
runs.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_gkd.media.medium import Medium, Reference

_VERSION = 2  # changes where the same file gives other features


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
    """The cached medium; None if there is none or its file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            notes, features = file.metadata(), file.get_tensor("features")
    except (FileNotFoundError, SafetensorError):
        return None
    grid_thw = tuple(json.loads(notes["grid_thw"])) or None
    return Medium(
        kind, features, grid_thw, int(notes["num_tokens"]), float(notes["seconds_per_grid"])
    )


def write_cached(path: Path, medium: Medium) -> None:
    """Writes a temporary file and renames it: another rank or worker finds a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = {
        "grid_thw": json.dumps(medium.grid_thw or []),
        "num_tokens": str(medium.num_tokens),
        "seconds_per_grid": repr(medium.seconds_per_grid),
    }
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(descriptor)
    try:
        save_file({"features": medium.features.contiguous()}, temporary, metadata=notes)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
