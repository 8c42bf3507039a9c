"""Faults between two machines (tests/two_nodes.py): what each of them says, how soon it ends, and
how the run goes on.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.train_runs import make_rows, read_lines, run_training, stable, write_rows
from tests.two_nodes import NAMES, Node, two_nodes, wait_all

REPOSITORY = Path(__file__).parents[1]
LIMIT = 6  # --collective_timeout
STEPS = 300
SECONDS_TO_START = 120
STATED_SECONDS = LIMIT + 14  # the beats, the last words, the launchers


@pytest.fixture(scope="module")
def environment(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("faults")
    sizes = dict(num_hidden_layers=2, hidden_size=64, head_dim=16, vocab_size=1024)
    return os.environ | {
        "MODEL": tiny_folder(**sizes),
        "DATASET": write_rows(folder / "rows.jsonl", make_rows(16)),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }


def flags_of(environment, output: Path, *flags: str) -> list[str]:
    """Of the training command: TP 2, EP 2, a step takes 20 ms."""
    return [
        *("--model", environment["MODEL"], "--dataset", environment["DATASET"]),
        *("--output_dir", str(output), "--device", "cpu", "--torch_dtype", "float32"),
        *("--attn_impl", "sdpa", "--lmbda", "0", "--sft_alpha", "0.3", "--report_to", "none"),
        *("--tensor_model_parallel_size", "2", "--expert_model_parallel_size", "2"),
        *("--per_device_train_batch_size", "2", "--logging_steps", "1", "--save_steps", "50"),
        *("--max_steps", str(STEPS), "--collective_timeout", str(LIMIT), *flags),
    ]


@pytest.fixture(scope="module")
def undisturbed(environment, tmp_path_factory):
    """The folder of the run that nothing happens to, on one machine."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    run_training(2, flags_of(environment, output))
    return output


class Pair:
    """A run with a rank on each of two nodes, which have no folder for temporary files in common,
    as machines have none.
    """

    def __init__(self, nodes: list[Node], folder: Path, environment):
        self.nodes, self.environment, self.output = nodes, environment, folder / "out"
        self.logs = [folder / f"{name}.log" for name in NAMES]
        self.temporary = [folder / f"{name}.tmp" for name in NAMES]
        for one in self.temporary:
            one.mkdir(exist_ok=True)

    def start_node(self, rank: int, *flags: str, launch=None, environment=None):
        where = ["--nnodes", "2", "--node_rank", str(rank), "--master_addr", NAMES[0]]
        command = [sys.executable, "-m", "megatron_gkd.launch", *(launch or where)]
        command += ["--nproc_per_node", "1", "-m", "megatron_gkd.train"]
        command += flags_of(self.environment, self.output, *flags)
        own = {"TMPDIR": str(self.temporary[rank])} | (environment or {})
        return self.nodes[rank].start(command, self.environment | own, self.logs[rank])

    def start(self, *flags: str, of_second: tuple[str, ...] = (), launch=None):
        return [
            self.start_node(rank, *flags, *(of_second if rank else ()), launch=launch)
            for rank in (0, 1)
        ]

    def last_line(self, rank: int) -> str:
        return self.logs[rank].read_text().splitlines()[-1]

    def wait_for_checkpoint(self, programs, step: int) -> None:
        until = time.monotonic() + SECONDS_TO_START
        while not (self.output / f"checkpoint-{step}").exists():
            assert time.monotonic() < until, self.tails()
            assert all(one.poll() is None for one in programs), self.tails()
            time.sleep(0.05)
        time.sleep(1.5)  # so that the ranks have told of a step

    def process(self, rank: int) -> int:
        """The process number of a rank, as this machine counts."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if f"RANK={rank}".encode() in variables and str(self.output).encode() in command:
                return int(folder.name)
        raise AssertionError(f"no rank {rank}: {self.tails()}")

    def check_no_traceback(self) -> None:
        for log in self.logs:
            text = log.read_text()
            assert "Traceback" not in text and "gloo/" not in text, self.tails()

    def tails(self) -> str:
        return "\n----\n".join(log.read_text()[-3000:] for log in self.logs)


def check_same_run(output: Path, undisturbed: Path) -> None:
    """Metrics, adapter and optimizer, to the bit."""
    found, wanted = (stable(read_lines(one / "metrics.jsonl")) for one in (output, undisturbed))
    assert len(wanted) == STEPS and found == wanted
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        found, wanted = (
            load_file(one / f"checkpoint-{STEPS}" / name) for one in (output, undisturbed)
        )
        assert found.keys() == wanted.keys()
        assert all((found[key] == wanted[key]).all() for key in wanted), name


@pytest.mark.parametrize(
    "flag, value, parts",
    [
        ("--dataset", "absent.jsonl", ["absent.jsonl does not exist"]),
        pytest.param("--model", "absent", ["no config.json"], marks=pytest.mark.extended),
        pytest.param("--lora_rnk", "4", ["--lora_rnk"], marks=pytest.mark.extended),
        pytest.param(
            *("--dataset", "other.jsonl", ["rows of --dataset", "other.jsonl, --model"]),
            marks=pytest.mark.extended,
        ),
        pytest.param("code", "", ["has code of megatron_gkd"], marks=pytest.mark.extended),
        pytest.param("--lora_rank", "4", ["has --lora_rank 4"], marks=pytest.mark.extended),
    ],
)
def test_a_node_that_ends_early_takes_the_other_down(environment, tmp_path, flag, value, parts):
    """Both machines' last line is that of the one with the fault, and names it."""
    write_rows(tmp_path / "other.jsonl", make_rows(15))
    value = str(tmp_path / value) if flag in ("--dataset", "--model") else value
    with two_nodes(tmp_path) as nodes:
        pair = Pair(nodes, tmp_path, environment)
        if flag == "code":
            other = shutil.copytree(REPOSITORY / "megatron_gkd", tmp_path / "code/megatron_gkd")
            with open(other / "health.py", "a") as file:
                file.write("OTHER = 1\n")
            programs = [
                pair.start_node(0),
                pair.start_node(1, environment={"PYTHONPATH": str(other.parent)}),
            ]
        else:
            programs = pair.start(of_second=(flag, value))
        assert wait_all(programs, SECONDS_TO_START) == [2, 2], pair.tails()
        pair.check_no_traceback()
        for rank in (0, 1):
            line = pair.last_line(rank)
            assert all(part in line for part in ("rank 1", "on node1", *parts)), pair.tails()
    assert not pair.output.exists() or not list(pair.output.glob("checkpoint-*"))


