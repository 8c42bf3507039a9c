"""Room for checkpoints, errors of a full disk, and what killed processes leave behind."""

import errno
import os
import subprocess
import sys
from collections import namedtuple

import pytest

from megatron_gkd import output_dir
from megatron_gkd.output_dir import check_space, remove_leftovers
from tests.ranks import run_ranks
from tests.train_runs import SMALL, _train, arguments, make_rows, write_rows

GB = 10**9
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch):
    """Sets the free bytes of every disk."""

    def set_free(number):
        monkeypatch.setattr(output_dir.shutil, "disk_usage", lambda path: Usage(0, 0, number))

    return set_free


@pytest.mark.parametrize(
    "gigabytes, num_new, there, verdict",
    [
        (3.1, 5, 0, ""),  # two are kept, and one is in the making
        (2.9, 5, 0, "3 at once (--save_total_limit 2 and one in the making) 3.00 GB"),
        (2.9, 2, 0, ""),  # no more are written
        (1.1, 5, 2, ""),  # of a run that goes on, which then removes one
        (1.1, 5, 7, ""),
        (0.9, 5, 2, OSError),
        (0.9, 1, 0, OSError),
        (0.0, 0, 0, ""),
    ],
)
def test_room_for_checkpoints(tmp_path, free, gigabytes, num_new, there, verdict):
    for number in range(there):
        (tmp_path / f"checkpoint-{number}").mkdir()
    free(int(gigabytes * GB) + output_dir._SPARE_BYTES)
    if verdict is OSError:
        with pytest.raises(OSError, match=r"1\.00 GB, .* and 0\.90 GB are free: make room"):
            check_space(str(tmp_path), GB, num_new, save_total_limit=2)
        return
    said = check_space(str(tmp_path), GB, num_new, save_total_limit=2)
    assert verdict in said and bool(verdict) == bool(said)


def train_on_a_disk(rank, world_size, argv, free=None, full=None):
    """The message that ends a run where `free` bytes are free, or a full disk ends every call of
    `full`.
    """
    from megatron_gkd import checkpoint_files
    from megatron_gkd.formats import safetensors_file

    def write(*of):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if free is not None:
            patch.setattr(output_dir.shutil, "disk_usage", lambda path: Usage(0, 0, free))
        if full == "write_all":
            patch.setattr(safetensors_file, "write_all", write)
        elif full == "sync":
            patch.setattr(checkpoint_files, "sync", write)
        try:
            return _train(rank, world_size, [argv])
        except SystemExit as error:
            assert error.code == 2
            return str(error.__cause__)


def test_a_disk_that_is_too_small(tiny_folder, tmp_path):
    """Said by all ranks before the first step, not at the first save."""
    free = output_dir._SPARE_BYTES + 1000
    flags = dict(
        model=tiny_folder(**SMALL),
        dataset=write_rows(tmp_path / "rows.jsonl", make_rows(8)),
        max_steps=1,
        output_dir=tmp_path / "out",
    )
    for said in run_ranks(train_on_a_disk, 2, arguments(**flags), free):
        assert "a checkpoint has 0.00 GB, 1 at once" in said and "make room" in said
    assert not list((tmp_path / "out").glob("checkpoint*"))
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "full, file", [("write_all", "adapter_model.safetensors"), ("sync", "adapter_config.json")]
)
def test_a_disk_that_is_full_in_a_save(tiny_folder, tmp_path, full, file):
    """The error of the system names no file; the message names it, and what stays."""
    flags = dict(
        model=tiny_folder(**SMALL),
        dataset=write_rows(tmp_path / "rows.jsonl", make_rows(8)),
        max_steps=1,
        output_dir=tmp_path / "out",
    )
    (said,) = run_ranks(train_on_a_disk, 1, arguments(**flags), None, full)
    assert "earlier checkpoints stay as they are" in said
    assert "No space left on device: '" in said and f".partial/{file}'" in said
    assert not list((tmp_path / "out").glob("*checkpoint-*"))


def test_what_killed_processes_left(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    goes = [f"run.json.{dead.pid}.tmp", f".lock.{dead.pid}.tmp", ".shown-12ab"]
    goes.append(f".lock.{dead.pid}.now.tmp")
    stays = [f"run.json.{os.getpid()}.tmp", "metrics.jsonl", "notes.tmp"]
    for name in goes + stays:
        (tmp_path / name).touch()
    remove_leftovers(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stays)
