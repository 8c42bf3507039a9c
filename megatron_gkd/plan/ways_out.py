"""What makes a job possible for which no layout is: each way by itself, and tried."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from megatron_gkd.config import Config
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.plan.layouts import choices_of, data_parallel_size, grid, make_job
from megatron_gkd.plan.rates import Rates
from megatron_gkd.plan.settings import MOST_GPUS, PlanSettings

DOUBLINGS = 5  # of the GPUs, at most
LEAST = {"lora_rank": 4, "max_length": 512, "max_completion_length": 128, "global_batch_size": 1}
"""Below these a run becomes another one"""


def ways_out(
    own: PlanSettings, config: Config, given: frozenset[str], args: ModelArgs, rates: Rates
) -> list[str]:
    """Flags that each make some layout possible, the nearest value of each; those of the sizes that
    are given stay. Empty where none of what is tried does.
    """
    found = []
    for flag, values in candidates(own, config, given, args, rates):
        for value in values:
            changed = with_setting(own, config, flag, value)
            try:
                fits = is_possible(*changed, given, args, rates)
            except ValueError:  # no whole nodes, rows that are longer than the length
                continue
            if fits:
                found.append(f"--{flag} {value}")
                break
    return found


def candidates(
    own: PlanSettings, config: Config, given: frozenset[str], args: ModelArgs, rates: Rates
) -> Iterator[tuple[str, list[Any]]]:
    """(flag, values to try, the nearest first)."""
    if "recompute" in given and config.model.recompute == "none":
        yield "recompute", ["auto"]
    job = make_job(own, config, given, args, rates)
    doubled = [own.gpus * 2**n for n in range(1, DOUBLINGS + 1)]
    yield "gpus", [gpus for gpus in doubled if gpus <= MOST_GPUS]
    now = {
        "lora_rank": job.load.lora_rank,
        "max_length": config.data.max_length,
        "max_completion_length": job.load.completion_tokens,
        "global_batch_size": job.samples,
    }
    for flag, least in LEAST.items():
        yield flag, [now[flag] >> n for n in range(1, 64) if now[flag] >> n >= least]


def with_setting(
    own: PlanSettings, config: Config, flag: str, value: Any
) -> tuple[PlanSettings, Config]:
    """With another value of one flag, of the planner or of the run."""
    if hasattr(own, flag):
        return replace(own, **{flag: value}), config
    (group,) = [each.name for each in fields(config) if hasattr(getattr(config, each.name), flag)]
    settings = replace(getattr(config, group), **{flag: value})
    changed: Any = {group: settings}
    return own, replace(config, **changed)


def is_possible(
    own: PlanSettings, config: Config, given: frozenset[str], args: ModelArgs, rates: Rates
) -> bool:
    """Whether any layout is. Raises as `make_job`."""
    job = make_job(own, config, given, args, rates)
    for sizes in grid(job):
        try:
            dp = data_parallel_size(job, sizes)
        except ValueError:
            continue
        if any(choice.time for choice in choices_of(job, sizes, dp)):
            return True
    return False
