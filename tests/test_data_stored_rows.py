"""Rows on disk: what is written is read, a row or some columns at a time; what a process that
writes runs into reaches the caller; and nothing of it needs `datasets`.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest

from megatron_gkd.data import DataError, stored_rows
from megatron_gkd.data.stored_rows import ROWS_AT_ONCE, StoredRows, write_rows
from tests.test_child_processes import children
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
    assert set(children(os.getpid())) <= set(before)  # none is left, alive or dead


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
