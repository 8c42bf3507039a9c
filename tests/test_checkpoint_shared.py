"""The folder that all machines must share: one that they do not is refused at the start; where a
network file system shows a change late or keeps a file, no rank goes on from another checkpoint
than the others, and no run ends.
"""

import errno
import os
import shutil
import time

import torch
from safetensors.torch import save_file

from megatron_gkd import parallel
from megatron_gkd.adapters import resolve
from megatron_gkd.checkpoint import (
    LATEST,
    _tidy,
    checkpoints,
    latest_of_rank_0,
    note_latest,
    remove_old,
)
from megatron_gkd.config import parse_config
from megatron_gkd.formats import safetensors_file
from megatron_gkd.lora.peft_config import TENSORS
from megatron_gkd.model.args import read_model_args
from megatron_gkd.output_dir import check_output_dir
from megatron_gkd.output_lock import OutputLock
from tests.ranks import run_ranks
from tests.reference_step import write_adapter
from tests.train_runs import SMALL, arguments, initialize


def in_folders(rank, world_size, shared, folders):
    """Of the shared folder and of a folder of the rank's own: what is wrong with it, the latest
    checkpoint there, or why there is none.
    """
    safetensors_file.SECONDS_TO_APPEAR = 0
    place, found = parallel.initialize(torch.device("cpu")), []
    for folder in (shared, folders[rank]):
        said = None
        try:
            with OutputLock(folder, lambda: None, print) as lock:
                check_output_dir(folder, place, lock, take_over=False)
        except OSError as error:
            said = str(error)
        try:
            latest = latest_of_rank_0(folder, place)
        except OSError as error:
            latest = str(error)
        found.append((said, latest))
    return found


def make_checkpoint(output, step):
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({}, folder / TENSORS)
    note_latest(output, folder)
    return folder


def test_one_folder_for_all_ranks(tmp_path):
    """A rank that has the name and not the folder is found, and where rank 0's latest is not there
    for it all end.
    """
    shared, own = tmp_path / "shared", [tmp_path / name for name in "012"]
    for step, rank in ((7, 0), (3, 1), (7, 2)):
        make_checkpoint(own[rank], step)
    (of_0, *others) = run_ranks(in_folders, 3, str(shared), [str(folder) for folder in own])
    assert of_0[0] == (None, None) and all(of_rank[0] == of_0[0] for of_rank in others)
    assert list(shared.iterdir()) == []
    for rank, (_, (said, latest)) in enumerate([of_0, *others]):
        assert said.startswith(
            f"--output_dir {own[1]} must be one folder for all ranks: rank 1 (on "
        )
        assert "[Errno 2] No such file or directory" in said and "\n" not in said
        assert latest.startswith("rank 1 (on ") and str(own[1] / "checkpoint-7") in latest
        assert not list(own[rank].glob(".shown-*"))


def test_a_folder_that_rank_0_cannot_make(tmp_path):
    (tmp_path / "file").touch()
    of_ranks = run_ranks(in_folders, 2, str(tmp_path / "file"), [str(tmp_path / "file")] * 2)
    for of_rank in of_ranks:
        for said, latest in of_rank:
            before = f"--output_dir {tmp_path / 'file'}, rank 0: "
            assert said == f"{before}it is a file, choose another name"
            assert latest is None


def test_a_file_that_another_machine_shows_late(tmp_path, monkeypatch):
    path, waited = tmp_path / "made by rank 0", []

    def sleep(seconds):
        waited.append(path.exists())
        if len(waited) == 3:
            path.touch()

    monkeypatch.setattr(time, "sleep", sleep)
    os.close(safetensors_file.open_to_write(path))
    assert waited == [False] * 3


def resumed(rank, world_size, argument_lists):
    """The checkpoint that a rank goes on from, or why it cannot."""
    config = parse_config(argument_lists[rank])
    place = initialize(config)
    try:
        return resolve(config, read_model_args(config.model.model), place)[2]
    except (OSError, UnicodeDecodeError) as error:
        return str(error)


def test_all_ranks_go_on_from_one_checkpoint(tiny_folder, tmp_path):
    """One that rank 1 does not see, as yet, ends all, although it has an earlier one."""
    model, own, argvs = tiny_folder(**SMALL), [tmp_path / "0", tmp_path / "1"], []
    for folder in own:
        write_adapter(folder / "checkpoint-1", model, rank=2, alpha=4)
        flags = dict(model=model, dataset="none", output_dir=folder)
        argvs.append(arguments(**flags, resume_from_checkpoint="latest"))
    write_adapter(own[0] / "checkpoint-2", model, rank=2, alpha=4)
    of_0, of_1 = run_ranks(resumed, 2, argvs)
    assert of_0 == of_1 and of_0.startswith("rank 1 (on ")
    assert str(own[1] / "checkpoint-2") in of_0 and "No such file" in of_0


def test_a_damaged_note_of_the_latest_checkpoint_ends_all_ranks(tiny_folder, tmp_path):
    """Rank 0 alone reads it; the others do not wait for what it would have said."""
    model, output = tiny_folder(**SMALL), tmp_path / "output"
    write_adapter(output / "checkpoint-1", model, rank=2, alpha=4)
    (output / LATEST).write_bytes(b"\xff")
    flags = dict(model=model, dataset="none", output_dir=output)
    argv = arguments(**flags, resume_from_checkpoint="latest")
    of_0, of_1 = run_ranks(resumed, 2, [argv, argv])
    assert "can't decode byte 0xff" in of_0
    start = f"--resume_from_checkpoint latest, in {output}: UnicodeDecodeError: "
    assert of_1.startswith(start) and "0xff" in of_1


def test_a_folder_that_cannot_go_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    """As on NFS, where another process of the machine reads it: it goes with a later save."""
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)

    def busy(folder, *unused):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        remove_old(tmp_path, 3, 2)
    gone = tmp_path / ".checkpoint-1.partial"
    assert gone.is_dir() and [step for step, _ in checkpoints(tmp_path)] == [2, 3]
    assert f"{gone} is not removed" in capsys.readouterr().out
    _tidy(tmp_path)
    assert not gone.exists() and [step for step, _ in checkpoints(tmp_path)] == [2, 3]
