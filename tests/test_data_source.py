"""Files and folders -> raw rows: every way to write the same rows gives them, where each stands,
and what is refused by name. The references are json, csv and pyarrow themselves.
"""

import csv
import gzip
import io
import json
import os
import random
import sys
import tracemalloc

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_gkd.data.rows import check_row
from megatron_gkd.data.source import open_source
from megatron_gkd.errors import BrokenCell, DataError, RowError

ROWS = [
    {"messages": [{"role": "user", "content": 'a ["], {\\" b'}], "n": 1},
    {"query": "ä 看\u2028", "n": None},
    {"odd": {"deep": [[], {}, "]"]}},
]


def read(path):
    source = open_source(str(path), 0)
    return [source.read(index) for index in range(len(source.locations))]


def places(path):
    source = open_source(str(path), 0)
    return [place.removeprefix(str(path)) for place in source.locations]


def lines(rows, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


LINES = lines(ROWS)
PRETTY = json.dumps(ROWS, indent=1).encode()
BY_LINE = [":1", ":2", ":3"]
ON_LINE_1 = ["[0]", "[1]", "[2]"]
OVER_LINES = [":2", ":11", ":15"]


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.jsonl", LINES, BY_LINE),
        ("a.json", LINES.removesuffix(b"\n"), BY_LINE),
        ("mark.jsonl", b"\xef\xbb\xbf" + lines(ROWS, "\r\n\r\n"), [":1", ":3", ":5"]),
        ("two.jsonl", b"".join(b"\xef\xbb\xbf" + lines([row]) for row in ROWS), BY_LINE),
        ("array.json", PRETTY, OVER_LINES),
        ("array.jsonl", json.dumps(ROWS).encode(), ON_LINE_1),
        ("mark.json", b"\xef\xbb\xbf" + PRETTY.replace(b"\n", b"\r\n"), OVER_LINES),
        ("spaced.json", b" \n " + PRETTY, [":3", ":12", ":16"]),
        ("a.jsonl.gz", gzip.compress(LINES), BY_LINE),
        ("parts.jsonl.gz", gzip.compress(LINES[:40]) + gzip.compress(LINES[40:]), BY_LINE),
        ("a.JSON.GZ", gzip.compress(PRETTY), OVER_LINES),
        ("unpacked.jsonl.gz", LINES, BY_LINE),
        ("packed.jsonl", gzip.compress(LINES), BY_LINE),
    ],
)
def test_every_way_to_write_the_same_rows(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == ROWS
    assert places(tmp_path / name) == expected


def random_value(rng, depth=0):
    kind = rng.choice("sssnlo" if depth < 4 else "ssn")
    if kind == "s":
        return "".join(rng.choices('ab"\\[]{},:\n\t 看\u2028é', k=rng.randrange(8)))
    if kind == "n":
        return rng.choice([None, True, -1.5e-7, 12, 10**30])
    items = [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return items if kind == "l" else {str(item)[:3]: item for item in items}


def test_elements_of_arrays_are_those_of_json(tmp_path):
    rng = random.Random(0)
    for number in range(150):
        rows = [{}, *(random_value(rng) for _ in range(rng.randrange(5)))]
        style = dict(indent=rng.choice([None, 0, 2]), ensure_ascii=rng.random() < 0.5)
        (tmp_path / f"{number}.json").write_text(json.dumps(rows, **style), encoding="utf-8")
        assert read(tmp_path / f"{number}.json") == rows


def test_records_of_tables_are_those_of_csv(tmp_path):
    rng = random.Random(0)
    for number in range(60):
        cells = ["".join(rng.choices("ab\",;\n\r\t '看", k=rng.randrange(9))) for _ in range(12)]
        rows = [["x", "y"], *([f"<{cell}>" for cell in cells[i : i + 2]] for i in range(0, 12, 2))]
        kind, delimiter = rng.choice([("csv", ","), ("tsv", "\t")])
        path = tmp_path / f"{number}.{kind}"
        with open(path, "w", newline="", encoding="utf-8") as file:
            quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
            csv.writer(file, delimiter=delimiter, quoting=quoting).writerows(rows)
        text = path.read_bytes().decode()
        expected = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        assert read(path) == list(expected)


def test_cells_of_a_table(tmp_path):
    """An empty cell is null, all others are text, which may have a picture's length."""
    long = "A" * 300_000
    header = ["", "instruction", "output", "images"]
    written = [["0", "two\nlines, 1", "[1, 2]", '["a.png"]'], ["1", " ", '{"a": 1}', long]]
    file = io.StringIO(newline="")
    csv.writer(file).writerows([header, written[0], [], written[1]])
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + file.getvalue().encode()))
    before = csv.field_size_limit()
    first = dict(zip(header[1:], written[0][1:]))
    second = dict(zip(header[1:], [None, '{"a": 1}', long]))
    assert read(tmp_path / "a.csv.gz") == [first, second]
    assert places(tmp_path / "a.csv.gz") == [":2", ":5"]
    assert csv.field_size_limit() == before


