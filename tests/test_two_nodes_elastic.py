"""torch's elastic launching on two machines: one is lost, the other goes on by itself."""

import pytest

from tests.test_two_nodes_faults import SECONDS_TO_START, STEPS, Pair, environment  # noqa: F401
from tests.train_runs import read_lines
from tests.two_nodes import ADDRESSES, two_nodes, wait_all

ELASTIC = [
    *("--nnodes", "1:2", "--max_restarts", "3", "--rdzv_backend", "c10d", "--rdzv_id", "job"),
    *("--rdzv_endpoint", f"{ADDRESSES[0]}:29400"),
    *("--rdzv_conf", "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"),
]
ALONE = ["--tensor_model_parallel_size", "1", "--expert_model_parallel_size", "1"]


@pytest.mark.extended
def test_a_lost_machine_leaves_a_smaller_run_that_goes_on(environment, tmp_path):  # noqa: F811
    """DP 2 becomes DP 1, from the newest checkpoint; the steps before it stay as they were."""
    with two_nodes(tmp_path) as nodes:
        pair = Pair(nodes, tmp_path, environment)
        programs = pair.start(*ALONE, launch=ELASTIC)
        pair.wait_for_checkpoint(programs, 50)
        nodes[1].end()
        assert wait_all(programs[:1], SECONDS_TO_START) == [0], pair.tails()
        said = pair.logs[0].read_text()
    assert "Started again: as with --resume_from_checkpoint latest" in said, said[-3000:]
    assert "global_batch_size was 4 and is 2" in said and "Traceback" not in said
    lines = read_lines(pair.output / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
