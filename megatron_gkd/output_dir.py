"""The output folder at the start of a run: one for all ranks, of this run alone, with room for its
checkpoints, and without what dead processes have left there.
"""

import os
import platform
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from megatron_gkd.formats.safetensors_file import open_to_write
from megatron_gkd.output_lock import OutputLock
from megatron_gkd.parallel import Parallel, agreed, from_rank_0

_SPARE_BYTES = 16 << 20  # metrics, trackers, headers
_TEMPORARY = re.compile(r"\.(\d+)\.(now\.)?tmp$")


def check_output_dir(
    output_dir: str, parallel: Parallel, lock: OutputLock, take_over: bool
) -> None:
    """Raise OSError, on every rank, unless rank 0 can make files in --output_dir and all others can
    write to them, as in a save: before hours go into the steps up to the first. Rank 0 takes the
    `lock` of the folder, see `OutputLock.acquire`.

    Collectives: two maxima and a broadcast of one number over the world.
    """
    device, number, made = parallel.device, secrets.randbits(62), None
    try:
        with agreed(device, f"--output_dir {output_dir}, rank 0: "):
            if parallel.rank == 0:
                if os.path.exists(output_dir) and not os.path.isdir(output_dir):
                    raise NotADirectoryError("it is a file, choose another name")
                os.makedirs(output_dir, exist_ok=True)
                lock.acquire(take_over)
                remove_leftovers(output_dir)
                made = _shown_file(output_dir, number)
                made.touch(exist_ok=False)
        (number,) = from_rank_0([number], device)
        where = f"--output_dir {output_dir} must be one folder for all ranks: rank {parallel.rank} "
        where += f"(on {platform.node()}) cannot write to what rank 0 has made there: "
        with agreed(device, where):
            if parallel.rank != 0:
                os.close(open_to_write(_shown_file(output_dir, number)))
    finally:
        if made is not None:
            made.unlink(missing_ok=True)


def _shown_file(output_dir: str, number: int) -> Path:
    return Path(output_dir, f".shown-{number:x}")


def check_space(output_dir: str, checkpoint_bytes: int, num_new: int, save_total_limit: int) -> str:
    """A line where the checkpoints that a run will hold at once, or the first of them, may not fit
    on the disk; empty where they do. Raises OSError where not even the first does.

    num_new: checkpoints that the run will write; it holds save_total_limit and the one in the
    making, and what of them is there already (`checkpoint-*`) takes no more room.
    """
    there = sum(path.is_dir() for path in Path(output_dir).glob("checkpoint-*"))
    free = shutil.disk_usage(output_dir).free - _SPARE_BYTES
    at_once = min(num_new, max(save_total_limit + 1 - there, 1))
    needed = at_once * checkpoint_bytes
    if not num_new or needed <= free:
        return ""
    room = (
        f"--output_dir {output_dir}: a checkpoint has {checkpoint_bytes / 1e9:.2f} GB, "
        f"{at_once} at once (--save_total_limit {save_total_limit} and one in the making) "
        f"{needed / 1e9:.2f} GB, and {max(free, 0) / 1e9:.2f} GB are free"
    )
    if checkpoint_bytes > free:
        raise OSError(f"{room}: make room, choose another disk, or --save_only_model true")
    return f"Warning: {room}; make room before the disk is full"


def remove_leftovers(output_dir: str) -> None:
    """Temporary files of processes that are dead. Only for the run that holds the folder's lock."""
    for path in Path(output_dir).iterdir():
        match = _TEMPORARY.search(path.name)
        if path.name.startswith(".shown-") or (match and not _lives(int(match[1]))):
            with suppress(OSError):
                path.unlink()


def _lives(pid: int) -> bool:
    """Whether this machine has a process of this number; a leftover of another machine stays where
    one has, until a later start.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