def test_a_list_in_a_cell_is_json():
    turns = [{"role": "user", "content": "<image><video>?"}, {"role": "assistant", "content": "x"}]
    cells = {
        "messages": json.dumps(turns),
        "images": '[ "a.png" ]',
        "videos": '{"path": "b.mp4"}',
        "teacher_images": "[]",
        "teacher_messages": json.dumps([turns[0] | {"content": "<video>!"}, turns[1]]),
        "use_audio_in_video": "True",
    }
    lists = {name: json.loads(cell) for name, cell in cells.items() if cell != "True"}
    row = check_row(cells, 10, "/data")
    assert row == check_row(lists | {"use_audio_in_video": True}, 10, "/data")
    assert row.media["video"][0].path == "/data/b.mp4" and row.use_audio_in_video
    assert check_row({"input_ids": "[1, 2]", "labels": " [-100, 2]"}, 10).input_ids == [1, 2]
    with pytest.raises(RowError, match="messages is text that is not JSON .*json.dumps writes it"):
        check_row({"messages": str(turns)}, 10)


def test_what_is_broken_is_one_row(tmp_path):
    table = b'a,b\n1\nok,ok\n\xe4,x\n"q"q,x\n"[\'x\'],x\nno,end\n'
    (tmp_path / "bad.json").write_text('[{"a": },\n "x", {"b":\n 1 2}, {"c": 3},\n]')
    (tmp_path / "bad.csv").write_bytes(table)

    def reasons(name):
        source, found = open_source(str(tmp_path / name), 0), []
        for index, place in enumerate(source.locations):
            try:
                found.append(source.read(index))
            except RowError as error:
                found.append(f"{place.removeprefix(str(tmp_path))}: {error}")
        return found

    assert reasons("bad.json") == [
        "/bad.json[0]: not JSON: Expecting value at column 7",
        "x",
        "/bad.json[2]: not JSON: Expecting ',' delimiter at line 2 of the row, column 4",
        {"c": 3},
    ]
    one, two, three, four, five = reasons("bad.csv")
    assert one == "/bad.csv:2: 1 cells, the header has 2" and two == {"a": "ok", "b": "ok"}
    assert three.startswith("/bad.csv:4: not UTF-8: byte 1 of the row is 0xe4 (iconv ")
    assert four.startswith("/bad.csv:5: not csv: ',' expected after '\"'")
    assert five.startswith("/bad.csv:6: not csv: unexpected end of data")


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.jsonl", LINES.decode().encode("utf-16"), "a.jsonl is UTF-16 or binary, and rows are"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16-le"), "a.csv is UTF-16 or binary"),
        ("a.jsonl", lines(ROWS, "\r"), r"its lines end in CR alone; rows end in LF or CR LF: tr "),
        ("a.json", PRETTY[:-20], "its array is not closed, element 2 begins in line 15: is it cut"),
        ("a.json", PRETTY + b"\n{}", "its array ends in line 2[0-9], and more follows"),
        ("a.json", b'[{"a": [}, {}]', "its array is not closed, element 0 begins in line 1"),
        ("a.json", b'{\n "data": []\n}', "a.json:1 begins an object that goes on in the next line"),
        ("a.json", b"\n [ ] \n", "a.json has no rows"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], "a.jsonl.gz is not a whole gzip file: "),
        ("a.jsonl.zst", LINES, "unknown file type .zst; unpack it first; .jsonl, .json "),
        ("a.csv", b"a;b\n1;2\n", "the header is one cell, 'a;b': cells are separated by commas"),
        ("a.csv", b'"a", "b"\n1, 2\n', """a.csv:1: the header names '"b"': a quote stands right"""),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv:1: the header names 'a' more than once"),
        ("a.csv", b"a,b\n", "a.csv has no rows"),
        ("a.csv", b"\n", "a.csv has no rows"),
        ("a.arrow", LINES, "a.arrow is not a readable arrow file"),
    ],
)
def test_files_that_are_refused_by_name(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="rows.jsonl is a pipe or a device: write the rows to a fi"):
        read(tmp_path / "rows.jsonl")


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    source = open_source(str(path), 0)
    path.write_bytes(LINES * 2)
    with pytest.raises(RowError, match="its file has changed since its rows were counted"):
        source.read(0)
    source = open_source(str(path), 0)
    path.unlink()
    for number in range(9):  # more than stay open
        (tmp_path / f"{number}.jsonl").write_bytes(b"{}")
        read(tmp_path / f"{number}.jsonl")
    with pytest.raises(RowError, match="its file cannot be read any more: .*No such file"):
        source.read(0)


