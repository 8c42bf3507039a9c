"""Runs that are told to stop or killed, at any moment: SIGTERM saves, SIGKILL leaves a checkpoint
to go on from, no worker is left behind.
"""

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_gkd import checkpoint
from megatron_gkd.checkpoint import checkpoints, find_checkpoint
from tests.ports import free_port
from tests.ranks import run_ranks
from tests.test_checkpoint import STATE, assert_same_run, flags_of_run, write_data
from tests.test_child_processes import assert_they_end, children, is_alive
from tests.test_train_prompts import without_response
from tests.train_runs import layout_flags, make_rows, read_lines, run_training, write_rows


@pytest.fixture(scope="module")
def data(tiny_folder, tmp_path_factory):
    return write_data(tiny_folder, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of two tensor-parallel ranks that nothing has stopped."""
    output = tmp_path_factory.mktemp("whole")
    run_training(2, flags_of_run(data, output, **layout_flags(tp=2)))
    return output


def launch_run(
    argv: list[str], log_path: Path, nproc: int, meet: Sequence[str] = ("--standalone",)
) -> subprocess.Popen:
    """torchrun, its output in a file: an orphan would hold a pipe."""
    torchrun = [
        str(Path(sys.executable).with_name("torchrun")),
        *meet,
        "--nproc_per_node",
        str(nproc),
    ]
    with log_path.open("w") as log:
        command = [*torchrun, "-m", "megatron_gkd.train", *argv]
        more = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240"}
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | more)


def wait_until(reached, launcher: subprocess.Popen, log_path: Path) -> None:
    deadline = time.monotonic() + 240
    while True:
        has_ended = launcher.poll() is not None  # before: a run may end right after it
        if reached():
            return
        assert not has_ended and time.monotonic() < deadline, log_path.read_text()
        time.sleep(0.02)


def latest_step(output: Path) -> int:
    folder = find_checkpoint("latest", output)
    return int(folder.name.removeprefix("checkpoint-")) if folder else 0


def signal_run(argv: list[str], log_path: Path, newest: int, whom: str) -> str:
    """torchrun on two ranks; when checkpoint `newest` or a later one is said to be the latest, at a
    random moment, SIGKILL to all its processes or SIGTERM to torchrun. Its log.
    """
    output = Path(argv[argv.index("--output_dir") + 1])
    for _ in range(4):
        launcher = launch_run(argv, log_path, nproc=2)
        wait_until(lambda: latest_step(output) >= newest, launcher, log_path)
        time.sleep(random.random() / 4)
        ranks = [] if launcher.poll() is not None else children(launcher.pid)
        if whom == "torchrun":
            launcher.terminate()
        elif len(ranks) == 2:
            for pid in [launcher.pid, *ranks]:
                os.kill(pid, signal.SIGKILL)
        status = launcher.wait()
        if read_lines(output / "metrics.jsonl")[-1]["step"] < 24:
            assert status != 0
            return log_path.read_text()
        shutil.rmtree(output)  # where others keep this process waiting a run is over before it
    pytest.fail("every run was over before the signal")


@pytest.mark.parametrize("whom", ["torchrun", pytest.param("all", marks=pytest.mark.extended)])
def test_signals(data, tmp_path, whom):
    """The real thing, at a random moment: told to stop (loader workers get SIGTERM, too) or killed,
    and resumed.
    """
    flags = layout_flags(tp=2, ep=2) | dict(max_steps=24, save_steps=4, save_total_limit=2)
    run_training(2, flags_of_run(data, tmp_path / "whole", **flags))
    output = tmp_path / "stopped"
    argv = flags_of_run(data, output, resume_from_checkpoint="latest", **flags)
    workers = ["--dataloader_num_workers", "2"] if whom == "torchrun" else []
    said = signal_run([*argv, *workers], tmp_path / "log", 4, whom)
    assert "no checkpoint in" in said
    if whom == "torchrun":
        assert "SIGTERM: stopped after step" in said
        assert latest_step(output) == read_lines(output / "metrics.jsonl")[-1]["step"]
    last = latest_step(output)
    assert f"checkpoint-{last} at step {last} of 24" in run_training(2, argv)
    assert_same_run(output, tmp_path / "whole", 24)


def ranks_and_workers(launcher: subprocess.Popen) -> list[int]:
    ranks = children(launcher.pid)
    return ranks + [worker for rank in ranks for worker in children(rank)]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.extended),
        pytest.param(signal.SIGHUP, marks=pytest.mark.extended),
    ],
)
def test_a_signal_to_torchrun_alone(data, tmp_path, number):
    """The ranks and their workers end in seconds, having saved: also where torchrun itself is
    killed, and with it the store at which its ranks have met.
    """
    output = tmp_path / "out"
    flags = layout_flags(tp=2, ep=2) | dict(max_steps=2000, save_steps=2000, val_dataset=None)
    argv = flags_of_run(data, output, dataloader_num_workers=1, lmbda=0, **flags)
    launcher, metrics = launch_run(argv, tmp_path / "log", nproc=2), output / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size, launcher, tmp_path / "log")
    begun = ranks_and_workers(launcher)
    assert len(begun) == 4
    launcher.send_signal(number)
    assert launcher.wait() != 0
    try:
        assert_they_end(begun)
    finally:
        for process in filter(is_alive, begun):
            os.kill(process, signal.SIGKILL)
    said, step = (tmp_path / "log").read_text(), latest_step(output)
    what = "the launcher died" if number == signal.SIGKILL else number.name
    assert f"megatron_gkd: {what}: the run ends after this step and saves" in said
    line = f"{what}: stopped after step {step} of 2000; go on with --resume_from_checkpoint latest"
    assert line in said.splitlines()
    assert step == read_lines(metrics)[-1]["step"] > 0


@pytest.mark.extended
@pytest.mark.parametrize("first", [0, 1])
def test_sigterm_to_the_torchrun_of_one_node(data, tmp_path, first):
    """Both nodes save and end, and the other's torchrun with them: it does not wait for the one
    that has left (torch's exit barrier, five minutes).
    """
    output, launchers = tmp_path / "out", []
    flags = layout_flags(tp=2) | dict(max_steps=2000, save_steps=2000, val_dataset=None)
    argv = flags_of_run(data, output, lmbda=0, **flags)
    port = str(free_port())
    for node in range(2):
        meet = ["--nnodes", "2", "--node_rank", str(node)]
        meet += ["--master_addr", "127.0.0.1", "--master_port", port]
        launchers.append(launch_run(argv, tmp_path / f"log-{node}", 1, meet))
    metrics, log = output / "metrics.jsonl", tmp_path / "log-0"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size, launchers[0], log)
    launchers[first].terminate()
    try:
        statuses = [launcher.wait(timeout=120) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()  # its rank ends with it
    assert 0 not in statuses
    step = latest_step(output)
    assert f"SIGTERM: stopped after step {step} of 2000" in log.read_text()
    assert step == read_lines(metrics)[-1]["step"] > 0


def _train_with_signal(rank, world_size, argv, step, during="step", number=signal.SIGTERM):
    """A signal reaches the last rank alone, after it has done `step` steps, or in the evaluation
    after them: at its first or second batch, at its end, or in the answers behind it. What the
    rank said, its exit status, and whether the signal means again what it did.
    """
    from megatron_gkd import parallel, train
    from megatron_gkd.rollout_log import RolloutLog
    from megatron_gkd.run import Progress, Run

    train.destroy = parallel.parallel_state.destroy_model_parallel
    count, eval_batches, said = Progress.count, Run.eval_batches, io.StringIO()
    answer = RolloutLog.of_evaluation

    def kill(here, steps):
        if during == here and steps == step and rank == world_size - 1:
            os.kill(os.getpid(), number)

    def count_and_kill(progress, *args):
        count(progress, *args)
        kill("step", progress.step)

    def eval_batches_and_kill(run):
        for number, batches in enumerate(eval_batches(run)):
            kill(("evaluation", "second batch")[number] if number < 2 else "", run.progress.step)
            yield batches
        kill("end of the evaluation", run.progress.step)

    def answer_and_kill(log, step):
        kill("answers", step)
        return answer(log, step)

    Progress.count, Run.eval_batches = count_and_kill, eval_batches_and_kill
    RolloutLog.of_evaluation = answer_and_kill
    before, status = signal.getsignal(number), 0
    try:
        with contextlib.redirect_stdout(said):
            train.main(argv)
    except SystemExit as end:
        status = end.code
    return said.getvalue(), status, signal.getsignal(number) == before


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGHUP,
        pytest.param(signal.SIGINT, marks=pytest.mark.extended),
        pytest.param(signal.SIGQUIT, marks=pytest.mark.extended),
    ],
)
def test_a_signal_saves_and_stops(data, whole, tmp_path, number):
    """Each rank ends with the signal's exit status, also those that it has not reached."""
    flags = layout_flags(tp=2)
    (said, *of_0), (_, *of_1) = run_ranks(
        _train_with_signal, 2, flags_of_run(data, tmp_path / "out", **flags), 4, "step", number
    )
    assert of_0 == of_1 == [128 + number, True]
    line = f"{number.name}: stopped after step 4 of 6; go on with --resume_from_checkpoint latest"
    assert line in said.splitlines()
    assert [step for step, _ in checkpoints(tmp_path / "out")] == [3, 4]
    assert read_lines(tmp_path / "out" / "metrics.jsonl")[-1]["step"] == 4
    if number == signal.SIGTERM:
        argv = flags_of_run(data, tmp_path / "out", resume_from_checkpoint="latest", **flags)
        run_training(2, argv)
        assert_same_run(tmp_path / "out", whole, 6)


@pytest.mark.parametrize("during", ["evaluation", "end of the evaluation", "answers"])
def test_sigterm_in_an_evaluation(data, whole, tmp_path, during):
    """It may take longer than what sent the signal waits: it is not finished, but made at the start
    of the resumed run.
    """
    argv = flags_of_run(data, tmp_path / "out", **layout_flags(tp=2))
    (said, *_), _ = run_ranks(_train_with_signal, 2, argv, 4, during)
    assert "SIGTERM: stopped after step 4 of 6; go on with" in said
    assert [step for step, _ in checkpoints(tmp_path / "out")] == [3, 4]
    steps = [line["step"] for line in read_lines(tmp_path / "out" / "eval.jsonl")]
    assert steps == ([0, 2, 4] if during == "answers" else [0, 2])
    run_training(2, [*argv, "--resume_from_checkpoint", "latest"])
    assert_same_run(tmp_path / "out", whole, 6)


def test_sigterm_between_the_rollouts_of_an_evaluation(data, tmp_path):
    """Five prompts alone are written two at a time, by two replicas: after a signal none of the
    next ones, which may take longer than what sent it waits.
    """
    prompts = [without_response(row) for row in make_rows(5, seed=1)]
    flags = dict(per_device_train_batch_size=1, gradient_accumulation_steps=1, lmbda=0)
    flags |= dict(max_steps=2, eval_steps=1, log_rollouts=0)
    flags |= dict(val_dataset=write_rows(tmp_path / "prompts.jsonl", prompts))
    argv = flags_of_run(data, tmp_path / "out", **flags)
    (said, *_), _ = run_ranks(_train_with_signal, 2, argv, 1, "second batch")
    assert "SIGTERM: stopped after step 1 of 2; go on with" in said
    lines = tmp_path / "out" / "eval.jsonl"
    assert [line["step"] for line in read_lines(lines)] == [0]
    run_training(2, [*argv, "--resume_from_checkpoint", "latest"])
    assert [line["step"] for line in read_lines(lines)] == [0, 1, 2]


def test_what_cannot_be_resumed_is_not_said_to_be(data, tmp_path):
    argv = flags_of_run(data, tmp_path, save_only_model=True, lmbda=0)
    ((said, *_),) = run_ranks(_train_with_signal, 1, argv, 4)
    folder = tmp_path / "checkpoint-4"
    assert (
        f"SIGTERM: stopped after step 4 of 6; go on with --adapter {folder} (--save_only_model)"
        in said
    )
    assert [step for step, _ in checkpoints(tmp_path)] == [3, 4]


def test_a_run_that_fails_ends_its_workers(data, tmp_path):
    """Loader workers ignore SIGTERM: left alone, they keep their process, and torchrun with it, for
    ever.
    """
    output = tmp_path / "out"
    output.mkdir()
    (output / ".checkpoint-1.partial").touch()  # a file where saving expects a folder
    argv = flags_of_run(
        data, output, dataloader_num_workers=1, lmbda=0, max_steps=9, save_steps=1, val_dataset=None
    )
    launcher = launch_run(argv, tmp_path / "log", nproc=1)
    metrics = output / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size, launcher, tmp_path / "log")
    try:
        assert launcher.wait(timeout=240) != 0
    except subprocess.TimeoutExpired:
        (rank,) = children(launcher.pid)
        for pid in [launcher.pid, rank]:
            os.kill(pid, signal.SIGKILL)
        raise
    assert "megatron_gkd: error: rank 0 cannot write its part of" in (tmp_path / "log").read_text()


def _train_killed_while_saving(rank, world_size, argv, step):
    from megatron_gkd import train

    replace = checkpoint._replace

    def die(partial, final):
        if final.name == f"checkpoint-{step}":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(partial, final)

    checkpoint._replace = die
    train.main(argv)


def test_killed_while_saving(data, tmp_path):
    """Everything is written but not renamed: the checkpoint before it counts, the half one is
    cleaned away.
    """
    run_training(1, flags_of_run(data, tmp_path / "whole", save_steps=2))
    with pytest.raises(RuntimeError, match="died without a word"):
        run_ranks(
            _train_killed_while_saving, 1, flags_of_run(data, tmp_path / "killed", save_steps=2), 4
        )
    output = tmp_path / "killed"
    assert (output / ".checkpoint-4.partial" / STATE).is_file()
    assert (output / checkpoint.LATEST).read_text() == "checkpoint-2\n"
    assert find_checkpoint("latest", output) == output / "checkpoint-2"
    run_training(1, flags_of_run(data, output, save_steps=3, resume_from_checkpoint="latest"))
    assert [step for step, _ in checkpoints(output)] == [2, 3, 6] and not list(
        output.glob(".checkpoint-*")
    )
    assert_same_run(output, tmp_path / "whole", 6)
