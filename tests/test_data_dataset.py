"""load_datasets from real files: what is read, what is refused with its line, subsets, splits."""

import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from megatron_gkd.data import DataError, load_datasets
from megatron_gkd.data_settings import DataConfig
from tests.tiny_tokenizer import CHATML, write_bpe_folder, write_sentencepiece_folder

VOCAB = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_bpe_folder(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_folder(
        str(tmp_path_factory.mktemp("tiny") / "model"),
        TinyModelConfig(num_hidden_layers=1, hidden_size=64, vocab_size=640),
    )


@pytest.fixture
def no_tokenizer(tmp_path):
    path = tmp_path / "no_tokenizer"
    path.mkdir()
    return str(path)


def settings(*entries, **changes):
    return DataConfig(
        **{"dataset": list(entries), "max_length": 64, "prepared_rows": "none"} | changes
    )


def load(data, folder, seed=0, vocab_size=VOCAB):
    return load_datasets(data, folder, vocab_size, seed)


def ids_row(index, **more):
    """A row that can be told by its first id."""
    return {"input_ids": [index, 390, 391], "labels": [-100, 390, 391], **more}


def write_jsonl(path, rows, newline="\n"):
    lines = [
        row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()
        for row in rows
    ]
    path.write_bytes(b"".join(line + newline.encode() for line in lines))
    return str(path)


def firsts(dataset):
    return [dataset[index].student.input_ids[0] for index in range(len(dataset))]


def samples(dataset):
    return [dataset[index] for index in range(len(dataset))]


MIXED = [
    {
        "messages": [
            {"role": "user", "content": "the sky"},
            {"role": "assistant", "content": "is blue"},
        ],
        "source": "a",
    },
    {"instruction": "the sky", "input": None, "output": "is blue", "score": 1},
    ids_row(7, teacher_input_ids=[1, 2], score="high"),
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "the sky"}]},
            {"role": "assistant", "content": "is blue"},
        ],
        "images": None,
    },
    {
        "messages": [
            {"role": "user", "content": "the sky"},
            {"role": "assistant", "content": "is blue"},
        ],
        "teacher_prompt": "看 the sky",
    },
]


def test_rows_of_every_kind_in_one_file(tmp_path, folder):
    path = write_jsonl(tmp_path / "mixed.jsonl", MIXED)
    train, evaluation = load(settings(path), folder)
    assert evaluation is None
    assert len(train) == 5
    text = samples(train)
    assert text[0].student == text[1].student == text[3].student == text[4].student
    assert [sample.has_teacher_view for sample in text] == [False, False, True, False, True]
    assert [sample.source for sample in text] == ["a", path, path, path, path]
    assert [sample.row for sample in text] == [0, 1, 2, 3, 4]
    assert [train.location(index) for index in range(5)] == [
        f"{path}:{line}" for line in (1, 2, 3, 4, 5)
    ]
    report = train.report
    assert (report.num_rows, report.num_teacher_views, report.has_teacher_view, report.sources) == (
        5,
        2,
        True,
        {"a": 1, path: 4},
    )
    assert report.num_response_tokens == sum(len(sample.student.targets()) for sample in text)
    assert report.max_tokens == max(
        len(view.input_ids) for sample in text for view in (sample.student, sample.teacher)
    )
    assert train.pad_token_id == 0


def test_processes_give_the_same_rows(tmp_path, folder):
    path = write_jsonl(tmp_path / "mixed.jsonl", MIXED * 5 + [b"{"])
    one, _ = load(settings(path, skip_bad_rows=True), folder)
    three, _ = load(settings(path, skip_bad_rows=True, dataset_num_proc=3), folder)
    assert samples(one) == samples(three)
    assert [one.location(index) for index in range(25)] == [
        three.location(index) for index in range(25)
    ]
    assert one.report == three.report and three.report.num_skipped == 1


