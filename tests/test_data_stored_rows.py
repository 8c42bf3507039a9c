"""Rows on disk: what is written is read, a row or some columns at a time; what a process that
writes runs into reaches the caller; and nothing of it needs `datasets`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyarrow
import pytest

from megatron_gkd.data import DataError, stored_rows
from megatron_gkd.data.stored_rows import ROWS_AT_ONCE, StoredRows, write_rows
from megatron_gkd.stop_requests import stop_requests
from tests.train_runs import SMALL, arguments, make_rows
from tests.train_runs import write_rows as write_jsonl

REPOSITORY = Path(__file__).parents[1]
SCHEMA = pyarrow.schema({"ids": pyarrow.list_(pyarrow.int32()), "name": pyarrow.string()})


def make(index):
    return {"ids": list(range(index % 5)), "name": None if index % 3 == 0 else f"row {index}"}


def in_parts(make_one):
    return lambda indices: [make_one(index) for index in indices]


def stored(folder, number, num_proc=1):
    files = write_rows(in_parts(make), number, SCHEMA, str(folder / f"{number}"), num_proc, "rows")
    assert len(files) == min(num_proc, number)
    rows = StoredRows.open(SCHEMA, files)
    for file in files:
        os.remove(file)
    return rows


@pytest.mark.parametrize("num_proc", [1, 3])
def test_rows_and_columns(tmp_path, num_proc):
    number = 2 * ROWS_AT_ONCE + 31
    rows = stored(tmp_path, number, num_proc) + stored(tmp_path, 2, num_proc)
    expected = [make(index) for index in [*range(number), 0, 1]]
    assert [rows[index] for index in range(len(rows))] == expected and rows[-1] == expected[-1]
    assert rows.columns("name", "ids").to_pylist() == [
        {"name": row["name"], "ids": row["ids"]} for row in expected
    ]
    chosen = [0, 1, *range(ROWS_AT_ONCE - 1, 2 * ROWS_AT_ONCE, 7), number + 1]
    some = rows.select(chosen)
    assert [some[index] for index in range(len(some))] == [expected[index] for index in chosen]
    assert some.columns("ids")["ids"].to_pylist() == [expected[index]["ids"] for index in chosen]
    again = some.select([1, len(chosen) - 1])
    assert [again[0], again[1]] == [expected[1], expected[number + 1]]
    none = rows.select([])
    assert len(none) == 0 and none.columns("ids").num_rows == 0 and none.columns("ids").schema


def test_progress_without_a_terminal(tmp_path, monkeypatch, capsys):
    """Lines with rows, rate and time left on rank 0, none before some time has passed."""
    stored(tmp_path, ROWS_AT_ONCE + 5)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(stored_rows, "SECONDS_OF_A_LINE", 0.0)
    stored(tmp_path, ROWS_AT_ONCE + 5)
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"rows: 100 of 105, \d+ rows/s, 0 s left", first)
    assert re.fullmatch(r"rows: 105 of 105, \d+ rows/s", last)
    monkeypatch.setenv("RANK", "1")
    stored(tmp_path, ROWS_AT_ONCE + 5)
    assert capsys.readouterr().err == ""


class Peculiar(Exception):
    """Cannot be pickled and made again from its arguments."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


@pytest.mark.parametrize(
    "error, expected, words",
    [
        (DataError("no text here"), DataError, "^no text here$"),
        (Peculiar(1, 2), RuntimeError, "^Peculiar: 1 and 2$"),
    ],
)
def test_an_error_of_a_process(tmp_path, error, expected, words):
    def fails(index):
        if index == 5:
            raise error
        return make(index)

    before = children(os.getpid())
    with pytest.raises(expected, match=words):
        write_rows(in_parts(fails), 9, SCHEMA, str(tmp_path / "rows"), 3, "rows")
    assert children(os.getpid()) <= before  # none is left, alive or dead


