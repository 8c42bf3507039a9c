"""Seconds of a step by phase: the counted work (step_work.py, rollout_work.py) over a machine's
rates.

On a GPU the host launches ahead: a phase takes the longer of its launches and of what the device
does one after the other. On a CPU both add up. Collectives overlap with nothing but for the
reduction of gradients: where they make several buckets (gradients.py), all but the last go on
beside the last micro-batch's backward, which is taken as half of that micro-batch. Pipeline stages:
of m micro-batches over p stages each stage waits p - 1 times for its neighbours, of teacher and
student together once: a stage that has passed on the teacher's last micro-batch begins with the
student's first. A token of a rollout goes through one stage after the other.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.plan import rollout_work, step_work
from megatron_gkd.plan.placement import Group, placement
from megatron_gkd.plan.rates import Rates
from megatron_gkd.plan.work import Collective, Item, Launches, Waits, Work, repeated
from megatron_gkd.plan.workload import Workload

ROLLOUT = ("rollout prefill", "rollout decode")
PHASES = (*ROLLOUT, "teacher", "student", "gradient reduction", "optimizer")
OF_LAYOUT = (*ROLLOUT, "optimizer")  # depend neither on micro-batches nor on recomputation
HOST, BUBBLE = "launches", "pipeline bubble"
OF_HOST = (Launches, Waits)


@dataclass(frozen=True)
class Phase:
    """parts: seconds by what takes them, each alone; where the device works meanwhile, launches
    are in no one's way.
    """

    seconds: float
    parts: dict[str, float]
    bottleneck: str
    """What takes most; empty where nothing is done"""
    communication: float = 0.0
    """Seconds of the collectives among the parts"""


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
    args: ModelArgs,
    layout: ParallelConfig,
    load: Workload,
    world_size: int,
    rates: Rates,
    *,
    imbalance: float = step_work.IMBALANCE,
    known: dict[str, Phase] | None = None,
) -> StepTime:
    """Of the rank that has most to do. imbalance: rows of the rank whose experts have most, over
    the mean. known: the phases OF_LAYOUT, of the same layout and samples. Raises ValueError where
    the world does not divide into the layout.
    """
    groups = placement(layout, world_size, rates.gpus_per_node)
    step = step_work.Step(args, layout, load, imbalance)
    stages, micro_batches = step.stages, step.micro_batches
    phase = lambda work, times=1: _phase(work, rates, groups, times)

    def pipelined(of_stage: Work, of_last: Work, number: int) -> Phase:
        """`number` micro-batches through the stages; the last one also does `of_last`."""
        once = phase(of_stage + of_last, number)
        if stages == 1:
            return once
        of_one = phase(of_stage).seconds if of_last else once.seconds / number
        return _with_bubble(once, (stages - 1) * of_one)

    def written() -> dict[str, Phase]:
        chunk, chunks = rollout_work.prefill(step)
        token = repeated(rollout_work.token(step), stages) + rollout_work.token_head(step)
        return {
            "rollout prefill": pipelined(chunk, [], chunks),
            "rollout decode": phase(token, load.completion_tokens),
        }

    phases = dict.fromkeys(PHASES, Phase(0.0, {}, ""))
    if known:
        phases |= known
    else:
        if load.completion_tokens and load.on_policy_share:
            phases |= written()
        phases["optimizer"] = phase(step_work.optimizer(step))
    phases["teacher"] = phase(step_work.teacher(step), micro_batches)
    phases["student"] = pipelined(step_work.student(step), step_work.loss(step), micro_batches)
    of_backward = phases["student"].seconds / micro_batches / 2
    phases["gradient reduction"] = _exposed(step_work.reduction(step), of_backward, rates, groups)
    shares = {name: load.on_policy_share if "rollout" in name else 1.0 for name in phases}
    seconds = sum(shares[name] * phase.seconds for name, phase in phases.items())
    tokens = step.rows * load.row_tokens * groups["dp"].size
    return StepTime(phases, seconds, tokens / seconds / world_size)


def _phase(work: Iterable[Item], rates: Rates, groups: dict[str, Group], times: float = 1) -> Phase:
    """Of so many times the work."""
    parts: dict[str, float] = defaultdict(float)
    host = communication = 0.0
    for item in work:
        seconds = times * rates.seconds(item, groups)
        if isinstance(item, Collective):
            if not seconds:
                continue
            name = f"{item.part}{_where(groups[item.group], rates)}"
            communication += seconds
        else:
            name = item.part
            host += seconds * (isinstance(item, OF_HOST) and not item.of_device)
        parts[name] += seconds
    device = sum(parts.values()) - host
    if rates.device == "cpu":
        seconds, bottleneck = host + device, max(parts, key=lambda name: parts[name], default="")
    else:
        seconds = max(host, device)
        of_host = (HOST, "waits") if host else ()
        of_device = {name: s for name, s in parts.items() if name not in of_host}
        largest = max(of_device, key=lambda name: of_device[name], default="")
        bottleneck = HOST if host > device else largest
    return Phase(seconds, dict(parts), bottleneck, communication)


def _exposed(work: Work, backward: float, rates: Rates, groups: dict[str, Group]) -> Phase:
    """What of the gradients' reduction is left when the backward is over."""
    last, early = [], 0.0
    for item in work:
        assert isinstance(item, Collective)
        buckets = max(1, int(item.num_bytes // step_work.smallest_bucket(groups[item.group].size)))
        early += rates.seconds(item, groups) * (1 - 1 / buckets)
        last += repeated([item], 1 / buckets)
    found = _phase(last, rates, groups)
    late = max(early - backward, 0.0)
    if not late:
        return found
    part = "gradients that the backward does not hide"
    return Phase(found.seconds + late, found.parts | {part: late}, part, found.communication + late)


def _where(group: Group, rates: Rates) -> str:
    """The link that a group's collectives take."""
    if group.nodes == 1:
        return ""
    nics = rates.nics_per_gpu
    return f" over {nics:g} NIC{'s' if nics != 1 else ''} a GPU"


def _with_bubble(phase: Phase, bubble: float) -> Phase:
    parts = phase.parts | {BUBBLE: bubble}
    bottleneck = phase.bottleneck
    if bubble > phase.parts.get(bottleneck, 0.0):
        bottleneck = BUBBLE
    return Phase(phase.seconds + bubble, parts, bottleneck, phase.communication)