def stop(pair: Pair, programs) -> tuple[list[str], list[int | None]]:
    """What the two last lines hold, and the exit statuses (None: any)."""
    os.kill(pair.process(1), signal.SIGSTOP)
    return ["rank 1 (on node1) has not answered for"] * 2, [75, 75]


def kill(pair: Pair, programs) -> tuple[list[str], list[int | None]]:
    os.kill(pair.process(1), signal.SIGKILL)
    return ["rank 1 (on node1)"] * 2, [None, 137]


def cut(pair: Pair, programs) -> tuple[list[str], list[int | None]]:
    pair.nodes[1].call("ip", "link", "set", "eth0", "down")
    of_rank_1 = "the store on the machine of rank 0 (node0) has not answered for"
    return ["rank 1 (on node1)", of_rank_1], [75, 75]


def lose_node(pair: Pair, programs) -> tuple[list[str], list[int | None]]:
    pair.nodes[1].end()
    return ["rank 1 (on node1)", ""], [75, None]


@pytest.mark.parametrize(
    "fault",
    [
        stop,
        cut,
        pytest.param(kill, marks=pytest.mark.extended),
        pytest.param(lose_node, marks=pytest.mark.extended),
    ],
)
def test_what_goes_wrong_ends_both_and_the_next_start_goes_on(
    environment, undisturbed, tmp_path, fault
):
    """Within --collective_timeout and some seconds each machine has ended, with a line that names
    rank, machine and phase; resumed, the run is what it would have been, to the bit.
    """
    resumed = ["--resume_from_checkpoint", "latest"]
    with two_nodes(tmp_path) as nodes:
        pair = Pair(nodes, tmp_path, environment)
        programs = pair.start(*resumed)
        pair.wait_for_checkpoint(programs, 50)
        parts, statuses = fault(pair, programs)
        found = wait_all(programs, STATED_SECONDS)
        pair.check_no_traceback()
        for rank in (0, 1):
            if statuses[rank] is not None:
                assert found[rank] == statuses[rank], pair.tails()
            if parts[rank]:
                assert parts[rank] in pair.last_line(rank), pair.tails()
                assert "--resume_from_checkpoint latest" in pair.last_line(rank), pair.tails()
        if fault is stop:
            assert "in step " in pair.last_line(0) and "megatron_gkd/" in pair.last_line(0)
        if fault is cut:
            nodes[1].call("ip", "link", "set", "eth0", "up")
        if fault is not lose_node:
            assert wait_all(pair.start(*resumed), SECONDS_TO_START) == [0, 0], pair.tails()
    if fault is lose_node:  # another machine takes its place
        with two_nodes(tmp_path) as nodes:
            pair = Pair(nodes, tmp_path, environment)
            assert wait_all(pair.start(*resumed), SECONDS_TO_START) == [0, 0], pair.tails()
    assert "Resumed " in pair.logs[0].read_text()
    check_same_run(pair.output, undisturbed)
