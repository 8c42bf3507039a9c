"""Jobs and workloads for the planner: what its tests share."""

from pathlib import Path

from megatron_gkd.lora_targets import LINEARS
from megatron_gkd.model.args import read_model_args
from megatron_gkd.plan.layouts import Job, make_job
from megatron_gkd.plan.rates import read_rates
from megatron_gkd.plan.settings import parse_plan
from megatron_gkd.plan.workload import Workload

REAL = str(Path(__file__).parents[1] / "docs" / "qwen3_omni_30b")  # a config.json alone
# 4 x 2048 tokens, 512 response tokens a row, LoRA of rank 8 on all linears, bf16, recomputation.
GUIDE_STEP = Workload(
    number_bytes=2,
    lora_rank=8,
    targets=LINEARS,
    recompute=True,
    micro_batch_tokens=8192,
    batch_size=4,
    accumulation=1,
    prompt_tokens=1536,
    completion_tokens=0,
    row_tokens=2048,
    teacher_row_tokens=2048,
    response_tokens=512,
)


def job_of(*flags: str) -> Job:
    """What `python -m megatron_gkd.plan FLAGS` plans; of the real sizes without --model."""
    own, config, given = parse_plan(["--model", REAL, *flags])
    args = read_model_args(config.model.model)
    return make_job(own, config, given, args, read_rates(own.gpu or "h100"))
