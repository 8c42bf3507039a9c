"""Data that one rank of a machine prepares for the other ranks on it: the work is done once per
machine, not once per rank, and all ranks memory-map the same files.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_gkd.errors import DataError

Result = TypeVar("Result")
_PREFIX, _OUTCOME, _LOCK = "megatron_gkd-", "outcome.json", "rank-"


def alone(number: int) -> int:
    """The `world_max` of a single process."""
    return number


def made_once(
    make: Callable[[str], Any],
    read: Callable[[Any], Result],
    rank: int = 0,
    world_max: Callable[[int], int] = alone,
) -> Result:
    """`read(made)` on every rank. `made` is the result of `make(folder)` on one rank: the lowest of
    this machine with the same folder for temporary files (TMPDIR) as this rank; what is in a
    container of its own makes its own. It must fit into JSON, such as names of files in `folder`.

    The folder, which may hold gigabytes, is deleted afterwards, also by a signal where that raises
    (stop_requests.py); what `read` has opened or mapped stays readable. world_max: a number per
    rank -> the largest of them. Raises the error of `make`; the ranks that wait for it raise a
    DataError with the same text.

    Collectives: two calls of `world_max`, both before the work: ranks meet in a folder whose name
    holds a number that they have agreed on. The work may take longer than the timeout of a
    collective, so ranks wait for its end at a file lock, which is released even if the process that
    holds it dies.
    """
    _remove_leftovers()
    folder = _meeting_place(world_max(secrets.randbits(62)))
    own, lock, locks = f"{_LOCK}{rank:08d}", None, []
    try:
        lock = _Lock(folder, own)  # until this rank has made, or has read
        world_max(0)  # now every rank has its lock
        locks = sorted(name for name in os.listdir(folder) if name.startswith(_LOCK))
        if own == locks[0]:
            _make(make, folder)
            lock.release()
        _wait(folder, locks[0])
        return read(_outcome(folder))
    finally:
        if lock:
            lock.release()
        if not locks or own == locks[0]:
            for name in locks[1:]:
                _wait(folder, name)
            shutil.rmtree(folder, ignore_errors=True)


def _meeting_place(run: int) -> str:
    """A folder for temporary files that the ranks of a run find which can share it: those of other
    machines may have the same file system there, but locks only on some.
    """
    name = hashlib.blake2b(f"{run} {_machine()}".encode(), digest_size=8).hexdigest()
    folder = os.path.join(tempfile.gettempdir(), f"{_PREFIX}{name}")
    os.makedirs(folder, 0o700, exist_ok=True)
    return folder


def _remove_leftovers() -> None:
    """Meeting places of this machine whose processes are all dead, each by its number and its lock:
    in another container the number is another process's.
    """
    for folder in glob.glob(os.path.join(tempfile.gettempdir(), f"{_PREFIX}*")):
        locks = glob.glob(os.path.join(folder, f"{_LOCK}*"))
        if locks and all(map(_is_of_the_dead, locks)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_of_the_dead(lock: str) -> bool:
    try:
        with open(lock, "r+") as file:
            machine, pid = file.read().split()
            if machine != _machine() or os.path.exists(f"/proc/{pid}"):
                return False
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except (OSError, ValueError):
        return False


def _machine() -> str:
    """An id of the machine: file locks work between its processes."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return platform.node()


class _Lock:
    """An exclusive lock on a file of `folder`, held by this process but not by its forks."""

    def __init__(self, folder: str, name: str):
        self.file = open(os.path.join(folder, name), "w")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX)
        except OSError as error:
            self.file.close()
            raise DataError(
                f"{self.file.name} cannot be locked ({error}): TMPDIR=FOLDER names a local disk"
            ) from error
        self.file.write(f"{_machine()} {os.getpid()}")
        self.file.flush()

    def release(self) -> None:
        self.file.close()


def _wait(folder: str, name: str) -> None:
    """Returns when the lock is released, its holder is dead or the folder is deleted."""
    try:
        with open(os.path.join(folder, name)) as file:
            fcntl.lockf(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        pass


def _make(make: Callable[[str], Any], folder: str) -> None:
    try:
        _write(folder, {"made": make(folder)})
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            error = DataError(
                f"{folder}: {error}; the prepared data lie there, TMPDIR=FOLDER names a larger disk"
            )
        text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # the other ranks end even without a reason
            _write(folder, {"error": text})
        raise error


def _write(folder: str, outcome: dict) -> None:
    with open(os.path.join(folder, _OUTCOME), "w") as file:
        json.dump(outcome, file)


def _outcome(folder: str) -> Any:
    try:
        with open(os.path.join(folder, _OUTCOME)) as file:
            outcome = json.load(file)
    except (FileNotFoundError, ValueError):  # ValueError: the file is cut short
        raise DataError(
            f"the rank that prepares the data in {folder} ended before it was done"
        ) from None
    if "error" in outcome:
        raise DataError(outcome["error"])
    return outcome["made"]
