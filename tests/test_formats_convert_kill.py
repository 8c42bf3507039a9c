"""Conversions killed with SIGKILL at random moments: no output until it is complete; the same
command continues.
"""

import hashlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tqdm import tqdm

from checkpoint_tools.hf_to_megatron import HfToMegatronConfig
from checkpoint_tools.hf_to_megatron import convert as hf_to_megatron
from checkpoint_tools.megatron_to_hf import MegatronToHfConfig
from checkpoint_tools.megatron_to_hf import convert as megatron_to_hf
from checkpoint_tools.merge_lora import MergeLoraConfig
from checkpoint_tools.merge_lora import convert as merge_lora
from megatron_gkd.formats import job as job_module
from megatron_gkd.formats import workers
from megatron_gkd.formats.job import DONE, Job, Journal, run_job
from megatron_gkd.model.args import read_model_args
from tests.adapters import ALL, random_adapter, write_adapter
from tests.conversions import TIED
from tests.test_formats_convert import assert_same_folder

SHARD_BYTES = 60_000
MOST_KILLS = 12
MANY = 1000


def kill_until_done(command, config, *args):
    """Run `command` in processes that are killed: three after a random number of shards and
    a random moment more, then some at random times until one gets through. -> the most shards that
    one found done (the last may find none: it may only have to remove an empty folder).
    """
    draw, output, most = random.Random(0), Path(config.output), 0
    partial = output.with_name(f".{output.name}.partial")
    journal = partial / "journal.jsonl"

    def finished_shards():
        return max(journal.read_text().count("\n") - 1, 0) if journal.is_file() else 0

    for kill in range(MOST_KILLS):
        found = finished_shards()
        most = max(most, found)
        more = draw.randint(1, 6) if kill < 3 else MANY
        process = multiprocessing.get_context("fork").Process(
            target=with_bars_of_its_own, args=(command, config, *args, more)
        )
        process.start()
        if kill < 3:
            while finished_shards() < found + more and process.exitcode is None:
                time.sleep(0.002)
        process.join(draw.uniform(0, 0.05) if kill < 3 else draw.uniform(0.02, 0.5))
        if process.exitcode is not None:
            assert process.exitcode == 0 and kill >= 3
            return most
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not output.exists() or not (partial / "content").exists()
        if output.exists() and not (partial / DONE).exists():
            # it had done everything, but perhaps for the removal of an empty folder
            assert kill >= 3
            if partial.exists():
                partial.rmdir()  # raises where it is not empty
            return most
    command(config, *args, MANY)
    return most


def with_bars_of_its_own(command, *args):
    """Forks share tqdm's lock with their parent: one that is killed while it holds it would stop
    all later ones.
    """
    tqdm.set_lock(threading.RLock())
    command(*args)


def convert_slowly(config, convert, shard_bytes, most_shards):
    """Every shard takes a while, so that kills fall into all of them. A worker that has done
    `most_shards` does no more: on a busy machine a kill can be late.
    """
    with pytest.MonkeyPatch.context() as patch:
        serve = workers._serve

        def serve_slowly(connection, work, parent):
            shards = itertools.count()

            def work_slowly(shard, report):
                time.sleep(0.05)
                while next(shards) >= most_shards:
                    report(0)  # which ends a worker whose parent is gone
                    time.sleep(0.05)
                return work(shard, report)

            serve(connection, work_slowly, parent)

        patch.setattr(workers, "_serve", serve_slowly)
        convert(config, shard_bytes)


def test_both_directions_survive_kills(tiny_folder, tmp_path):
    """The result is byte for byte that of runs that nobody killed."""
    folder = tiny_folder(**TIED)
    there = HfToMegatronConfig(folder, str(tmp_path / "checkpoint"), num_workers=2)
    assert kill_until_done(convert_slowly, there, hf_to_megatron, SHARD_BYTES) > 2
    back = MegatronToHfConfig(str(tmp_path / "checkpoint"), str(tmp_path / "back"), num_workers=2)
    assert kill_until_done(convert_slowly, back, megatron_to_hf, SHARD_BYTES) > 2
    assert_same_folder(folder, tmp_path / "back")
    hf_to_megatron(HfToMegatronConfig(folder, str(tmp_path / "calm"), num_workers=2), SHARD_BYTES)
    assert not list(tmp_path.glob(".*.partial"))
    calm, killed = (folder_hashes(tmp_path / name) for name in ("calm", "checkpoint"))
    assert calm == killed


