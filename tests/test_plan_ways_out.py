"""Where no layout is possible: the flags that are named make one possible, those a step nearer do
not.
"""

import pytest

from megatron_gkd.model.args import read_model_args
from megatron_gkd.plan.layouts import make_plan
from megatron_gkd.plan.rates import read_rates
from megatron_gkd.plan.settings import parse_plan
from megatron_gkd.plan.ways_out import ways_out
from tests.plans import REAL, job_of


def named(*flags: str) -> list[str]:
    own, config, given = parse_plan(["--model", REAL, *flags])
    return ways_out(own, config, given, read_model_args(REAL), read_rates("h100"))


FLAT = ["--pipeline_model_parallel_size", "1", "--context_parallel_size", "1"]


@pytest.mark.parametrize(
    "flags, ways",
    [
        ("--gpus 1 --gpu_memory 40", ["--gpus 2"]),
        (
            "--gpus 1 --gpu_memory 74 --recompute none",
            ["--recompute auto", "--gpus 2", "--lora_rank 4", "--max_length 1024"],
        ),
        ("--gpus 8 --lora_rank 1024", ["--gpus 32", "--lora_rank 256"]),
        ("--gpus 2 --tensor_model_parallel_size 8", ["--gpus 8"]),
        (
            "--gpus 2 --num_generations 256 --global_batch_size 8",
            ["--gpus 4", "--max_completion_length 256", "--global_batch_size 4"],
        ),
        ("--gpus 8 --expert_model_parallel_size 3", []),
    ],
)
def test_each_way_is_one(flags, ways):
    words = [*FLAT, *flags.split()]
    assert not make_plan(job_of(*words)).choices
    assert named(*words) == ways
    for way in ways:
        flag, value = way.split()
        plan = make_plan(job_of(*words, flag, value))
        assert plan.choices and all(choice.time for choice in plan.choices)
        if flag == "--gpus":
            nearer = str(int(value) // 2)
        elif flag.startswith(("--lora", "--max", "--global")):
            nearer = str(int(value) * 2)
        else:
            continue
        assert not make_plan(job_of(*words, flag, nearer)).choices
