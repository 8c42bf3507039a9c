"""Conversions killed with SIGKILL at random moments: no output until it is complete; the same command continues."""

import hashlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from checkpoint_tools import job as job_module
from checkpoint_tools import workers
from checkpoint_tools.hf_to_megatron import HfToMegatronConfig
from checkpoint_tools.hf_to_megatron import convert as hf_to_megatron
from checkpoint_tools.job import Job, Journal, run_job
from checkpoint_tools.megatron_to_hf import MegatronToHfConfig
from checkpoint_tools.megatron_to_hf import convert as megatron_to_hf
from megatron_gkd.model.torch_dist import TorchDist
from tests.test_convert import TIED, assert_same_folder

UNIT_BYTES = 60_000
MOST_KILLS = 12


def kill_until_done(command, config, *args):
    """Run `command` in processes that are killed: three after a random number of finished units and a random moment
    more, then some at random times until one gets through. -> how many units the last one found done.
    """
    draw, output = random.Random(0), Path(config.output)
    journal = output.with_name(f".{output.name}.partial") / "journal.jsonl"

    def finished_units():
        return max(journal.read_text().count("\n") - 1, 0) if journal.is_file() else 0

    for kill in range(MOST_KILLS):
        found = finished_units()
        process = multiprocessing.get_context("fork").Process(target=command, args=(config, *args))
        process.start()
        if kill < 3:
            enough = found + draw.randint(1, 6)
            while finished_units() < enough and process.exitcode is None:
                time.sleep(0.002)
        process.join(draw.uniform(0, 0.05) if kill < 3 else draw.uniform(0.02, 0.5))
        if process.exitcode is not None:
            assert process.exitcode == 0 and kill >= 3
            return found
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not output.exists() or not (output.parent / f".{output.name}.partial" / "content").exists()
    found = finished_units()
    command(config, *args)
    return found


def convert_slowly(config, convert, *args):
    """Every unit takes a while, so that kills fall into all of them."""
    with pytest.MonkeyPatch.context() as patch:
        serve = workers._serve

        def serve_slowly(connection, work, parent):
            serve(connection, lambda unit, report: time.sleep(0.02) or work(unit, report), parent)

        patch.setattr(workers, "_serve", serve_slowly)
        convert(config, *args)


def test_both_directions_survive_kills(tiny_folder, tmp_path):
    """The result is byte for byte that of runs that nobody killed."""
    folder = tiny_folder(**TIED)
    there = HfToMegatronConfig(folder, str(tmp_path / "checkpoint"), num_workers=2)
    assert kill_until_done(convert_slowly, there, hf_to_megatron, UNIT_BYTES) > 2
    back = MegatronToHfConfig(str(tmp_path / "checkpoint"), str(tmp_path / "back"), num_workers=2)
    assert kill_until_done(convert_slowly, back, megatron_to_hf, UNIT_BYTES) > 2
    assert_same_folder(folder, tmp_path / "back")
    hf_to_megatron(HfToMegatronConfig(folder, str(tmp_path / "calm"), num_workers=2), UNIT_BYTES)
    assert not list(tmp_path.glob(".*.partial"))
    calm, killed = (folder_hashes(tmp_path / name) for name in ("calm", "checkpoint"))
    del calm["release/.metadata"], killed["release/.metadata"]  # equal lists, which pickle abbreviates differently
    assert calm == killed
    calm, killed = (vars(TorchDist(tmp_path / name / "release")) for name in ("calm", "checkpoint"))
    assert all(calm[part] == killed[part] for part in ("sizes", "dtypes", "_chunks"))


def folder_hashes(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# --- the parts --------------------------------------------------------------------------------------------------------


def make_job(tmp_path, **changes):
    return Job(tmp_path / "out", **(dict(identity={"source": "a"}, unit_bytes=[3, 3, 3], other_bytes=0) | changes))


def nothing(*args):
    return None


def test_finished_units_are_not_done_again(tmp_path):
    job, done = make_job(tmp_path), tmp_path / "done"
    done.mkdir()

    def work(unit, report):
        if unit == 2 and not (done / "once").exists():
            (done / "once").touch()
            raise ValueError("unit 2 fails once")
        (done / f"{unit}-{time.monotonic_ns()}").touch()
        return unit * 10

    with pytest.raises(ValueError, match="unit 2 fails once"):
        run_job(job, nothing, work, nothing, num_workers=1)
    assert not job.output.exists()
    with open(job.partial / "journal.jsonl", "a") as file:
        file.write("[2, 1")  # a line that was being written
    results = []
    assert run_job(job, nothing, work, lambda found: results.extend(found), num_workers=2)
    assert results == [0, 10, 20]
    assert sorted(path.name[0] for path in done.iterdir() if path.name != "once") == ["0", "1", "2"]
    assert job.output.is_dir() and not job.partial.exists()


def test_killed_between_rename_and_tidying_up(tmp_path):
    job = make_job(tmp_path)
    run_job(job, nothing, lambda unit, report: 0, lambda results: (job.content / "file").touch(), num_workers=1)
    job.partial.mkdir()
    (job.partial / "journal.jsonl").touch()
    assert not run_job(job, nothing, nothing, nothing, num_workers=1)
    assert not job.partial.exists() and (job.output / "file").exists()


def test_another_conversion_is_not_continued(tmp_path):
    job = make_job(tmp_path)
    job.content.mkdir(parents=True)
    Journal(job.partial / "journal.jsonl", {"source": "b"}, 3)
    with pytest.raises(ValueError, match="left by another conversion, or the source has changed since; remove it"):
        run_job(job, nothing, nothing, nothing, num_workers=1)


def test_two_commands_do_not_write_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "_WAIT_FOR_LOCK", 0.2)
    job = make_job(tmp_path)
    job.content.mkdir(parents=True)
    with job_module._locked(job.partial / "lock"):
        with pytest.raises(ValueError, match="another command is writing this conversion"):
            run_job(job, nothing, nothing, nothing, num_workers=1)


def die(unit, report):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_worker_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match="a worker process died"):
        run_job(make_job(tmp_path), nothing, die, nothing, num_workers=2)
    assert not (tmp_path / "out").exists()


def test_what_is_needed_counts_what_is_there(tmp_path, monkeypatch):
    """A continued conversion needs room for the rest alone."""
    free = job_module._SPARE_BYTES + 50_000
    monkeypatch.setattr(
        job_module.shutil, "disk_usage", lambda path: job_module.shutil._ntuple_diskusage(free, 0, free)
    )
    job = make_job(tmp_path, unit_bytes=[100_000])
    with pytest.raises(ValueError, match="0.1 GB are needed and 0.1 GB are free"):
        run_job(job, nothing, nothing, nothing, num_workers=1)
    (job.content / "written").write_bytes(os.urandom(80_000))
    assert run_job(job, nothing, lambda unit, report: 0, nothing, num_workers=1)