def test_byte_order_mark_crlf_and_empty_lines(tmp_path, no_tokenizer):
    path = tmp_path / "windows.jsonl"
    rows = [json.dumps(ids_row(index)).encode() for index in (3, 4, 5)]
    path.write_bytes(
        b"\xef\xbb\xbf" + rows[0] + b"\r\n\r\n" + rows[1] + b"\r\n" + rows[2] + b"\n\n  \n\n"
    )
    train, _ = load(settings(str(path)), no_tokenizer)
    assert firsts(train) == [3, 4, 5]
    assert [train.location(index) for index in range(3)] == [f"{path}:{line}" for line in (1, 3, 4)]


def test_line_separators_of_unicode_do_not_split_rows(tmp_path, folder):
    row = {
        "messages": [
            {"role": "user", "content": "a\u2028b\x85c"},
            {"role": "assistant", "content": "\u2029d"},
        ]
    }
    train, _ = load(settings(write_jsonl(tmp_path / "odd.jsonl", [row])), folder)
    assert len(train) == 1


def test_bad_rows_stop_the_run_with_file_line_and_reason(tmp_path, folder):
    good = ids_row(1)
    rows = [good] * 16 + [
        b'{"messages": [',
        {"messages": "x"},
        b"\xff\xfe",
        b'{"input_ids": [1]',
        b"[1]",
        b"null",
        good,
    ]
    rows.append({"instruction": " ", "output": "b"})
    rows.append({"instruction": "the sky " * 100, "output": "is blue"})
    rows.append(b'{"messages": ' + b"[" * 100000)
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    other = write_jsonl(tmp_path / "val.jsonl", [good, ids_row(VOCAB)])
    with pytest.raises(DataError) as error:
        load(settings(path, val_dataset=[other]), folder)
    lines = str(error.value).splitlines()
    assert lines[0] == (
        "10 of 28 data rows cannot be used; correct them, or pass --skip_bad_rows true "
        "to leave them out:"
    )
    for line, start in zip(
        lines[1:],
        [
            f"  {path}:17: not JSON: Expecting value at column 15",
            f"  {path}:18: messages must be a list of turns, got a string",
            f"  {path}:19: not UTF-8: byte 1 of the line is 0xff",
            f"  {path}:20: not JSON: Expecting ',' delimiter at column 18",
            f"  {path}:21: a row is a JSON object, this is a list",
            f"  {path}:22: a row is a JSON object, this is null",
            f"  {path}:24: empty prompt: neither instruction nor input has text",
            f"  {path}:25: the prompt has ",
            f"  {path}:26: not JSON that can be read",
            f"  {other}:2: input_ids[0] is 400, out of the vocabulary [0, 400)",
        ],
    ):
        assert line.startswith(start)
    assert len(lines) == 11


def test_only_the_first_twenty_bad_rows_are_listed(tmp_path, no_tokenizer):
    path = write_jsonl(tmp_path / "bad.jsonl", [ids_row(1)] + [b"oops"] * 25)
    with pytest.raises(DataError) as error:
        load(settings(path), no_tokenizer)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("25 of 26 data rows")
    assert (
        lines[20].startswith(f"  {path}:21: ")
        and lines[21] == "  ... and 5 more"
        and len(lines) == 22
    )


def test_skip_bad_rows_counts_and_skips(tmp_path, no_tokenizer):
    path = write_jsonl(tmp_path / "some.jsonl", [ids_row(1), b"oops", ids_row(2), ids_row(500)])
    train, _ = load(settings(path, skip_bad_rows=True), no_tokenizer)
    assert firsts(train) == [1, 2]
    assert train.report.num_skipped == 2
    assert train.report.skipped[0] == (f"{path}:2", "not JSON: Expecting value at column 1")
    named = f"2 bad rows skipped ({path}:2: not JSON: Expecting value at column 1; {path}:4: "
    assert named in train.report.summary()
    with pytest.raises(
        DataError, match="--dataset: all 2 rows are bad, the first is .*bad.jsonl:1: not JSON"
    ):
        load(
            settings(write_jsonl(tmp_path / "bad.jsonl", [b"oops"] * 2), skip_bad_rows=True),
            no_tokenizer,
        )