def test_memory_holds_no_file(tmp_path):
    """Neither a plain file nor what was packed: 20 MB of rows."""
    content = lines([{"text": "x" * 10_000}] * 2_000)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content, 1))
    (tmp_path / "c.json").write_bytes(b"[" + content.rstrip().replace(b"\n", b",") + b"]")
    tracemalloc.start()
    try:
        sources = [open_source(str(path), 0) for path in sorted(tmp_path.iterdir())]
        assert [len(source.read(1_999)["text"]) for source in sources] == [10_000] * 3
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


# Folders
# --------------------------------------------------------------------------------------------------


def write_folder(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_folder_is_read_as_its_files_are(tmp_path):
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"n": 5}, {"n": 6}]), table)
    folder = write_folder(
        tmp_path / "rows",
        {
            "b.jsonl": lines([{"n": 1, "more": "x"}, {"n": "another type"}]),
            "a.json": b'[{"n": 0}]',
            "c.csv": b"n,x\n2,3\n",
            "d.jsonl.gz": gzip.compress(lines([{"n": 4}])),
            "e.parquet": table.getvalue(),
            "empty.jsonl": b"",
            "sub/z.jsonl": b'{"n": 7}',
            **dict.fromkeys(("README.md", ".hidden.jsonl", "_logs/x.jsonl", ".git/x.json"), b"?"),
            **dict.fromkeys(("dataset_info.json", "clip.wav", "LICENSE"), b"?"),
        },
    )
    os.symlink(folder, folder / "sub" / "loop")
    write_folder(tmp_path / "elsewhere", {"x.jsonl": b'{"n": 8}'})
    os.symlink(tmp_path / "elsewhere", folder / "z_link")
    os.symlink(tmp_path / "elsewhere", folder / "z_link_twice")
    source = open_source(str(folder), 0)
    expected = [0, 1, "another type", "2", 4, 5, 6, 7, 8]
    assert [row["n"] for row in read(folder)] == expected and source.name == str(folder)
    assert places(folder) == [
        *("/a.json:1", "/b.jsonl:1", "/b.jsonl:2", "/c.csv:2", "/d.jsonl.gz:1"),
        *("/e.parquet row 0", "/e.parquet row 1", "/sub/z.jsonl:1"),
        "/z_link/x.jsonl:1",
    ]
    # media lie beside the file that names them
    assert [source.folder_of(index) for index in (0, 7)] == [str(folder), str(folder / "sub")]
    some = open_source(f"{folder}#3", 0)
    rows = {place: source.read(index) for index, place in enumerate(source.locations)}
    assert [some.read(index) for index in range(3)] == [rows[place] for place in some.locations]
    os.symlink("/nowhere", folder / "gone.jsonl")
    with pytest.raises(DataError, match="rows cannot be opened: .*No such file.*gone.jsonl"):
        open_source(str(folder), 0)


def test_files_of_other_splits_stay_out_of_training(tmp_path, capsys):
    one = b'{"n": 1}'
    names = ("data/train-00000-of-00001.jsonl", "data/test-0.jsonl", "dev.jsonl", "attest.jsonl")
    folder = write_folder(tmp_path / "splits", dict.fromkeys(names, one))
    assert places(folder) == ["/attest.jsonl:1", "/data/train-00000-of-00001.jsonl:1"]
    said = capsys.readouterr().err
    assert "left out (--val_dataset takes them): data/test-0.jsonl, dev.jsonl" in said
    alone = write_folder(tmp_path / "alone", {"test-1.jsonl": one, "test-2.jsonl": one})
    assert len(places(alone)) == 2
    both = write_folder(tmp_path / "both", {"test.jsonl": one, "valid.jsonl": one})
    with pytest.raises(DataError, match="files of the splits validation and test alone"):
        places(both)


