"""Prepared rows are reused where nothing has changed, and never where anything has."""

import errno
import json
import os
import shutil
import time
import wave
from dataclasses import replace

import datasets
import pytest
import torch

from megatron_gkd import content_digest
from megatron_gkd.data import dataset, load_datasets, prepared_rows
from megatron_gkd.data.source import Source
from tests import ranks
from tests.test_data_dataset import MIXED, VOCAB, ids_row, samples, settings, write_jsonl
from tests.tiny_tokenizer import CHATML, write_bpe_folder


@pytest.fixture
def folder(tmp_path):
    return write_bpe_folder(tmp_path / "bpe")


def load(data, folder, seed=0, vocab_size=VOCAB):
    """(samples, whether rows were reused, lines)."""
    said: list[str] = []
    train, _ = load_datasets(data, folder, vocab_size, seed, log=said.append)
    found = samples(train), [train.location(row) for row in range(len(train))], train.report
    return found, any("reused from" in line for line in said), said


def test_the_next_start_reuses_them(tmp_path, folder, monkeypatch):
    """Without opening a file of rows, from any number of processes, for training and evaluation."""
    kept = tmp_path / "kept"
    path = write_jsonl(tmp_path / "rows.jsonl", MIXED * 60)
    other = write_jsonl(tmp_path / "other.jsonl", MIXED[:2])
    data = settings(path, prepared_rows=str(kept), dataset_num_proc=2)
    first, reused, (line,) = load(data, folder)
    assert not reused and line.startswith(f"{path}: prepared rows kept in {kept}/")
    assert first == load(settings(path), folder)[0]
    opened = []
    monkeypatch.setattr(dataset, "open_source", lambda *entry: opened.append(entry[0]))
    for more in (dict(), dict(skip_bad_rows=True), dict(dataset_num_proc=1)):
        again, reused, (line,) = load(settings(path, prepared_rows=str(kept), **more), folder)
        assert reused and again == first and not opened
        assert line.startswith(f"{path}: 300 prepared rows reused from {kept}/")
    monkeypatch.undo()
    data = settings(path, val_dataset=[other], prepared_rows=str(kept))
    _, _, (one, two) = load(data, folder)
    assert "reused" in one and two.startswith(f"{other}: prepared rows kept")
    assert len(os.listdir(kept)) == 2


def _load_apart(rank, world_size, data, folder):
    """Twice, each as a run of its own."""
    first = load(data, folder)
    torch.distributed.barrier()
    return first, load(data, folder)


def test_several_runs_at_once(tmp_path, folder):
    """Each has its rows, and those of one are kept; then all of them reuse it."""
    path = write_jsonl(tmp_path / "rows.jsonl", MIXED * 20)
    data = settings(path, prepared_rows=str(tmp_path / "kept"))
    expected = load(settings(path), folder)[0]
    for first, second in ranks.run_ranks(_load_apart, 2, data, folder):
        assert first[0] == second[0] == expected and second[1]
    (kept,) = os.listdir(tmp_path / "kept")
    assert not kept.startswith(".")


def write_sound(path, seconds):
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, 16000, 0, "NONE", ""))
        out.writeframes(bytes(int(seconds * 16000) * 2))
    os.utime(path, (1e9, 1e9))


