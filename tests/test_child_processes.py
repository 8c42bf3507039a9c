"""Forks that prepare rows, load data and convert checkpoints: a signal to all processes or to their
parent ends them all, and they outlive it in no case.
"""

import os
import signal
import time
from contextlib import closing, suppress
from pathlib import Path

import pyarrow
import pytest

from megatron_gkd.data import DataError
from megatron_gkd.data.stored_rows import write_rows
from megatron_gkd.formats.workers import run_workers
from megatron_gkd.stop_requests import stop_requests
from tests.test_data_loader import Rows, steps_of

SCHEMA = pyarrow.schema({"number": pyarrow.int32()})
GONE = (FileNotFoundError, ProcessLookupError)  # processes and threads may end at any time


def is_alive(process: int) -> bool:
    with suppress(*GONE):
        return ") Z " not in Path("/proc", str(process), "stat").read_text()
    return False


def children(process: int) -> list[int]:
    found: set[str] = set()
    for task in Path(f"/proc/{process}/task").iterdir():
        with suppress(*GONE):
            found.update((task / "children").read_text().split())
    return sorted(map(int, found))


def wait_for(reached) -> None:
    patience = time.monotonic() + 240
    while not reached():
        assert time.monotonic() < patience
        time.sleep(0.02)


def assert_they_end(processes) -> None:
    wait_for(lambda: not any(map(is_alive, processes)))


def in_a_fork(run) -> int:
    """The process number of a fork that calls `run` and ends with 0, or as SystemExit says."""
    process = os.fork()
    if process:
        return process
    try:
        run()
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code)
    finally:
        os._exit(1)


def status_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def waits(*_):
    time.sleep(3600)


class RowsThatWait(Rows):
    def __getitem__(self, index):
        waits()


def prepare(folder):
    with stop_requests():
        write_rows(waits, 1000, SCHEMA, str(folder / "rows"), 2, "rows")


def load(folder):
    with stop_requests(), closing(steps_of(RowsThatWait(40), size=4, workers=2)) as steps:
        next(steps)


def convert(folder):
    list(run_workers(waits, range(9), 2, lambda num_bytes: None))


def parent_of_forks(job, folder) -> tuple[int, list[int]]:
    """A process that does `job` in two forks, each of which waits in its first piece of work."""
    parent = in_a_fork(lambda: job(folder))
    wait_for(lambda: len(children(parent)) == 2)
    return parent, children(parent)


@pytest.mark.parametrize("job", [prepare, load, convert])
def test_forks_end_with_their_parent(tmp_path, job):
    """At once, whatever they are doing: it can tell them nothing any more."""
    parent, forks = parent_of_forks(job, tmp_path)
    os.kill(parent, signal.SIGKILL)
    assert status_of(parent) == -signal.SIGKILL
    assert_they_end(forks)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("whom", ["all", "parent"])
def test_a_signal_ends_a_preparation(tmp_path, capfd, number, whom):
    """To all, as from a terminal, or to the parent alone: the same line and status, and nobody is
    left. The forks may hear it first.
    """
    parent, forks = parent_of_forks(prepare, tmp_path)
    for process in [*forks, parent] if whom == "all" else [parent]:
        os.kill(process, number)
    assert status_of(parent) == 128 + number
    assert_they_end(forks)
    assert capfd.readouterr().err == f"megatron_gkd: {number.name}: ended before the first step\n"


def test_a_signal_right_after_a_fork(tmp_path, capfd, monkeypatch):
    """To the fork alone, while it still has its parent's handlers: it must not go on as the parent
    would.
    """
    fork = os.fork

    def fork_and_signal():
        process = fork()
        if not process:
            os.kill(os.getpid(), signal.SIGTERM)
        return process

    def run():
        monkeypatch.setattr(os, "fork", fork_and_signal)
        try:
            prepare(tmp_path)
        except DataError:
            raise SystemExit(7) from None

    assert status_of(in_a_fork(run)) == 7
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_fork_alone(tmp_path, number):
    """It has default signals: it ends without a word, and its parent says so."""

    def ends(indices):
        if 8 in indices:
            os.kill(os.getpid(), number)
        return [{"number": index} for index in indices]

    with stop_requests(), pytest.raises(DataError, match="one of 3 processes .* was killed"):
        write_rows(ends, 9, SCHEMA, str(tmp_path / "rows"), 3, "rows")


def test_a_loaders_workers_outlive_signals_to_all(tmp_path):
    """The step that their rank finishes may need them."""

    class Slow(Rows):
        def __getitem__(self, index):
            time.sleep(0.05)
            return super().__getitem__(index)

    with stop_requests() as requests, closing(steps_of(Slow(40), size=4, workers=2)) as steps:
        requests.save_first()
        next(steps)
        workers = children(os.getpid())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            for process in [*workers, os.getpid()]:
                os.kill(process, number)
        assert len(list(steps)) == 5 and requests.number == signal.SIGTERM
    assert_they_end(workers)
