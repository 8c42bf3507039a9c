"""Why the pick is the pick, and why other layouts are impossible, in a few lines."""

import re
from collections.abc import Sequence
from functools import cache

from megatron_gkd.plan.layouts import Choice, Job, Plan, Refusal, Sizes, kept_layers
from megatron_gkd.plan.memory import GIB
from megatron_gkd.plan.placement import placement

NAMES = dict(zip(Sizes._fields, ("TP", "EP", "PP", "CP")))


def grouped(refusals: Sequence[Refusal]) -> list[tuple[Refusal, list[Refusal]]]:
    """(the one with the smallest sizes, all) of those whose reasons differ in numbers and factors
    alone, the most common first.
    """
    groups: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        groups.setdefault(_without_numbers(refusal.reason), []).append(refusal)
    smallest = lambda members: min(members, key=lambda one: (sum(one.sizes), one.sizes))
    found = [(smallest(members), members) for members in groups.values()]
    return sorted(found, key=lambda group: -len(group[1]))


@cache  # most layouts are refused in the words of another
def _without_numbers(reason: str) -> str:
    return " ".join(re.sub(r" x --\w+|[\d.,]*\d", "", reason).split())


def why(plan: Plan) -> list[tuple[str, str]]:
    """(what was chosen, what its next smaller and next larger value would bring) of each size that
    has such a neighbour, with the recomputation and micro-batches that are fastest there, and of
    these two at the pick's sizes.
    """
    best, found = plan.pick, []
    for name in Sizes._fields:
        sides = [side for side in (neighbour(plan, name, way) for way in (-1, 1)) if side]
        if sides:
            found.append((f"{NAMES[name]} {getattr(best.sizes, name)}", "; ".join(sides)))
    same = [c for c in [*plan.choices, *plan.too_large] if c.sizes == best.sizes]
    others, sides = [c for c in same if c.recompute != best.recompute], []
    tokens = best.micro_batch_tokens
    if best.recompute == "auto":
        length = plan.job.args.num_layers // best.sizes.pp
        kept = kept_layers(plan.job, best)
        sides = [
            f"can keep the activations of {kept} of {length} layers, which its time leaves out"
        ]
    if others:
        other = min(others, key=lambda c: (c.micro_batch_tokens != tokens, c.seconds))
        cut = other.micro_batch_tokens
        of_tokens = f" in micro-batches of {cut}" if cut != tokens else ""
        sides.append(f"{other.recompute}{of_tokens} {compared(plan, other)}")
    if sides:
        found.append((f"recompute {best.recompute}", "; ".join(sides)))
    cuts = {c.micro_batch_tokens: c for c in same if c.recompute == best.recompute}
    sides = [f"{n} {compared(plan, cuts[n])}" for n in (tokens // 2, 2 * tokens) if n in cuts]
    if sides:
        found.append((f"micro-batches of {tokens}", "; ".join(sides)))
    return found


def neighbour(plan: Plan, name: str, way: int) -> str:
    """What the next smaller (-1) or larger (1) possible value of a size brings; empty where there
    is none.
    """
    best = plan.pick.sizes
    alike = lambda sizes: all(
        getattr(sizes, other) == getattr(best, other) for other in Sizes._fields if other != name
    )
    beyond = lambda sizes: way * (getattr(sizes, name) - getattr(best, name)) > 0
    nearest: dict[int, Choice] = {}
    for choice in plan.choices:
        if alike(choice.sizes) and beyond(choice.sizes):
            nearest.setdefault(getattr(choice.sizes, name), choice)
    for sizes, choice in plan.nearest.items():
        if alike(sizes) and beyond(sizes):
            nearest[getattr(sizes, name)] = choice
    if not nearest:
        return ""
    value = min(nearest, key=lambda size: abs(size - getattr(best, name)))
    other, over = nearest[value], ""
    nodes = nodes_of(plan.job, other.sizes)[name]
    if nodes > nodes_of(plan.job, best)[name]:
        over = f" over {nodes} nodes"
    return f"{value}{over} {compared(plan, other)}"


def nodes_of(job: Job, sizes: Sizes) -> dict[str, int]:
    """Machines that a group of each kind lies on."""
    groups = placement(sizes.parallel(), job.gpus, job.rates.gpus_per_node)
    return {name: groups[name].nodes for name in Sizes._fields}


def where(job: Job, sizes: Sizes) -> str:
    """`EP inside a node; DP over 8 nodes`, of groups of several ranks."""
    groups = placement(sizes.parallel(), job.gpus, job.rates.gpus_per_node)
    names = {**NAMES, "dp": "DP"}
    several = {name: groups[kind].nodes for kind, name in names.items() if groups[kind].size > 1}
    inside = [name for name, nodes in several.items() if nodes == 1]
    across = [f"{name} over {nodes} nodes" for name, nodes in several.items() if nodes > 1]
    return "; ".join([f"{', '.join(inside)} inside a node"] * bool(inside) + across)


def compared(plan: Plan, other: Choice) -> str:
    """`takes +0.310 s (student +0.200)` beside the pick, or `needs 91.2 GiB`."""
    best = plan.pick.time
    if other.time is None or best is None:
        return f"needs {other.memory.total / GIB:.1f} GiB"
    more = other.time.seconds - best.seconds
    if abs(more) < 0.001 * best.seconds:
        return f"takes as long and {other.memory.total / GIB:.1f} GiB"
    differences = {
        name: of_step(plan, name) * (phase.seconds - best.phases[name].seconds)
        for name, phase in other.time.phases.items()
    }
    name = max(differences, key=lambda phase: abs(differences[phase]))
    memory = f" and {other.memory.total / GIB:.1f} GiB" if more < 0 else ""
    return f"takes {more:+.3f} s ({name} {differences[name]:+.3f}){memory}"


def of_step(plan: Plan, phase: str) -> float:
    """The share of the steps that have this phase."""
    return plan.job.load.on_policy_share if phase.startswith("rollout") else 1.0
