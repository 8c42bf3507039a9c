"""Work that one rank does for all of its machine: data are prepared once a machine, not once a
rank, and lie in memory once, as mapped files.
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
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_gkd.errors import DataError

Result = TypeVar("Result")
_OUTCOME, _MAKING = "outcome.json", "making"


def alone(value: Any) -> list:
    """The `gather` of a world of one."""
    return [value]


def made_once(
    make: Callable[[str], Any], read: Callable[[Any], Result], gather: Callable[[Any], list] = alone
) -> Result:
    """`read(made)` on every rank. `made` is what `make(folder)` returned on the lowest of the ranks
    of this machine whose folder of temporary files (TMPDIR) this one sees: anything that JSON can
    hold, such as names of files in `folder`.

    The folder is gone afterwards; what `read` has opened or mapped stays readable. gather: a value
    of each rank -> all of them, in rank order. Raises what `make` raises, on the ranks that wait
    for it a DataError of the same text. Collectives: two of `gather`, before the work, which may
    take longer than a collective waits: for the work itself ranks wait at a lock, which ends with
    the process that holds it.
    """
    with _sigterm_raises():
        own, locks, readers = tempfile.mkdtemp(prefix="megatron_gkd-"), [], []
        try:
            locks.append(_Lock(own, _MAKING))
            places = gather([_machine(), own])
            maker = next(
                folder
                for machine, folder in places
                if machine == _machine() and os.path.isdir(folder)
            )
            locks.append(_Lock(maker, os.path.basename(own)))  # until this rank has read
            makers = gather(maker)
            readers = [
                os.path.basename(folder)
                for (_, folder), chosen in zip(places, makers)
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
    """What the processes of a machine have in common: locks hold between them."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read()
    except OSError:
        return platform.node()


@contextlib.contextmanager
def _sigterm_raises():
    """SIGTERM ends the process as an error does, unless the caller has a way of its own: the folder
    goes, which may hold gigabytes.
    """
    received = []

    def end(number, frame):
        received.append(number)
        raise SystemExit(128 + number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    except Exception as error:  # a pool that is torn down may make its own error of SystemExit
        if received:
            raise SystemExit(128 + received[0]) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Lock:
    """An exclusive lock on a file of `folder`, of this process and not of those that it forks."""

    def __init__(self, folder: str, name: str):
        self.file = open(os.path.join(folder, name), "w")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX)
        except OSError as error:
            raise DataError(
                f"{self.file.name} cannot be locked ({error}): TMPDIR=FOLDER names a local disk"
            ) from error

    def release(self) -> None:
        self.file.close()


def _wait(folder: str, name: str) -> None:
    """Until the lock is released, or its holder dead or done with the folder."""
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
        with contextlib.suppress(OSError):  # the others need no reason to end
            _write(folder, {"error": text})
        raise error


def _write(folder: str, outcome: dict) -> None:
    with open(os.path.join(folder, _OUTCOME), "w") as file:
        json.dump(outcome, file)


def _outcome(folder: str) -> Any:
    try:
        with open(os.path.join(folder, _OUTCOME)) as file:
            outcome = json.load(file)
    except (FileNotFoundError, ValueError):  # the second: cut short
        raise DataError(
            f"the rank that prepares the data in {folder} ended before it was done"
        ) from None
    if "error" in outcome:
        raise DataError(outcome["error"])
    return outcome["made"]