def change_a_row(tmp_path, folder, data):
    """One character, with the same size and times."""
    path, status = tmp_path / "rows.jsonl", os.stat(tmp_path / "rows.jsonl")
    path.write_bytes(path.read_bytes().replace(b"is blue", b"is grey", 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_template(tmp_path, folder, data, name="bpe"):
    (path,) = (path for path in (tmp_path / name).iterdir() if "m.role" in path.read_text())
    path.write_text(path.read_text().replace("{{ m.content }}", " {{ m.content }}"))


def add_a_template_file(tmp_path, folder, data):
    (tmp_path / "bpe" / "additional_chat_templates").mkdir()
    (tmp_path / "bpe" / "additional_chat_templates" / "x.jinja").write_text("y")


def move_the_file(tmp_path, folder, data):
    """Its name is that of the rows' source and location."""
    data.dataset = [shutil.move(data.dataset[0], str(tmp_path / "moved.jsonl"))]


def change_a_named_file(tmp_path, folder, data):
    change_template(tmp_path, folder, data, "named")


CHANGES = {
    "a row": change_a_row,
    "template": change_template,
    "template file": add_a_template_file,
    "file's name": move_the_file,
    "max_length": lambda path, folder, data: setattr(data, "max_length", 20),
    "system": lambda path, folder, data: setattr(data, "system", "Be brief."),
    "a setting to come": lambda path, folder, data: setattr(data, "to_come", "x"),
    "a file that a setting names": change_a_named_file,
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_they_are_prepared_anew(tmp_path, folder, what):
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "chat.jinja").write_text(CHATML)
    data = settings(
        write_jsonl(tmp_path / "rows.jsonl", MIXED),
        prepared_rows=str(tmp_path / "kept"),
        chat_template=str(tmp_path / "named" / "chat.jinja"),
    )
    assert [load(data, folder)[1] for _ in range(2)] == [False, True]
    CHANGES[what](tmp_path, folder, data)
    found, reused, _ = load(data, folder)
    assert not reused and found == load(replace(data, prepared_rows="none"), folder)[0]
    assert load(data, folder)[1]


def test_rows_with_the_date_are_not_kept(tmp_path, folder):
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + CHATML)
    path = write_jsonl(tmp_path / "rows.jsonl", MIXED)
    data = settings(path, prepared_rows=str(tmp_path / "kept"), chat_template=str(template))
    assert [load(data, folder)[1:] for _ in range(2)] == [(False, [])] * 2


def test_folders_and_names(tmp_path, folder, monkeypatch):
    """Of a folder its tables count; of a name that is looked up elsewhere the rows that it has."""
    rows, name = [ids_row(row) for row in range(5)], str(tmp_path / "saved")
    data = settings(name, prepared_rows=str(tmp_path / "kept"))

    def reused():
        found, is_reused, _ = load(data, folder)
        assert [sample.student.input_ids[0] for sample in found[0]] == [
            row["input_ids"][0] for row in rows
        ]
        return is_reused

    datasets.Dataset.from_list(rows).save_to_disk(name)
    assert not reused() and reused()
    rows[2] = ids_row(7)
    datasets.Dataset.from_list(rows).save_to_disk(name)
    assert not reused() and reused()
    linked = tmp_path / "linked"
    linked.mkdir()
    os.symlink(name, linked / "rows")
    data.dataset = [str(linked)]
    assert not reused() and reused()
    rows[1] = ids_row(8)
    datasets.Dataset.from_list(rows).save_to_disk(name)
    assert not reused() and reused()
    data.dataset = ["somebody/rows"]
    locations = [f"somebody/rows row {row}" for row in range(5)]
    source = Source("somebody/rows", locations, rows.__getitem__, lambda row: "")
    monkeypatch.setattr(dataset, "open_source", lambda *_: source)
    assert not reused() and reused()
    rows[3] = ids_row(9)
    assert not reused() and reused()


def test_other_vocabularies_seeds_libraries_and_code(tmp_path, folder, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", [ids_row(row) for row in range(9)])
    data = settings(path, f"{path}#4", prepared_rows=str(tmp_path / "kept"))

    def reused(**arguments):
        content_digest.code_digest.cache_clear()  # as in another process
        return [" reused " in line for line in load(data, folder, **arguments)[2]]

    assert reused() == [False, False] and reused() == [True, True]
    assert reused(seed=1) == [True, False]  # it chooses the four
    assert reused(vocab_size=VOCAB + 1) == [False, False]
    with monkeypatch.context() as patched:
        patched.setattr(prepared_rows, "version", lambda name: "0")
        assert reused() == [False, False]
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(content_digest.megatron_gkd, "__file__", str(package / "__init__.py"))
    assert reused() == [False, False] and reused() == [True, True]
    (package / "more.py").write_text("")
    assert reused() == [False, False]
    content_digest.code_digest.cache_clear()


def test_a_setting_that_json_does_not_have_must_be_named(tmp_path, folder):
    data = settings("rows.jsonl", prepared_rows=str(tmp_path))
    data.later = object()
    with pytest.raises(TypeError, match="object is not JSON serializable"):
        load(data, folder)


def test_media_that_have_changed(tiny_folder, tmp_path):
    """Their sizes are in the rows; a row that was bad for want of its medium is looked at again."""
    model = tiny_folder(num_hidden_layers=1, hidden_size=64, vocab_size=640)
    turns = [{"role": "user", "content": "<audio>"}, {"role": "assistant", "content": "yes"}]
    rows = [{"messages": turns, "audios": [name]} for name in ("a.wav", "b.wav")]
    write_sound(tmp_path / "a.wav", 0.5)
    data = settings(
        write_jsonl(tmp_path / "rows.jsonl", rows),
        prepared_rows=str(tmp_path / "kept"),
        skip_bad_rows=True,
        max_length=400,
    )

    def lengths():
        found, reused, _ = load(data, model, vocab_size=640)
        return [sample.media[0].num_tokens for sample in found[0]], reused

    (first,), reused = lengths()
    assert not reused and lengths() == ([first], True)
    write_sound(tmp_path / "b.wav", 1.5)
    (_, second), reused = lengths()
    assert second > first and not reused and lengths() == ([first, second], True)
    write_sound(tmp_path / "a.wav", 1.5)
    os.utime(tmp_path / "a.wav", (1e9 + 1, 1e9 + 1))
    assert lengths() == ([second, second], False) and lengths()[1]
    now = time.time() + 600  # later than any start: as if somebody were writing it
    os.utime(tmp_path / "a.wav", (now, now))
    said = load(data, model, vocab_size=640)[2]
    assert said == [f"{data.dataset[0]}: not kept for the next start, files have just changed"]


def test_the_folder_is_bounded(tmp_path, folder):
    """What was unused for longest goes; what is larger than the limit is not kept."""
    kept = tmp_path / "kept"
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [ids_row(n)] * 300) for n in range(3)]
    data = settings(prepared_rows=str(kept), max_length=100)

    def reused(number, gib=20.0):
        data.dataset, data.prepared_rows_gib = [paths[number]], gib
        return load(data, folder)[1]

    assert not reused(0)
    (manifest,) = kept.glob("*/manifest.json")
    gib = 2.5 * sum(json.loads(manifest.read_text())["sizes"]) / 2**30
    for path in (manifest, manifest.parent):
        os.utime(path, (1, 1))
    assert not reused(1) and reused(0)  # which is then the newest
    os.utime(next(path for path in kept.glob("*/manifest.json") if path != manifest), (2, 2))
    abandoned = kept / ".part-x"
    abandoned.mkdir()
    os.utime(abandoned, (1, 1))
    assert not reused(2, gib) and len(os.listdir(kept)) == 2
    assert reused(0) and reused(2) and not reused(1)
    said = load(
        settings(paths[0], prepared_rows=str(tmp_path / "x"), prepared_rows_gib=2**-20), folder
    )
    assert "are more than --prepared_rows_gib 9.53674e-07" in said[2][0]


