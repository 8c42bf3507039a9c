"""One run at a time in an --output_dir: two would mix their checkpoints and lose their lines.

OUTPUT/.lock names the run that writes there. It is locked (POSIX locks, which network file systems
pass on to other machines) and touched every RENEW_SECONDS; both end with the process, however it
ends. What another machine has not touched for LEASE_SECONDS is dead, also where a file system has
no locks.
"""

import errno
import fcntl
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

RENEW_SECONDS = 5.0
LEASE_SECONDS = 30.0
_SETTLE_SECONDS = 1.0  # without locks: of two that took the file, the later one has it
_HELD = (errno.EACCES, errno.EAGAIN)
NAME = ".lock"


class Owner(NamedTuple):
    """A process that writes into the folder."""

    host: str
    pid: int
    machine: str
    """The boot and the process numbers' namespace: where both agree `pid` means the same"""
    began: int
    """Of the process, in ticks since the boot: numbers of processes are used again"""
    since: str
    token: str

    @classmethod
    def this_process(cls) -> "Owner":
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        pid, token = os.getpid(), secrets.token_hex(8)
        return cls(platform.node(), pid, _machine(), _began(pid) or 0, now, token)

    def lives_here(self) -> bool | None:
        """Whether the process lives; None where only its own machine can tell."""
        if self.machine != _machine():
            return None
        return _began(self.pid) == self.began

    def describe(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class OutputLock:
    """The lock of one folder, as a context: released at its end. on_lost is called from a thread of
    its own when another run has taken the folder.
    """

    def __init__(self, output_dir: str, on_lost: Callable[[], None], log: Callable[[str], None]):
        self.path, self._on_lost, self._log = Path(output_dir, NAME), on_lost, log
        self._descriptor = -1
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "OutputLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def acquire(self, take_over: bool = False) -> None:
        """The folder must be there. Raises OSError naming the run that has it; take_over: that run
        loses it.
        """
        while self._descriptor < 0:
            self._descriptor = self._try(take_over)
        self._thread = threading.Thread(target=self._renew, name="output lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Leave the folder to the next run."""
        if self._descriptor < 0:
            return
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError):
            if self._is_ours():
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1

    def _try(self, take_over: bool) -> int:
        """A descriptor of the file, which is ours; -1: another process was faster, once more."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            locked = _lock(descriptor)
            if not _is_file(self.path, descriptor):
                raise _Replaced
            owner = _read(descriptor)
            if locked is False or (owner and self._lives(owner, descriptor)):
                if not take_over:
                    raise OSError(_refusal(owner))
                if owner is not None:
                    self._log(f"The run of {owner.describe()} loses {self.path.parent}")
                locked = None
            record = json.dumps(Owner.this_process()._asdict()).encode()
            if locked:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, record, 0)
                return descriptor
        except _Replaced:
            os.close(descriptor)
            return -1
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return self._replace(record)

    def _lives(self, owner: Owner, descriptor: int) -> bool:
        """Whether the owner that left its name does: by its process, elsewhere by its touches."""
        lives = owner.lives_here()
        if lives is not None:
            return lives and owner.pid != os.getpid()  # what this process has not released
        with suppress(OSError):  # both times are the file system's, whatever our clock says
            if _now(self.path) - os.fstat(descriptor).st_mtime > LEASE_SECONDS:
                return False
        self._log(
            f"{self.path.parent} has the lock of {owner.describe()}: "
            f"waiting {LEASE_SECONDS:g} s to see whether it lives"
        )
        touched, deadline = os.fstat(descriptor).st_mtime_ns, time.monotonic() + LEASE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, LEASE_SECONDS / 10))
            if not _is_file(self.path, descriptor):
                raise _Replaced
            if os.stat(self.path).st_mtime_ns != touched:
                return True
        return False

    def _replace(self, record: bytes) -> int:
        """Another file takes the place of one whose lock another process has, or cannot have."""
        temporary = self.path.with_name(f"{NAME}.{os.getpid()}.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.pwrite(descriptor, record, 0)
            _lock(descriptor)
            os.replace(temporary, self.path)
            time.sleep(_SETTLE_SECONDS)
            if _is_file(self.path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return -1

    def _make_again(self) -> None:
        record = os.pread(self._descriptor, 4096, 0)
        if (descriptor := self._replace(record)) >= 0:
            os.close(self._descriptor)
            self._descriptor = descriptor

    def _is_ours(self) -> bool:
        return _is_file(self.path, self._descriptor)

    def _renew(self) -> None:
        while not self._done.wait(RENEW_SECONDS):
            with suppress(OSError):  # the folder may be away for a moment; a save will say so
                if not self.path.exists():  # the folder was removed under the run, which goes on
                    self._make_again()
                elif not self._is_ours():
                    self._on_lost()
                    return
                else:
                    os.utime(self._descriptor)


class _Replaced(Exception):
    """The file is no longer the one that was opened."""


def _refusal(owner: Owner | None) -> str:
    who = "another run" if owner is None else f"another run ({owner.describe()})"
    return (
        f"{who} writes there: choose another folder, or end that run first; "
        "--take_over_output_dir true takes the folder from one that cannot be ended"
    )


def _lock(descriptor: int) -> bool | None:
    """Whether the file is locked now: False: by another process; None: the file system cannot."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True


def _is_file(path: Path, descriptor: int) -> bool:
    """Whether `path` is the open file. It is not opened for that: closing it would end the lock."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> Owner | None:
    """None in a new file, and where a kill cut its record."""
    try:
        found: Any = json.loads(os.pread(descriptor, 4096, 0))
        return Owner(**found)
    except (ValueError, TypeError):
        return None


def _now(path: Path) -> float:
    """The time of the file system that `path` lies on, as it stamps files."""
    probe = path.with_name(f"{NAME}.{os.getpid()}.now.tmp")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _began(pid: int) -> int | None:
    """When the process began, in ticks since the boot; None if there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] == b"Z" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
