"""One run at a time in an output folder: between processes, where the file system has no locks, and
for whole runs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_gkd import output_lock
from megatron_gkd.output_lock import NAME, OutputLock, Owner
from tests.train_runs import SMALL, arguments, make_rows, run_training, write_rows

HOLDER = """
import errno, os, sys, time
from megatron_gkd import output_lock
if sys.argv[2] == "lease":
    def no_locks(*of):
        raise OSError(errno.ENOLCK, "no locks")
    output_lock.fcntl.lockf = no_locks
output_lock.RENEW_SECONDS = 0.1
with output_lock.OutputLock(sys.argv[1], lambda: print("lost", flush=True), print) as lock:
    lock.acquire()
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lock of tmp_path, with the kind of lock."""
    started = []

    def start(kind: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture(params=["lock", "lease"])
def kind(request, monkeypatch):
    """How the file system can lock; with a lease, which is short here, it cannot."""
    monkeypatch.setattr(output_lock, "_SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(output_lock, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(output_lock, "LEASE_SECONDS", 1.5)
    if request.param == "lease":
        monkeypatch.setattr(output_lock.fcntl, "lockf", _no_locks)
    return request.param


def _no_locks(*of):
    raise OSError(37, "No locks available")


def held(folder: Path, **changes) -> OutputLock:
    lock = OutputLock(str(folder), lambda: None, lambda line: None)
    lock.acquire(**changes)
    return lock


def test_the_second_is_refused_until_the_first_ends(tmp_path, kind, holder):
    first = holder(kind)
    with pytest.raises(OSError) as refused:
        held(tmp_path)
    assert f"(process {first.pid} on " in str(refused.value)
    assert "--take_over_output_dir true" in str(refused.value)
    first.stdin.close()
    first.wait()
    assert not (tmp_path / NAME).exists()
    held(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_the_dead_hold_nothing(tmp_path, kind, holder):
    first = holder(kind)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / NAME).exists()
    held(tmp_path).release()


def test_a_stopped_process_lives(tmp_path, kind, holder):
    """SIGSTOP, longer than a lease: on its own machine it is seen to be there."""
    first = holder(kind)
    first.send_signal(signal.SIGSTOP)
    time.sleep(2)
    with pytest.raises(OSError, match=f"process {first.pid} on"):
        held(tmp_path)
    first.send_signal(signal.SIGCONT)


def test_taken_over(tmp_path, kind, holder):
    """The first is told, and does not remove what is no longer its own."""
    first = holder(kind)
    second = held(tmp_path, take_over=True)
    assert first.stdout.readline() == "lost\n"
    first.stdin.close()
    first.wait()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    second.release()


@pytest.mark.parametrize("lives", [True, False])
def test_another_machine_is_judged_by_its_touches(tmp_path, kind, holder, lives, monkeypatch):
    """Its process numbers mean nothing here; locks may not reach it."""
    first = holder("lease")
    monkeypatch.setattr(output_lock, "_machine", lambda: "another")
    if not lives:
        first.kill()
        first.wait()
        held(tmp_path).release()
        return
    with pytest.raises(OSError, match=f"process {first.pid} on"):
        held(tmp_path)


def test_a_folder_that_was_removed_is_locked_again(tmp_path, kind):
    lock = held(tmp_path)
    (tmp_path / NAME).unlink()
    deadline = time.monotonic() + 10
    while not (tmp_path / NAME).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert Owner(**json.loads((tmp_path / NAME).read_text())).pid == os.getpid()
    lock.release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', "\0" * 100])
def test_a_damaged_record(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    held(tmp_path).release()


def test_two_runs(tiny_folder, tmp_path, holder):
    """The second start is refused by every rank in a line, before it reads anything, and changes
    nothing; it takes the folder where a flag says so, and leaves no lock.
    """
    flags = dict(
        model=tiny_folder(**SMALL),
        dataset=write_rows(tmp_path / "rows.jsonl", make_rows(8)),
        max_steps=1,
        output_dir=tmp_path,
    )
    first = holder("lock")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="SystemExit: 2") as error:
        run_training(2, arguments(**flags))
    assert f"--output_dir {tmp_path}, rank 0: another run (process {first.pid} on" in str(
        error.value
    )
    assert {path.name for path in tmp_path.iterdir()} == before
    run_training(2, arguments(**flags, take_over_output_dir="true"))
    assert first.stdout.readline() == "lost\n"
    assert (tmp_path / "checkpoint-1").is_dir() and not (tmp_path / NAME).exists()
