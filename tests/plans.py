"""Jobs for the planner, from flags: what its tests share."""

from pathlib import Path

from megatron_gkd.model.args import read_model_args
from megatron_gkd.plan.layouts import Job, make_job
from megatron_gkd.plan.rates import read_rates
from megatron_gkd.plan.settings import parse_plan

REAL = str(Path(__file__).parents[1] / "docs" / "qwen3_omni_30b")  # a config.json alone


def job_of(*flags: str) -> Job:
    """What `python -m megatron_gkd.plan FLAGS` plans; of the real sizes without --model."""
    own, config, given = parse_plan(["--model", REAL, *flags])
    args = read_model_args(config.model.model)
    return make_job(own, config, given, args, read_rates(own.gpu or "h100"))