def test_what_cannot_be_kept_or_reused(tmp_path, folder, monkeypatch):
    """A line says why, and the rows are prepared."""
    path = write_jsonl(tmp_path / "rows.jsonl", MIXED)
    expected = load(settings(path), folder)[0]
    (tmp_path / "file").write_text("")
    data = settings(path, prepared_rows=str(tmp_path / "file" / "kept"))
    found, _, said = load(data, folder)
    assert found == expected and any(
        "--prepared_rows names another folder" in line for line in said
    )
    data = settings(path, prepared_rows=str(tmp_path / "kept"))
    load(data, folder)
    (part,) = (tmp_path / "kept").glob("*/0")
    part.write_bytes(part.read_bytes()[:-9])
    found, reused, said = load(data, folder)
    assert found == expected and not reused and "is cut short" in said[0]
    assert load(data, folder)[1]  # what was broken is made anew
    for name, content in (("0", bytes(part.stat().st_size)), ("manifest.json", b"[]")):
        (part.parent / name).unlink()  # a link of it may be in use
        (part.parent / name).write_bytes(content)
        found, reused, said = load(data, folder)
        assert found == expected and not reused and "is not reused" in said[0]
        assert load(data, folder)[1]
    part.unlink()
    found, reused, said = load(data, folder)
    assert found == expected and not reused and "No such file" in said[0]
    assert load(data, folder)[1]
    with monkeypatch.context() as patch:

        def copy(source, target):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr("megatron_gkd.data.prepared_rows._link_or_copy", copy)
        found, reused, said = load(data, folder)
        assert found == expected and not reused and "No space left" in said[0]
    assert load(data, folder)[1]  # what is whole is not thrown away for it
    assert os.listdir(tmp_path / "kept") == [part.parent.name]
    data = settings(path, prepared_rows=str(tmp_path / "kept"), check_data=True)
    assert load(data, folder)[1:] == (False, [])