def test_tags_that_are_text_are_counted(tmp_path):
    """A column of another name than `images` would otherwise go unnoticed."""
    folder = write_bpe_folder(tmp_path / "bpe")
    row = {"query": "<image>what is it", "response": "the sea"}
    rows = [row | {"image_path": "a.png"}, row | {"query": "a < b"}, row]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    train, _ = load(settings(path), folder)
    assert train.report.tags_as_text == (2, [f"{path}:1", f"{path}:3"])
    assert f"read as text: 2 ({path}:1, {path}:3)" in train.report.summary()
    with pytest.raises(DataError, match="names `image_path` `imges`, which nothing reads: images?"):
        load(settings(path, columns='{"image_path": "imges"}'), folder)


def test_cut_responses_are_counted(tmp_path, no_tokenizer):
    long = {"input_ids": list(range(100)), "labels": [-100] * 10 + list(range(10, 100))}
    path = write_jsonl(tmp_path / "long.jsonl", [long, ids_row(1), long])
    train, _ = load(settings(path, max_length=60), no_tokenizer)
    assert train[0].student.input_ids == list(range(60)) and train[0].cut_tokens == 40
    assert (
        train.report.num_cut_responses,
        train.report.num_cut_tokens,
        train.report.max_tokens,
    ) == (2, 80, 60)


def test_text_without_a_tokenizer(tmp_path, no_tokenizer):
    path = write_jsonl(tmp_path / "text.jsonl", [ids_row(1), MIXED[0]])
    for num_proc in (1, 2):
        with pytest.raises(
            DataError, match=r"text.jsonl:2 is text: .*no_tokenizer has no tokenizer files"
        ):
            load(settings(path, dataset_num_proc=num_proc), no_tokenizer)


def test_text_without_a_chat_template(tmp_path):
    folder = write_sentencepiece_folder(tmp_path / "sp", byte_fallback=True, chat_template=None)
    ids, text = (
        write_jsonl(tmp_path / "ids.jsonl", [ids_row(1)]),
        write_jsonl(tmp_path / "text.jsonl", [MIXED[1]]),
    )
    assert len(load(settings(ids), folder)[0]) == 1
    with pytest.raises(
        DataError,
        match="text.jsonl:1 is text: .*tokenizer without a chat template: add `chat_template`",
    ):
        load(settings(text), folder)