def test_a_merge_survives_kills(tiny_folder, tmp_path):
    folder = tiny_folder(**TIED)
    tensors = random_adapter(read_model_args(folder), 2, ALL)
    adapter = write_adapter(tmp_path / "adapter", tensors, rank=2, alpha=4, targets=ALL)
    config = MergeLoraConfig(folder, str(tmp_path / "killed"), [adapter], num_workers=2)
    assert kill_until_done(convert_slowly, config, merge_lora, SHARD_BYTES) > 2
    merge_lora(replace(config, output=str(tmp_path / "calm")), SHARD_BYTES)
    assert not list(tmp_path.glob(".*.partial"))
    assert folder_hashes(tmp_path / "calm") == folder_hashes(tmp_path / "killed")


def folder_hashes(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


# --- the parts ------------------------------------------------------------------------------------


def make_job(tmp_path, **changes):
    return Job(
        tmp_path / "out",
        **(dict(identity={"source": "a"}, shard_bytes=[3, 3, 3], other_bytes=0) | changes),
    )


def nothing(*args):
    return None


def test_finished_shards_are_not_done_again(tmp_path):
    job, done = make_job(tmp_path), tmp_path / "done"
    done.mkdir()

    def work(shard, report):
        if shard == 2 and not (done / "once").exists():
            (done / "once").touch()
            raise ValueError("shard 2 fails once")
        (done / f"{shard}-{time.monotonic_ns()}").touch()
        return shard * 10

    with pytest.raises(ValueError, match="shard 2 fails once"):
        run_job(job, nothing, work, nothing, num_workers=1)
    assert not job.output.exists()
    with open(job.partial / "journal.jsonl", "a") as file:
        file.write("[2, 1")  # a line that was being written
    results = []
    assert run_job(job, nothing, work, lambda found: results.extend(found), num_workers=2)
    assert results == [0, 10, 20]
    assert sorted(path.name[0] for path in done.iterdir() if path.name != "once") == ["0", "1", "2"]
    assert job.output.is_dir() and not job.partial.exists()


def write_shards(job):
    """Run the job: shard n writes the byte n into the file n."""

    def work(shard, report):
        (job.content / str(shard)).write_bytes(bytes([shard]))
        return shard

    return run_job(
        job,
        nothing,
        work,
        lambda results: (job.content / "list").write_text(str(results)),
        num_workers=1,
    )


def is_whole(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()} == {
        **{str(shard): bytes([shard]) for shard in range(3)},
        "list": b"[0, 1, 2]",
    }


def killed_before(step, job, monkeypatch):
    """The job, killed where it comes to the function `step` of job.py."""
    with monkeypatch.context() as patch:
        patch.setattr(job_module, step, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        process = multiprocessing.get_context("fork").Process(target=write_shards, args=(job,))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL


def test_killed_before_the_rename(tmp_path, monkeypatch):
    """All is finished and marked so: the same command only renames, another one is refused."""
    job = make_job(tmp_path)
    killed_before("_publish", job, monkeypatch)
    assert not job.output.exists()
    with pytest.raises(ValueError, match="left by another conversion"):
        write_shards(make_job(tmp_path, identity={"source": "b"}))
    (job.partial / "journal.jsonl").unlink()  # as a moment later
    with pytest.raises(ValueError, match="left by another conversion"):
        write_shards(make_job(tmp_path, identity={"source": "b"}))
    assert run_job(job, nothing, die, nothing, num_workers=1)
    assert is_whole(job.output) and not job.partial.exists()


def test_killed_between_rename_and_tidying_up(tmp_path, monkeypatch):
    """OUTPUT is complete: the same command says so; another conversion does not take it for its
    own.
    """
    job = make_job(tmp_path)
    killed_before("_tidy_up", job, monkeypatch)
    assert is_whole(job.output)
    assert not run_job(job, nothing, die, nothing, num_workers=1)
    assert is_whole(job.output) and not job.partial.exists()

    other = make_job(tmp_path, identity={"source": "b"}, shard_bytes=[1])
    job.output.rename(tmp_path / "first")
    killed_before("_tidy_up", job, monkeypatch)
    with pytest.raises(ValueError, match="out exists and is not an empty folder"):
        run_job(other, nothing, die, nothing, num_workers=1)
    assert is_whole(job.output) and not job.partial.exists()


def test_killed_after_the_rename_and_then_moved_away(tmp_path, monkeypatch):
    """The same command writes the folder again: what the first one noted as finished is not there
    any more.
    """
    job = make_job(tmp_path)
    for number in range(2):
        killed_before("_tidy_up", job, monkeypatch)
        job.output.rename(tmp_path / f"moved-{number}")
        if number:
            job.output.mkdir()
        assert write_shards(job)
        assert is_whole(job.output) and not job.partial.exists()
        shutil.rmtree(job.output)


def test_an_empty_output_is_not_a_complete_one(tmp_path):
    """Beside it a partial folder without content, as a kill at the very start leaves it."""
    job = make_job(tmp_path)
    job.output.mkdir()
    job.partial.mkdir()
    (job.partial / "lock").touch()
    assert write_shards(job)
    assert is_whole(job.output) and not job.partial.exists()


def test_a_refusal_leaves_nothing(tmp_path, monkeypatch):
    """Full disk, output inside the source: no partial folder that would stop the next command."""
    job = make_job(tmp_path, sources=[tmp_path])
    with pytest.raises(
        ValueError, match=f"--output {job.output} lies in {tmp_path}, which is only read"
    ):
        write_shards(job)
    job = make_job(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1))
        for partial_exists in (False, True):
            if partial_exists:
                job.partial.mkdir()
            with pytest.raises(ValueError, match="0.0 GB are free there"):
                write_shards(job)
            assert not list(tmp_path.iterdir())
    assert write_shards(make_job(tmp_path, identity={"source": "b"}))


def test_the_second_of_two_commands_finds_the_first_ones_work(tmp_path):
    """It waits for the lock, then writes neither into a folder that is gone nor a second time."""
    job, results = make_job(tmp_path), tmp_path / "results"
    results.mkdir()

    def command(number):
        def work(shard, report):
            (results / f"shard-{number}-{shard}").touch()
            time.sleep(0.1)
            (job.content / str(shard)).write_bytes(bytes([shard]))
            return shard

        finish = lambda found: (job.content / "list").write_text(str(found))
        try:
            run_job(job, nothing, work, finish, num_workers=1)
        except ValueError as error:
            (results / f"refused-{number}").write_text(str(error))

    processes = [
        multiprocessing.get_context("fork").Process(target=command, args=(n,)) for n in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert is_whole(job.output) and not job.partial.exists()
    assert len(list(results.glob("shard-*"))) == 3
    refused = [path.read_text() for path in results.glob("refused-*")]
    assert (
        all("exists and is not an empty folder" in text for text in refused) and len(refused) <= 1
    )


def test_another_conversion_is_not_continued(tmp_path):
    job = make_job(tmp_path)
    job.content.mkdir(parents=True)
    Journal(job.partial / "journal.jsonl", {"source": "b"}, 3)
    with pytest.raises(
        ValueError, match="left by another conversion, or the source has changed since; remove it"
    ):
        run_job(job, nothing, nothing, nothing, num_workers=1)


def test_two_commands_do_not_write_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "_WAIT_FOR_LOCK", 0.2)
    job = make_job(tmp_path)
    with job_module._locked(job.partial):
        with pytest.raises(ValueError, match="another command is writing this conversion"):
            run_job(job, nothing, nothing, nothing, num_workers=1)


def die(shard, report):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_worker_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match="a worker process died"):
        run_job(make_job(tmp_path), nothing, die, nothing, num_workers=2)
    assert not (tmp_path / "out").exists()


def test_whatever_a_worker_raises_is_reported(tmp_path):
    with pytest.raises(ValueError, match="ZeroDivisionError: division by zero"):
        run_job(make_job(tmp_path), nothing, lambda shard, report: 1 / 0, nothing, num_workers=1)
    assert not (tmp_path / "out").exists()


def test_what_is_needed_counts_what_is_there(tmp_path, monkeypatch):
    """A continued conversion needs room for the rest alone."""
    free = job_module._SPARE_BYTES + 50_000
    monkeypatch.setattr(
        job_module.shutil,
        "disk_usage",
        lambda path: job_module.shutil._ntuple_diskusage(free, 0, free),
    )
    job = make_job(tmp_path, shard_bytes=[100_000])
    with pytest.raises(ValueError, match="0.1 GB are needed and 0.1 GB are free"):
        run_job(job, nothing, nothing, nothing, num_workers=1)
    job.content.mkdir(parents=True)
    Journal(job.partial / "journal.jsonl", job.identity, 1)
    (job.content / "written").write_bytes(os.urandom(80_000))
    assert run_job(job, nothing, lambda shard, report: 0, nothing, num_workers=1)
