"""Data that one rank of a machine prepares for the other ranks on it: the work is done once per
machine, not once per rank, and all ranks memory-map the same files.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from megatron_gkd.errors import DataError

Result = TypeVar("Result")
_OUTCOME, _MAKING = "outcome.json", "making"


def alone(value: Any) -> list:
    """The `gather` of a single process."""
    return [value]


def made_once(
    make: Callable[[str], Any], read: Callable[[Any], Result], gather: Callable[[Any], list] = alone
) -> Result:
    """`read(made)` on every rank. `made` is the result of `make(folder)` on one rank: the lowest of
    this machine whose temporary folder (in TMPDIR) this rank can see. It must fit into JSON, such
    as names of files in `folder`.

    The folder is deleted afterwards; what `read` has opened or mapped stays readable. gather: one
    value per rank -> the list of all, in rank order. Raises the error of `make`; the ranks that
    wait for it raise a DataError with the same text.

    Collectives: two calls of `gather`, both before the work. The work may take longer than the
    timeout of a collective, so ranks wait for its end at a file lock, which is released even if
    the process that holds it dies.
    """
    with _sigterm_raises():
        own, locks, readers = tempfile.mkdtemp(prefix="megatron_gkd-"), [], []
        try:
            locks.append(_Lock(own, _MAKING))
            folders = gather([_machine(), own])
            maker = next(
                folder
                for machine, folder in folders
                if machine == _machine() and os.path.isdir(folder)
            )
            locks.append(_Lock(maker, os.path.basename(own)))  # until this rank has read
            makers = gather(maker)
            readers = [
                os.path.basename(folder)
                for (_, folder), chosen in zip(folders, makers)
                if chosen == own
            ]
            if readers:
                _make(make, own)
            locks[0].release()
            _wait(maker, _MAKING)
            return read(_outcome(maker))
        finally:
            for lock in locks:
                lock.release()
            for reader in readers:
                _wait(own, reader)
            shutil.rmtree(own, ignore_errors=True)


def _machine() -> str:
    """An id of the machine: file locks work between its processes."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read()
    except OSError:
        return platform.node()


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM raises SystemExit, unless the caller has its own handler, so that the folder, which
    may hold gigabytes, is deleted.
    """
    received = []

    def end(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise SystemExit(128 + number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    except Exception as error:  # a pool that is shut down may turn SystemExit into its own error
        if received:
            raise SystemExit(128 + received[0]) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
