"""What a resumed run says of rows that are not those of its checkpoint; whole runs are in
test_checkpoint.py.
"""

import json

import pytest

from demo.tiny.config import TinyModelConfig
from megatron_gkd.data import load_datasets
from megatron_gkd.data_settings import DataConfig
from megatron_gkd.identity import changed_rows, data_state

NUM_ROWS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of ids need no tokenizer."""
    return str(tmp_path_factory.mktemp("model"))


def load(path, rows, folder):
    lines = [json.dumps({"input_ids": [1, 2, row], "labels": [-100, 2, row]}) for row in rows]
    path.write_text("\n".join(lines))
    data = DataConfig(dataset=[str(path)], prepared_rows="none")
    return load_datasets(data, folder, TinyModelConfig.vocab_size, seed=0)[0]


def test_the_first_other_row_is_named(tmp_path, folder):
    """To one of 64 parts of the data: of 200 rows the fourth part of a fiftieth."""
    rows = list(range(NUM_ROWS))
    before = json.loads(json.dumps(data_state(load(tmp_path / "a.jsonl", rows, folder), None)))
    path = tmp_path / "b.jsonl"

    def note(rows, eval_data=None):
        (said,) = changed_rows(before, load(path, rows, folder), eval_data)
        return said.removeprefix("dataset ")

    assert changed_rows(before, load(path, rows, folder), None) == []
    rows[130] = 999
    same = "has 200 rows as before, but not the same"
    place = f"the first other one is {path}:129, or follows it up to {path}:132"
    assert note(rows) == f"{same}, {place}"
    rows[130], rows[7], rows[6] = 130, 6, 7  # their order counts
    place = f"the first other one is {path}:5, or follows it up to {path}:8"
    assert note(rows) == f"{same}, {place}"
    rows = list(range(NUM_ROWS))
    added = f"the first other one is {path}:201, or follows it up to {path}:202"
    assert note([*rows, 3, 4]) == f"had 200 rows and has 202, {added}"
    assert note(rows[:60]) == "had 200 rows and has 60"


def test_evaluation_rows_that_come_or_go(tmp_path, folder):
    data = load(tmp_path / "a.jsonl", range(5), folder)
    other = load(tmp_path / "b.jsonl", range(3), folder)
    (note,) = changed_rows(data_state(data, None), data, other)
    assert note.startswith(f"val_dataset had 0 rows and has 3, the first other one is {tmp_path}")
    (note,) = changed_rows(data_state(data, other), data, None)
    assert note == "val_dataset had 3 rows and has 0"
    assert changed_rows({}, data, other) == []  # of a checkpoint that does not tell
