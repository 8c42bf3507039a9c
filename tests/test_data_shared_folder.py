"""Data are prepared by one rank of a machine; the others map what it wrote, and hear what stopped
it.
"""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from megatron_gkd.data import DataError, dataset, load_datasets, shared_folder
from megatron_gkd.data.shared_folder import made_once
from megatron_gkd.parallel import world_max
from megatron_gkd.stop_requests import stop_requests
from tests import ranks
from tests.test_data_dataset import firsts, ids_row, load, settings, write_jsonl


@pytest.fixture
def temporary():
    """A folder for temporary files. Its name is short: that of a socket in it holds 108 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


MAX = partial(world_max, device=torch.device("cpu"))


def _load_on_machines(rank, world_size, data, model, temporary, ranks_of_a_machine):
    """A rank's rows, who opened the files, and what is left in its folder of temporary files. All
    machines have one file system there, on which locks between them do not work.
    """
    tempfile.tempdir = str(temporary)
    shared_folder._machine = lambda: f"machine {rank // ranks_of_a_machine}"
    opened, open_source = [], dataset.open_source
    dataset.open_source = lambda entry, *more: opened.append(entry) or open_source(entry, *more)
    train, evaluation = load_datasets(data, model, 400, 0, rank, MAX)
    MAX(0)
    found = [train[index] for index in range(len(train))]
    return found, firsts(evaluation), train.report, opened, os.listdir(temporary)


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("ranks_of_a_machine", [4, 2])
def test_one_rank_of_a_machine_prepares(tmp_path, temporary, ranks_of_a_machine, num_proc):
    rows = [ids_row(index, teacher_input_ids=[index, 1]) for index in range(20)]
    paths = [write_jsonl(tmp_path / f"{part}.jsonl", rows[part::2]) for part in range(2)]
    data, model = (
        settings(*paths, split_dataset_ratio=0.25, dataset_num_proc=num_proc),
        str(tmp_path),
    )
    train, evaluation = load(data, model)
    expected = [train[index] for index in range(len(train))], firsts(evaluation), train.report
    for rank, (*found, opened, left) in enumerate(
        ranks.run_ranks(_load_on_machines, 4, data, model, temporary, ranks_of_a_machine)
    ):
        assert tuple(found) == expected
        assert opened == ([] if rank % ranks_of_a_machine else paths)
        assert left == []


def _load_or_error(rank, world_size, data, model, temporary):
    tempfile.tempdir = str(temporary)
    try:
        load_datasets(data, model, 400, 0, rank, MAX)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize(
    "row, why",
    [(b"{", "1 of 2 data rows .*rows.jsonl:2: not JSON"), (None, "rows.jsonl has no rows")],
)
def test_every_rank_hears_what_is_wrong(tmp_path, temporary, row, why):
    path = write_jsonl(tmp_path / "rows.jsonl", [] if row is None else [ids_row(1), row])
    errors = ranks.run_ranks(_load_or_error, 3, settings(path), str(tmp_path), temporary)
    assert len(set(errors)) == 1
    with pytest.raises(DataError, match=f"(?s){why}"):
        raise DataError(errors[0])
    assert os.listdir(temporary) == []


def test_a_full_disk_is_named(temporary, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def make(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        DataError,
        match=rf"{temporary}/megatron_gkd-\w+: .*No space left.*TMPDIR=FOLDER names a larger",
    ):
        made_once(make, list)
    assert os.listdir(temporary) == []


def test_what_was_made_may_be_anything():
    """A maker's result comes back as JSON has it, and files it wrote can be mapped after the folder
    has gone.
    """

    def make(folder):
        pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2]}), os.path.join(folder, "a"))
        return {"folder": folder, "number": 0.1}

    made, table = made_once(
        make,
        lambda made: (
            made,
            pyarrow.parquet.read_table(os.path.join(made["folder"], "a"), memory_map=True),
        ),
    )
    assert (
        made["number"] == 0.1
        and not os.path.exists(made["folder"])
        and table["a"].to_pylist() == [1, 2]
    )


def file_max(folder, rank):
    """A `world_max` of two ranks through files: no process group that a death would break."""
    calls = iter(range(2))

    def largest(number):
        call = next(calls)
        partial_file = folder / f"{call}-{rank}.partial"
        partial_file.write_text(str(number))
        partial_file.rename(folder / f"{call}-{rank}")
        paths = [folder / f"{call}-{other}" for other in range(2)]
        while not all(path.exists() for path in paths):
            time.sleep(0.01)
        return max(int(path.read_text()) for path in paths)

    return largest


def _start(target, *args):
    processes = [ranks._context.Process(target=target, args=(rank, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def _prepare_while_the_maker_dies(rank, folder, how):
    """Rank 0 is killed while it prepares, a child of its own outlives it; rank 1 writes down what
    it hears.
    """
    tempfile.tempdir = str(folder)

    def make(_):
        child = os.fork()
        if not child:
            time.sleep(100)
        (folder / "child").write_text(str(child))
        os.kill(os.getpid(), how)

    try:
        with stop_requests():
            made_once(make, list, rank, file_max(folder, rank))
    except DataError as error:
        (folder / f"heard-{rank}").write_text(str(error))


@pytest.mark.parametrize(
    "how, exit_code, left",
    [(signal.SIGKILL, -signal.SIGKILL, 1), (signal.SIGTERM, 128 + signal.SIGTERM, 0)],
)
def test_a_maker_that_dies_keeps_nobody_waiting(tmp_path, how, exit_code, left):
    exit_codes = _start(_prepare_while_the_maker_dies, tmp_path, how)
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert exit_codes == [exit_code, 0]
    assert "ended before it was done" in (tmp_path / "heard-1").read_text()
    assert len(list(tmp_path.glob("megatron_gkd-*"))) == left


def _read_slowly(rank, folder):
    """Rank 1 needs a second."""
    (folder / "temporary").mkdir(exist_ok=True)
    tempfile.tempdir = str(folder / "temporary")

    def read(made):
        time.sleep(rank)
        assert os.path.isdir(made)
        return made

    made = made_once(lambda own: own, read, rank, file_max(folder, rank))
    (folder / f"read-{rank}").write_text(made)


def test_a_folder_stays_until_all_have_read(tmp_path):
    assert _start(_read_slowly, tmp_path) == [0, 0]
    first, second = [(tmp_path / f"read-{rank}").read_text() for rank in range(2)]
    assert first == second and not os.path.exists(first)
    assert os.listdir(tmp_path / "temporary") == []


def _make_in_a_container(rank, folder):
    """Each rank has a folder of its own for temporary files."""
    tempfile.tempdir = str(folder / f"container-{rank}")
    made = made_once(lambda own: f"made by {rank}", str, rank, file_max(folder, rank))
    (folder / f"read-{rank}").write_text(made)


def test_ranks_that_share_no_folder_make_their_own(tmp_path):
    for rank in range(2):
        (tmp_path / f"container-{rank}").mkdir()
    assert _start(_make_in_a_container, tmp_path) == [0, 0]
    for rank in range(2):
        assert (tmp_path / f"read-{rank}").read_text() == f"made by {rank}"
        assert os.listdir(tmp_path / f"container-{rank}") == []


def test_a_disk_without_locks_is_named(temporary, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr("megatron_gkd.data.shared_folder.fcntl.lockf", none)
    with pytest.raises(
        DataError,
        match=f"{temporary}/.*/rank-00000000 cannot be locked .*TMPDIR=FOLDER names a local disk",
    ):
        made_once(list, list)
    assert os.listdir(temporary) == []


def test_what_killed_processes_left_is_removed(temporary, monkeypatch):
    """Folders whose processes are all dead; not one whose process lives, has another machine, or
    holds its lock in a container where its number is free here.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    machine = shared_folder._machine()
    for name, words in {
        "dead": [f"{machine} {dead.pid}"] * 2,
        "lives": [f"{machine} {dead.pid}", f"{machine} {os.getpid()}"],
        "elsewhere": [f"other {dead.pid}"],
        "begins": [""],
        "locked": [f"{machine} {dead.pid}"],
    }.items():
        folder = temporary / f"megatron_gkd-{name}"
        folder.mkdir()
        for number, text in enumerate(words):
            (folder / f"rank-{number:08d}").write_text(text)
    lock = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    lock += "print(flush=True); sys.stdin.read()"
    path = temporary / "megatron_gkd-locked" / "rank-00000000"
    with subprocess.Popen(
        [sys.executable, "-c", lock, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        assert made_once(lambda folder: "made", lambda made: made) == "made"
        holder.stdin.close()
    left = {path.name.removeprefix("megatron_gkd-") for path in temporary.iterdir()}
    assert left == {"lives", "elsewhere", "begins", "locked"}
