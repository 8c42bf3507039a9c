"""checkpoint_manifest.json: bytes and digest (formats/word_sum.py) of every file of a checkpoint,
written last and read first. All ranks form the digests together: in a save each of what it writes,
at a start each of an equal share of every file.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_gkd.errors import naming
from megatron_gkd.formats.job import sync
from megatron_gkd.formats.word_sum import WORD_BYTES, added, file_sum, word_sum
from megatron_gkd.links import check_link
from megatron_gkd.parallel import Parallel, agreed, from_rank_0, text_of_rank

MANIFEST = "checkpoint_manifest.json"
_LARGEST = 2**63 - 1  # bytes of a file


def sums_over_ranks(sums: Sequence[int], device: torch.device) -> list[int]:
    """The digests of files of which each rank has formed shares. Collectives: a sum of four numbers
    a file over the world.
    """
    # in pieces of 16 bits, which no number of ranks makes overflow
    pieces = [number >> shift & 0xFFFF for number in sums for shift in (0, 16, 32, 48)]
    found = torch.tensor(pieces, device=device)
    torch.distributed.all_reduce(found)
    pieces = found.tolist()
    return [
        added([piece << 16 * place for place, piece in enumerate(pieces[first : first + 4])])
        for first in range(0, len(pieces), 4)
    ]


def write_manifest(folder: Path, step: int, shares: Mapping[str, int]) -> None:
    """Of all files in `folder`. shares: digest of what all ranks have written into a file, by its
    path, behind its safetensors header. Reads these headers, and the other files, which are small.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        if name in shares:
            with open(path, "rb") as file:
                header = file.read(8)
                header += file.read(int.from_bytes(header, "little"))
            digest = added([shares[name], word_sum(header, 0)])
        else:
            digest = file_sum(path)
        files[name] = {"bytes": size, "digest": f"{digest:016x}"}
    path = folder / MANIFEST
    with naming(path):
        path.write_text(json.dumps({"step": step, "files": files}, indent=1) + "\n")
        sync(path)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """{"step": number, "files": {path: {"bytes", "digest"}}}; None where there is none (peft's own
    adapters, checkpoints of earlier versions). Raises ValueError naming one that is not whole.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
        step, files = found["step"], found["files"]
        whole = type(step) is int and all(
            type(of["bytes"]) is int
            and 0 <= of["bytes"] <= _LARGEST
            and 0 <= int(of["digest"], 16) < 2**64
            and not Path(name).is_absolute()
            and ".." not in Path(name).parts
            for name, of in files.items()
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: damaged, not a step and the bytes and digest of each file")
    return {"step": step, "files": files}


def _check_sizes(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise FileNotFoundError or ValueError naming a file that is missing or has another size."""
    for name, known in files.items():
        path = folder / name
        check_link(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, which {MANIFEST} lists")
        size = path.stat().st_size
        if size != known["bytes"]:
            raise ValueError(
                f"{path}: has {size:,} bytes, and {MANIFEST} says {known['bytes']:,}: damaged, or "
                "of another checkpoint"
            )


def share_of_files(
    folder: Path, files: Mapping[str, Mapping[str, Any]], rank: int, world_size: int
) -> list[int]:
    """Digest of this rank's share of each file: of N ranks each reads one N-th."""
    sums = []
    for name, known in files.items():
        words = -(-known["bytes"] // WORD_BYTES)
        start, stop = (WORD_BYTES * (words * at // world_size) for at in (rank, rank + 1))
        sums.append(file_sum(folder / name, start, stop))
    return sums


def what_is_wrong(
    folder: Path, names: Sequence[str] | None, parallel: Parallel, before: str = ""
) -> str:
    """Why the files of `folder`, or those of `names` that its manifest lists, are not what was
    written; "" where they are, or there is no manifest. The same on every rank. before: what rank 0
    has found wrong already.

    Raises OSError, on every rank, where another than rank 0 does not see what rank 0 sees: a folder
    that the machines do not share, or a file system that shows it late. Collectives: a broadcast of
    one number over the world; where something is wrong one of its message; where there is a
    manifest a maximum of one number and `sums_over_ranks`.
    """
    error, files = before, {}
    try:
        files = {} if before else _listed(folder, names)
        if parallel.rank == 0:
            _check_sizes(folder, files)
    except (OSError, ValueError) as caught:
        error = str(caught)
    number = -1 if error else len(files)
    (of_rank_0,) = from_rank_0([number], parallel.device)
    if of_rank_0 < 0:
        return text_of_rank(error, 0, parallel.device)
    if not of_rank_0:
        return ""
    where = f"rank {parallel.rank} (on {platform.node()}) does not see {folder} as rank 0 does: "
    with agreed(parallel.device, where):
        if error or number != of_rank_0:
            raise OSError(error or f"{MANIFEST} lists {number} files there, not {of_rank_0}")
        _check_sizes(folder, files)
        sums = share_of_files(folder, files, parallel.rank, parallel.world_size)
    found = sums_over_ranks(sums, parallel.device)
    for (name, known), digest in zip(files.items(), found, strict=True):
        if digest != int(known["digest"], 16):
            return (
                f"{folder / name}: its content has digest {digest:016x}, and {MANIFEST} says "
                f"{known['digest']}: damaged, changed, or of another checkpoint"
            )
    return ""


def _listed(folder: Path, names: Sequence[str] | None) -> dict[str, Any]:
    manifest = read_manifest(folder)
    files = manifest["files"] if manifest else {}
    return {name: of for name, of in files.items() if names is None or name in names}