def parent_of_forks(tmp_path, wait=3600.0):
    """A process that writes rows in two forks, each of which waits in its first row."""

    def waits(index):
        time.sleep(wait)
        return make(index)

    parent = os.fork()
    if not parent:
        try:
            with stop_requests():
                write_rows(in_parts(waits), 100_000, SCHEMA, str(tmp_path / "rows"), 2, "rows")
        except SystemExit as end:
            os._exit(end.code)
        finally:
            os._exit(1)
    patience = time.monotonic() + 240
    while len(forks := children(parent)) < 2 and time.monotonic() < patience:
        time.sleep(0.05)
    assert len(forks) == 2
    return parent, forks


def assert_they_end(processes):
    patience = time.monotonic() + 240
    while any(map(is_alive, processes)) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not any(map(is_alive, processes))


def test_forks_end_with_their_parent(tmp_path):
    """At once, whatever they are doing."""
    parent, forks = parent_of_forks(tmp_path)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert_they_end(forks)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("whom", ["all", "parent"])
def test_a_signal_ends_a_parent_and_its_forks(tmp_path, capfd, number, whom):
    """To all, as from a terminal, or to the parent alone: the same line and status, however early
    it comes, and nobody is left.
    """
    parent, forks = parent_of_forks(tmp_path)
    for process in [*map(int, forks), parent] if whom == "all" else [parent]:
        os.kill(process, number)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == 128 + number
    assert_they_end(forks)
    assert capfd.readouterr().err == f"megatron_gkd: {number.name}: ended before the first step\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_fork_ends_by_a_signal(tmp_path, number):
    """To it alone: with default signals, and without a traceback of its own; its parent says so."""

    def ends(index):
        if index == 8:
            os.kill(os.getpid(), number)
        return make(index)

    with stop_requests(), pytest.raises(DataError, match="one of 3 processes .* was killed"):
        write_rows(in_parts(ends), 9, SCHEMA, str(tmp_path / "rows"), 3, "rows")


GONE = (FileNotFoundError, ProcessLookupError)  # processes and threads may end at any time


def is_alive(process: str) -> bool:
    with suppress(*GONE):
        return ") Z " not in Path("/proc", process, "stat").read_text()
    return False


def children(process: int) -> set[str]:
    found: set[str] = set()
    for task in Path(f"/proc/{process}/task").iterdir():
        with suppress(*GONE):
            found.update((task / "children").read_text().split())
    return found


def test_a_process_that_is_killed(tmp_path):
    def killed(index):
        if index == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(index)

    with pytest.raises(DataError, match="one of 3 processes .* lower --dataset_num_proc"):
        write_rows(in_parts(killed), 9, SCHEMA, str(tmp_path / "rows"), 3, "rows")


BLOCKED = """
import sys
sys.modules["datasets"] = None  # `import datasets` raises ImportError
from megatron_gkd.train import main
main(sys.argv[1:])
"""


def run_without_datasets(tmp_path, tiny_folder, dataset, **more):
    flags = arguments(
        **more,
        model=tiny_folder(**SMALL),
        dataset=dataset,
        output_dir=tmp_path / "run",
        max_steps=1,
        dataset_num_proc=2,
        lmbda=1,
        max_completion_length=4,
    )
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *flags],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_a_run_from_jsonl_without_datasets(tmp_path, tiny_folder):
    done = run_without_datasets(
        tmp_path, tiny_folder, write_jsonl(tmp_path / "rows.jsonl", make_rows(8))
    )
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["num_tokens"] > 0


@pytest.mark.extended
def test_a_name_says_that_it_needs_datasets(tmp_path, tiny_folder):
    done = run_without_datasets(tmp_path, tiny_folder, "somebody/rows", download_datasets="true")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "somebody/rows is read by `datasets`, which cannot be imported" in done.stderr
    assert "pip install 'datasets>=5.2,<5.3', or give the rows as files" in done.stderr