def test_a_broken_tokenizer_matters_to_text_only(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    ids, text = (
        write_jsonl(tmp_path / "ids.jsonl", [ids_row(1)]),
        write_jsonl(tmp_path / "text.jsonl", [MIXED[1]]),
    )
    assert len(load(settings(ids), str(tmp_path))[0]) == 1
    with pytest.raises(
        DataError, match="text.jsonl:1 is text: the tokenizer of .* does not load: "
    ):
        load(settings(text), str(tmp_path))


def test_reasons_that_quote_odd_values(tmp_path, no_tokenizer):
    rows = [
        b'{"\\ud800": 1}',
        b'{"input_ids": ' + b"[" * 400 + b"]" * 400 + b', "labels": [1]}',
        b'{"messages": [{"role": "\\ud800"}]}',
    ]
    path = write_jsonl(tmp_path / "odd.jsonl", rows)
    with pytest.raises(DataError) as error:
        load(settings(path), no_tokenizer)
    lines = str(error.value).splitlines()
    assert "\\ud800" in lines[1] and "got a list [[[" in lines[2] and "\\ud800" in lines[3]
    assert max(len(line.replace(str(tmp_path), "")) for line in lines) < 300
    str(error.value).encode("utf-8")


def test_sentencepiece_folder(tmp_path):
    folder = write_sentencepiece_folder(tmp_path / "sp", byte_fallback=True, chat_template=CHATML)
    train, _ = load(settings(write_jsonl(tmp_path / "mixed.jsonl", MIXED)), folder)
    assert len(train) == 5 and len(train[0].student.targets()) > 1


def test_parquet(tmp_path, folder):
    rows = [
        row for row in MIXED if not isinstance(row.get("score"), str) and "images" not in row
    ]  # what arrow can hold in one table
    path = str(tmp_path / "rows.parquet")
    columns = {name: None for row in rows for name in row}
    table = pyarrow.Table.from_pylist([{**columns, **row} for row in [*rows, {"instruction": " "}]])
    pyarrow.parquet.write_table(table, path)
    jsonl, _ = load(settings(write_jsonl(tmp_path / "rows.jsonl", rows)), folder)
    with pytest.raises(DataError, match="1 of 4 data rows.*\n  .*rows.parquet row 3: empty prompt"):
        load(settings(path), folder)
    train, _ = load(settings(path, skip_bad_rows=True, dataset_num_proc=2), folder)
    assert [sample.student for sample in samples(train)] == [
        sample.student for sample in samples(jsonl)
    ]
    assert [sample.teacher for sample in samples(train)] == [
        sample.teacher for sample in samples(jsonl)
    ]


def test_parquet_that_is_none(tmp_path, folder):
    path = tmp_path / "x.parquet"
    path.write_text("no")
    with pytest.raises(DataError, match="x.parquet is not a readable parquet file"):
        load(settings(str(path)), folder)


def test_folder_of_save_to_disk(tmp_path, no_tokenizer):
    rows = datasets.Dataset.from_list([ids_row(index) for index in (3, 4, 5)] + [ids_row(400)])
    single, several, odd = (str(tmp_path / name) for name in ("single", "several", "odd"))
    rows.save_to_disk(single)
    datasets.DatasetDict({"test": rows.select([3]), "train": rows.select([2, 1])}).save_to_disk(
        several
    )
    datasets.DatasetDict({"test": rows, "dev": rows}).save_to_disk(odd)
    files = sorted(os.listdir(single))
    with pytest.raises(DataError, match=r"single row 3: input_ids\[0\] is 400"):
        load(settings(single), no_tokenizer)
    assert firsts(load(settings(single, skip_bad_rows=True), no_tokenizer)[0]) == [3, 4, 5]
    assert firsts(load(settings(several), no_tokenizer)[0]) == [5, 4]
    assert sorted(os.listdir(single)) == files  # nothing is written beside the user's data
    with pytest.raises(DataError, match="odd has no split `train` .it has test, dev"):
        load(settings(odd), no_tokenizer)


def test_mixed_types_and_media_features_of_datasets(tmp_path, model):
    contents = [
        [{"role": "user", "content": "the sky"}],
        [{"role": "user", "content": [{"type": "text", "text": "the sky"}]}],
    ]
    answer = {"role": "assistant", "content": "is blue"}
    rows = [{"messages": [*turns, answer]} for turns in [*contents, contents[1]]]
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    images = datasets.Dataset.from_dict({"images": [None, [b"not an image"], []]}).cast(
        datasets.Features({"images": datasets.List(datasets.Image())})
    )
    table = datasets.concatenate_datasets([table, images], axis=1)
    table.save_to_disk(str(tmp_path / "mixed"))
    with pytest.raises(
        DataError,
        match="1 of 3 data rows.*\n.*mixed row 1: the row has 0 image placeholders for 1 image",
    ):
        load(settings(str(tmp_path / "mixed")), model, vocab_size=640)
    train, _ = load(settings(str(tmp_path / "mixed"), skip_bad_rows=True), model, vocab_size=640)
    assert len(train) == 2 and train[0].student == train[1].student


def test_number_suffix(tmp_path, no_tokenizer):
    path = write_jsonl(tmp_path / "many.jsonl", [ids_row(index) for index in range(50)])
    ten = firsts(load(settings(path + "#10"), no_tokenizer)[0])
    assert len(set(ten)) == 10 and set(ten) <= set(range(50))
    assert ten != list(range(10))  # shuffled first
    assert firsts(load(settings(path + "#10"), no_tokenizer)[0]) == ten
    assert firsts(load(settings(path + "#20"), no_tokenizer)[0])[:10] == ten
    assert firsts(load(settings(path + "#10"), no_tokenizer, seed=1)[0]) != ten
    train, _ = load(settings(path + "#10"), no_tokenizer)
    assert [train.location(index) for index in range(10)] == [
        f"{path}:{first + 1}" for first in ten
    ]
    for asked in (0, 51):
        with pytest.raises(
            DataError, match=f"many.jsonl#{asked} asks for {asked} rows and .*many.jsonl has 50"
        ):
            load(settings(f"{path}#{asked}"), no_tokenizer)
    odd = write_jsonl(tmp_path / "name#3", [])
    with pytest.raises(DataError, match="name#3: unknown file type"):
        load(settings(odd), no_tokenizer)


def test_split(tmp_path, no_tokenizer):
    path = write_jsonl(tmp_path / "many.jsonl", [ids_row(index) for index in range(200)])
    train, evaluation = load(settings(path, split_dataset_ratio=0.1), no_tokenizer)
    assert (len(train), len(evaluation)) == (180, 20)
    assert sorted(firsts(train) + firsts(evaluation)) == list(range(200))
    assert firsts(evaluation) != list(range(20)) and firsts(evaluation) != list(range(180, 200))
    again = load(settings(path, split_dataset_ratio=0.1), no_tokenizer)
    assert firsts(again[1]) == firsts(evaluation)
    assert firsts(load(settings(path, split_dataset_ratio=0.1), no_tokenizer, seed=1)[1]) != firsts(
        evaluation
    )
    assert len(load(settings(path, split_dataset_ratio=0.001), no_tokenizer)[1]) == 1
    with pytest.raises(
        DataError, match="--split_dataset_ratio 0.5 of 1 rows leaves no row to train on"
    ):
        load(settings(path + "#1", split_dataset_ratio=0.5), no_tokenizer)


def test_validation_data(tmp_path, no_tokenizer):
    path = write_jsonl(tmp_path / "train.jsonl", [ids_row(index) for index in range(5)])
    val = write_jsonl(tmp_path / "val.jsonl", [ids_row(9)])
    train, evaluation = load(settings(path, val + "#1", val_dataset=[val, val]), no_tokenizer)
    assert firsts(train) == [0, 1, 2, 3, 4, 9] and firsts(evaluation) == [9, 9]
    with pytest.raises(DataError, match="--val_dataset is given and --split_dataset_ratio is 0.1"):
        load(settings(path, val_dataset=[val], split_dataset_ratio=0.1), no_tokenizer)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("missing.jsonl", "missing.jsonl does not exist"),
        ("./missing", "./missing does not exist"),
        ("empty.jsonl", "empty.jsonl has no rows"),
        ("notes.txt", "notes.txt: unknown file type .txt; .jsonl, .json"),
    ],
)
def test_what_cannot_be_opened(tmp_path, monkeypatch, no_tokenizer, name, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "notes.txt").write_text("a,b")
    with pytest.raises(DataError, match=reason):
        load(settings(name), no_tokenizer)