@pytest.mark.parametrize(
    "files, reason",
    [
        ({}, "has no file of rows .*: it is empty"),
        ({"a.wav": b"", "b.txt": b""}, "has no file of rows .*: it holds a.wav, b.txt"),
        ({"a.jsonl": LINES, "b.jsonl.zst": b""}, "b.jsonl.zst is of a type that is not read"),
        ({"a.jsonl": LINES, "b.parquet": b"no"}, "b.parquet is not a readable parquet file"),
        ({"a.jsonl": b"\n"}, "folder has no rows"),
        ({"state.json": b"{}"}, "folder has no rows"),
        ({"state.json": b"{"}, "state.json cannot be read: "),
    ],
)
def test_folders_that_are_refused(tmp_path, files, reason):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=reason):
        read(write_folder(tmp_path / "folder", files))


# Tables
# --------------------------------------------------------------------------------------------------


def test_media_features_are_left_as_they_are_stored(tmp_path, monkeypatch):
    """At any depth, used or not, broken or not; parquet and save_to_disk without `datasets`."""
    junk = {"bytes": b"junk", "path": "junk.bin"}
    part = {"type": datasets.Value("string"), "image": datasets.Image()}
    features = datasets.Features(
        {
            "messages": datasets.List({"content": datasets.List(part)}),
            "audios": datasets.List(datasets.Audio()),
            "thumb": datasets.Image(),
            "meta": {"clips": datasets.LargeList({"v": datasets.Video()})},
        }
    )
    row = {
        "messages": [{"content": [{"type": "image", "image": junk}]}],
        "audios": [junk, {"bytes": b"RIFF", "path": "a.wav"}],
        "thumb": junk,
        "meta": {"clips": [{"v": junk}]},
    }
    table = pyarrow.Table.from_pylist([row, dict.fromkeys(row)], features.arrow_schema)
    rows = datasets.Dataset(table)
    pyarrow.parquet.write_table(rows.data.table, tmp_path / "rows.parquet", row_group_size=1)
    rows.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    splits = datasets.DatasetDict({"train": rows, "test": rows.select([0])})
    splits.save_to_disk(str(tmp_path / "splits"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("rows.parquet", "saved", "splits"):
        assert read(tmp_path / name) == [row, dict.fromkeys(row)]
        assert places(tmp_path / name) == [" row 0", " row 1"]


def test_nulls_that_arrow_fills_in_are_left_out(tmp_path):
    """A template would write them, and the model would learn them."""
    rows = [
        {"calls": [{"arguments": {"city": "Rome"}, "text": '{"when": null}'}], "hint": None},
        {"calls": [{"arguments": {"days": [1, 2]}}, {"arguments": {"city": "Bern"}}], "hint": "x"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == rows


def test_a_cell_that_cannot_be_read_is_no_error_by_itself(tmp_path):
    text = pyarrow.Array.from_buffers(
        pyarrow.string(),
        2,
        [None, pyarrow.py_buffer(np.array([0, 1, 3], np.int32)), pyarrow.py_buffer(b"a\xff\xfe")],
    )
    day = pyarrow.array([1, 2**31 - 1], pyarrow.date32())
    table = pyarrow.table({"text": text, "day": day, "good": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet")
    assert first["text"] == "a" and (first["good"], second["good"]) == (1, 2)
    assert isinstance(second["text"], BrokenCell) and isinstance(second["day"], BrokenCell)
    assert "codec can't decode byte 0xff" in second["text"].reason


def test_the_cause_of_a_loader_is_quoted(monkeypatch):
    def load_dataset(name):
        try:
            raise ValueError("the columns of b.jsonl are others")
        except ValueError as error:
            raise RuntimeError("an error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    reason = "RuntimeError: an error occurred, caused by ValueError: the columns of b.jsonl are"
    with pytest.raises(DataError, match=reason):
        open_source("some/name", 0, download=True)
