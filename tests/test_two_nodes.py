"""`launch/multi_node.sh` on two nodes, each with a network and a host name of its own, against the
same run on one node.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_launch import SMALL
from tests.train_runs import make_rows, read_lines, stable, write_rows
from tests.two_nodes import ADDRESSES, NAMES, two_nodes, wait_all

REPOSITORY = Path(__file__).parents[1]
SCRIPT = ["bash", str(REPOSITORY / "launch/multi_node.sh"), *SMALL]
STEPS = ["--max_steps", "2", "--per_device_train_batch_size", "2"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("two_nodes")
    model = tiny_folder(num_hidden_layers=2, hidden_size=64, head_dim=16, vocab_size=1024)
    variables = {
        "MODEL": model,
        "DATASET": write_rows(folder / "rows.jsonl", make_rows(16)),
        "DEVICE": "cpu",
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return os.environ | variables


def layout(expert_parallel: int) -> list[str]:
    return [
        *("--tensor_model_parallel_size", "2"),
        *("--expert_model_parallel_size", str(expert_parallel)),
    ]


@pytest.mark.parametrize(
    "expert_parallel",
    [pytest.param(2, marks=pytest.mark.extended), pytest.param(4, id="experts-across-nodes")],
)
def test_two_nodes_train_as_one(environment, tmp_path, expert_parallel):
    """TP 2, DP 2: two ranks on each node against four on one, every metric."""

    def variables(output, **more):
        return environment | {"OUTPUT": str(tmp_path / output), "MASTER_PORT": "29500"} | more

    with two_nodes(tmp_path) as nodes:
        flags = [*STEPS, *layout(expert_parallel)]
        logs = [tmp_path / f"{name}.log" for name in NAMES]
        shared = dict(MASTER_ADDR=NAMES[0], NNODES="2", NPROC_PER_NODE="2")
        programs = [
            node.start([*SCRIPT, *flags], variables("two", NODE_RANK=str(rank), **shared), log)
            for rank, (node, log) in enumerate(zip(nodes, logs, strict=True))
        ]
        statuses = wait_all(programs, 300)
        assert statuses == [0, 0], "".join(log.read_text()[-2000:] for log in logs)
        alone = dict(MASTER_ADDR=NAMES[0], NNODES="1", NODE_RANK="0", NPROC_PER_NODE="4")
        log = tmp_path / "one.log"
        one = nodes[0].start([*SCRIPT, *flags], variables("one", **alone), log)
        assert wait_all([one], 300) == [0], log.read_text()[-2000:]
    metrics = [stable(read_lines(tmp_path / run / "metrics.jsonl")) for run in ("two", "one")]
    assert len(metrics[0]) == 2 and metrics[0] == metrics[1]
    recorded = json.loads((tmp_path / "two" / "run.json").read_text())["layout"]
    assert [recorded[name] for name in ("world_size", "tp", "ep", "dp")] == [
        *(4, 2),
        *(expert_parallel, 2),
    ]


@pytest.mark.parametrize("without", [1, pytest.param(0, marks=pytest.mark.extended)])
def test_a_node_without_the_model(environment, tmp_path, without):
    """Before anything starts there, and as the last line of both: machine, flag and path."""
    absent = {"MODEL": str(tmp_path / "absent")}
    with two_nodes(tmp_path) as nodes:
        logs = [tmp_path / f"{name}.log" for name in NAMES]
        shared = dict(MASTER_ADDR=NAMES[0], NNODES="2", NPROC_PER_NODE="1", MASTER_PORT="29500")
        programs = [
            node.start(
                [*SCRIPT, *STEPS, *layout(2)],
                environment
                | dict(shared, NODE_RANK=str(rank), OUTPUT=str(tmp_path / "out"))
                | (absent if rank == without else {}),
                logs[rank],
            )
            for rank, node in enumerate(nodes)
        ]
        statuses = wait_all(programs, 120)
    last = [log.read_text().splitlines()[-1] for log in logs]
    assert statuses == [2, 2] and last[0] == last[1], last
    whose = f"error (machine {without}, on {NAMES[without]}): --model {absent['MODEL']}: no config"
    assert whose in last[0] and not (tmp_path / "out").exists()


def test_nodes_are_apart_and_end_with_who_made_them(tmp_path):
    """Names, link and own processes; a killed test leaves no process of a node."""
    with two_nodes(tmp_path) as nodes:
        for node, other in zip(nodes, reversed(ADDRESSES), strict=True):
            log = tmp_path / f"{node.name}.log"
            line = f"hostname; getent hosts {node.name}; ip route get {other}"
            assert wait_all([node.start(["sh", "-c", line], dict(os.environ), log)], 10) == [0]
            name, own, *more = log.read_text().splitlines()
            assert name == node.name and own.split() == ["127.0.1.1", name]
            assert any("dev eth0" in line for line in more)
    ending = f"""
import os, pathlib, signal
from tests.two_nodes import two_nodes
with two_nodes(pathlib.Path({str(tmp_path)!r})) as nodes:
    nodes[1].start(["sleep", "987654"], dict(os.environ), pathlib.Path({str(tmp_path / "s")!r}))
    print(*[node.first_process for node in nodes], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run(
        [sys.executable, "-c", ending], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert killed.returncode == -signal.SIGKILL
    left = [int(word) for word in killed.stdout.split()]
    assert len(left) == 2
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in left):
        assert time.monotonic() < until, f"processes {left} go on"
        time.sleep(0.02)
