"""Seconds of a step by phase: the counted work over the machine's rates."""

from dataclasses import dataclass

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.plan.rates import Rates
from megatron_gkd.plan.workload import Workload


@dataclass(frozen=True)
class Phase:
    """parts: seconds by what takes them; seconds: of the phase, in which some overlap."""

    seconds: float
    parts: dict[str, float]

    @property
    def bottleneck(self) -> str:
        """The part that takes most; empty where nothing is done."""
        return max(self.parts, key=lambda name: self.parts[name]) if self.parts else ""


@dataclass(frozen=True)
class StepTime:
    """phases: rollout prefill, rollout decode, teacher, student, gradient reduction (what of it is
    exposed), optimizer; those of a rollout as an on-policy step has them.
    """

    phases: dict[str, Phase]
    seconds: float
    """Of the mean step: a rollout counts with the share of the steps that have one"""
    tokens_per_second_per_gpu: float
    """The student's tokens of a step"""


def step_time(
    args: ModelArgs, layout: ParallelConfig, load: Workload, world_size: int, rates: Rates
) -> StepTime:
    """Of the rank that has most to do. Raises ValueError where the world does not divide."""
    raise NotImplementedError