def test_an_unknown_name(monkeypatch, no_tokenizer):
    """Nothing is asked of the network without the flag: a misspelt path is a path that does not
    exist.
    """
    asked = []

    def load_dataset(name):
        asked.append(name)
        raise ConnectionError(f"no network for {name}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match="somebody/nothing does not exist; .* add --download_datasets true"
    ):
        load(settings("somebody/nothing#5"), no_tokenizer)
    assert not asked
    reason = (
        "`datasets` could not load somebody/nothing "
        ".*ConnectionError: no network for somebody/nothing.; a"
    )
    with pytest.raises(DataError, match=reason):
        load(settings("somebody/nothing#5", download_datasets=True), no_tokenizer)


def test_a_named_data_set(monkeypatch, no_tokenizer):
    """Without a network a table stands in for what `datasets` loads."""
    rows = datasets.Dataset.from_list([ids_row(3), ids_row(4), ids_row(5)])
    loaded = datasets.DatasetDict({"test": rows, "train": rows.select([2, 0])})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded)
    train, _ = load(settings("some/name", download_datasets=True), no_tokenizer)
    assert firsts(train) == [5, 3] and train[0].source == "some/name"
    assert train.location(1) == "some/name row 1"


def test_loading_leaves_progress_bars_as_they_were(tmp_path, no_tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [ids_row(1)])
    load(settings(path), no_tokenizer)
    assert not datasets.are_progress_bars_disabled()
