"""Work that one rank does for all that see its folder of temporary files: data are prepared once a machine, not once a
rank, and lie in memory once, as mapped files.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_gkd.data.errors import DataError

Result = TypeVar("Result")
_OUTCOME, _MAKING, _READING = "outcome.json", "making", "reading"


def alone(value: Any) -> list:
    """The `gather` of a world of one."""
    return [value]


def made_once(make: Callable[[str], Any], read: Callable[[Any], Result], gather: Callable[[Any], list] = alone) -> Result:
    """`read(made)` on every rank. `made` is what `make(folder)` returned on the lowest of the ranks that see the same
    folder of temporary files (TMPDIR): anything that JSON can hold, such as names of files that it wrote into `folder`.

    The folder is gone afterwards; what `read` has opened or mapped stays readable. gather: a value of each rank -> all
    of them, in rank order. Raises what `make` raises, on the ranks that wait for it a DataError of the same text.
    Collectives: two of `gather`, before the work, which may take longer than a collective waits: for the work itself
    ranks wait at a file lock, which ends with the process that holds it.
    """
    with _sigterm_raises():
        own = tempfile.mkdtemp(prefix="megatron_gkd-")
        making, reading = _Lock(own, _MAKING), _Lock(own, _READING)
        readers: list[str] = []
        try:
            folders = gather(own)
            maker = next(folder for folder in folders if os.path.isdir(folder))
            readers = [folder for folder, its_maker in zip(folders, gather(maker)) if its_maker == own]
            if readers:
                _make(make, own)
            making.release()
            _wait(maker, _MAKING)
            return read(_outcome(maker))
        finally:
            making.release()
            reading.release()
            for folder in readers:
                _wait(folder, _READING)
            shutil.rmtree(own, ignore_errors=True)


@contextlib.contextmanager
def _sigterm_raises():
    """SIGTERM ends the process as an error does: the folder goes, which may hold gigabytes."""

    def end(number, frame):
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # signals are not its business
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Lock:
    """An exclusive lock on a file of `folder`."""

    def __init__(self, folder: str, name: str):
        self.file = open(os.path.join(folder, name), "w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def release(self) -> None:
        if not self.file.closed:
            fcntl.flock(self.file, fcntl.LOCK_UN)  # closing is not enough: processes forked meanwhile have it open too
            self.file.close()


def _wait(folder: str, name: str) -> None:
    """Until the lock is released, or its holder dead or done with the folder."""
    try:
        with open(os.path.join(folder, name)) as file:
            fcntl.flock(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        pass


def _make(make: Callable[[str], Any], folder: str) -> None:
    try:
        _write(folder, {"made": make(folder)})
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            error = DataError(f"{folder}: {error}; the prepared data lie there, TMPDIR=FOLDER names a larger disk")
        with contextlib.suppress(OSError):  # the others need no reason to end
            _write(folder, {"error": str(error) or type(error).__name__})
        raise error


def _write(folder: str, outcome: dict) -> None:
    with open(os.path.join(folder, _OUTCOME), "w") as file:
        json.dump(outcome, file)


def _outcome(folder: str) -> Any:
    try:
        with open(os.path.join(folder, _OUTCOME)) as file:
            outcome = json.load(file)
    except (FileNotFoundError, ValueError):  # the second: cut short
        raise DataError(f"the rank that prepares the data in {folder} ended before it was done") from None
    if "error" in outcome:
        raise DataError(outcome["error"])
    return outcome["made"]
