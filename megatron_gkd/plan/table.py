"""What the planner prints, and its numbers as JSON."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from megatron_gkd.plan.layouts import CLOSE, SPARE, Choice, Plan, Sizes, first_of
from megatron_gkd.plan.memory import GIB
from megatron_gkd.plan.reasons import NAMES, grouped, where, why

MOST_COLUMNS = 120
MOST_LAYOUTS = 10  # that are printed without --all
SHORT = {  # headings of the phases
    "rollout prefill": "prefill",
    "rollout decode": "decode",
    "gradient reduction": "reduce",
}


def columns(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of texts under headings: numbers to the right, other columns to the left."""
    lines = [list(headings), *map(list, rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(headings))]
    is_number = [
        all(line[n][:1] in "0123456789+-" for line in lines[1:]) for n in range(len(headings))
    ]
    pad = lambda text, n: text.rjust(widths[n]) if is_number[n] else text.ljust(widths[n])
    return ["  ".join(pad(line[n], n) for n in range(len(line))).rstrip() for line in lines]


def gib(number: float) -> str:
    return f"{number / GIB:.1f}"


def layout_name(sizes: Sizes, dp: int) -> str:
    """`TP 4 x CP 2 x DP 8, EP 8`; stages and context parallelism only where there are any."""
    names = [f"TP {sizes.tp}"]
    names += [f"PP {sizes.pp}"] if sizes.pp > 1 else []
    names += [f"CP {sizes.cp}"] if sizes.cp > 1 else []
    return f"{' x '.join([*names, f'DP {dp}'])}, EP {sizes.ep}"


def summary(plan: Plan) -> list[str]:
    """The pick with its parts and its reasons, the best layouts, and why the others are
    impossible.
    """
    job, best, layouts = plan.job, plan.pick, plan.layouts
    shown = first_of(plan.choices, lambda choice: choice.sizes._replace(cp=0))[:MOST_LAYOUTS]
    lines = [
        *heading(plan),
        "",
        f"Best of {len(layouts):,} possible layout{'s' * (len(layouts) > 1)} "
        f"({len(plan.choices):,} with recomputation and micro-batches):",
        f"  {layout_name(best.sizes, best.dp)}; --recompute {best.recompute}; micro-batches of "
        f"{best.micro_batch_tokens} tokens; {best.batch_size} x {best.accumulation} samples a rank",
        f"  {best.seconds:.2f} s a step, {speed(best)} tokens/s a GPU; "
        f"{gib(best.memory.total)} of {gib(job.available)} GiB",
        *([f"  {where(job, best.sizes)}"] if job.gpus > job.rates.gpus_per_node else []),
        *beside_the_fastest(plan),
        *(f"  {chosen}: {beside}" for chosen, beside in why(plan)),
        "",
        *memory_table(best),
        "",
        f"{phases_of(plan)}, seconds; exposed: communication that nothing hides",
        *time_table(best),
        "",
        "The best of different TP, EP, PP, each as it is fastest (seconds; rollouts as an "
        "on-policy step has them):",
        *choices_table(shown),
        "",
        *impossible(plan),
    ]
    return [part for line in lines for part in folded(line)]


def phases_of(plan: Plan) -> str:
    """What the phases together are."""
    share = plan.job.load.on_policy_share
    if not 0 < share < 1:
        return "A step"
    return f"A step that writes responses ({plan.pick.seconds:.2f} s are the mean of all)"


def beside_the_fastest(plan: Plan) -> list[str]:
    """Why the pick is another one, if it is."""
    fastest, best = plan.choices[0], plan.pick
    if fastest is best:
        return []
    tight = fastest.memory.total > (1 - SPARE) * plan.job.available
    why_not = f"which leaves less than {SPARE:.0%}"
    if not tight:
        why_not = f"more memory for less than {CLOSE:.0%} of the time"
    return [
        f"  {fastest.seconds:.2f} s has {layout_name(fastest.sizes, fastest.dp)}, "
        f"{fastest.recompute}, {fastest.micro_batch_tokens} tokens: "
        f"{gib(fastest.memory.total)} GiB, {why_not}"
    ]


def folded(line: str) -> list[str]:
    """A line as lines of MOST_COLUMNS, the others further in."""
    inside = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(line, MOST_COLUMNS, subsequent_indent=inside) or [""]


def heading(plan: Plan) -> list[str]:
    job, load = plan.job, plan.job.load
    share = f"{load.on_policy_share:.0%} of the steps write responses"
    others = []
    if job.config.model.device == "cpu" != job.rates.device:
        others = [
            "These are the rates and the memory of a GPU, and --device is cpu: --gpu FILE takes "
            "those of this machine, which python -m benchmarks.rates --output FILE measures."
        ]
    return [
        f"{job.gpus} GPU{'s' * (job.gpus > 1)} of {gib(job.available)} GiB ({job.rates.name}), "
        f"{min(job.gpus, job.rates.gpus_per_node)} a node; {job.samples} samples a step of "
        f"{load.row_tokens} tokens (teacher {load.teacher_row_tokens}, response "
        f"{load.response_tokens}); {share}.",
        "Memory and time are modelled (docs/scaling.md), not measured on these GPUs.",
        *others,
    ]


def speed(choice: Choice) -> str:
    return f"{choice.time.tokens_per_second_per_gpu:,.0f}" if choice.time else ""


def memory_table(choice: Choice) -> list[str]:
    """GiB by kind."""
    memory, rows = choice.memory, []
    for when in ("always", "training", "rollout", "outside"):
        for kind, number in sorted(getattr(memory, when).items(), key=lambda item: -item[1]):
            if number >= GIB / 20:
                rows.append((gib(number), when, kind))
    rows.append((gib(memory.total), "", "at the highest point, with a reserve"))
    return columns(("GiB", "when", "what"), rows)


def time_table(choice: Choice) -> list[str]:
    """Seconds by phase, those of communication that nothing hides, and what takes most."""
    assert choice.time is not None
    rows = []
    for name, phase in choice.time.phases.items():
        parts = sorted(
            phase.parts.items(), key=lambda part: (part[0] != phase.bottleneck, -part[1])
        )
        names = [f"{part} {seconds:.3f}" for part, seconds in parts[:3] if seconds >= 0.0005]
        most, *others = names or [phase.bottleneck]
        numbers = f"{phase.seconds:.3f}", f"{phase.communication:.3f}"
        rows.append((*numbers, name, most, ", ".join(others)))
    lines = columns(("seconds", "exposed", "phase", "bottleneck", "then"), rows)
    while max(map(len, lines)) > MOST_COLUMNS:  # the smallest parts of the longest line go
        longest = max(range(len(lines)), key=lambda n: len(lines[n]))
        lines[longest] = lines[longest].rpartition(", ")[0] or lines[longest][:MOST_COLUMNS]
    return lines


def choices_table(choices: Sequence[Choice]) -> list[str]:
    """A line for each choice."""
    phases = list(choices[0].time.phases) if choices and choices[0].time else []
    headings = ["TP", "EP", "PP", "CP", "DP", "recompute", "tokens", "GiB"]
    headings += [SHORT.get(name, name) for name in phases] + ["step", "tokens/s/GPU"]
    rows = []
    for choice in choices:
        assert choice.time is not None
        row = [*map(str, choice.sizes), str(choice.dp), choice.recompute]
        row += [str(choice.micro_batch_tokens), gib(choice.memory.total)]
        row += [f"{choice.time.phases[name].seconds:.2f}" for name in phases]
        rows.append([*row, f"{choice.seconds:.2f}", speed(choice)])
    return columns(headings, rows)


def closest(plan: Plan) -> list[str]:
    """Where nothing is possible: the layout that needs least, with its parts."""
    if not plan.nearest:
        return []
    least = min(plan.nearest.values(), key=lambda choice: choice.memory.total)
    return [
        f"{layout_name(least.sizes, least.dp)}, --recompute {least.recompute}, micro-batches of "
        f"{least.micro_batch_tokens} tokens need least of all, {least.memory.describe()}; the GPU "
        f"has {gib(plan.job.available)}."
    ]


def impossible(plan: Plan) -> list[str]:
    """Reasons with the number of layouts that each refuses and one of them."""
    total = len(plan.refusals)
    if not total:
        return ["No layout is impossible."]
    lines = [f"Impossible: {total:,} {'layout' if total == 1 else 'layouts'}"]
    for smallest, members in grouped(plan.refusals):
        such_as = f"such as {sizes_name(smallest.sizes)}: {smallest.reason}"
        lines.append(f"  {len(members):,}: {such_as}")
    if plan.too_large:
        lines.append(
            f"  {len(plan.too_large):,} recomputations and micro-batches of possible layouts need "
            "more memory than there is"
        )
    return lines


def sizes_name(sizes: Sizes) -> str:
    return " ".join(f"{NAMES[name]} {size}" for name, size in sizes._asdict().items())


def everything(plan: Plan) -> list[str]:
    """All choices and all refusals, a line each."""
    return [
        f"All {len(plan.choices):,} possible choices, the fastest first:",
        *choices_table(plan.choices),
        "",
        "Impossible:",
        *(f"  {sizes_name(refusal.sizes)}: {refusal.reason}" for refusal in plan.refusals),
        *(
            f"  {sizes_name(choice.sizes)} --recompute {choice.recompute} "
            f"--max_tokens_per_micro_batch {choice.micro_batch_tokens}: needs "
            f"{gib(choice.memory.total)} GiB"
            for choice in plan.too_large
        ),
    ]


def numbers(plan: Plan) -> dict[str, Any]:
    """For machines: bytes and seconds."""
    job = plan.job
    return {
        "gpus": job.gpus,
        "gpus_per_node": job.rates.gpus_per_node,
        "rates": job.rates.name,
        "gpu_memory_bytes": job.available,
        "samples": job.samples,
        "load": asdict(job.load),
        "pick": choice_numbers(plan.pick) if plan.choices else None,
        "possible": [choice_numbers(choice) for choice in plan.choices],
        "impossible": [
            {**refusal.sizes._asdict(), "reason": refusal.reason} for refusal in plan.refusals
        ],
        "too_large": [choice_numbers(choice) for choice in plan.too_large],
    }


def choice_numbers(choice: Choice) -> dict[str, Any]:
    """Of one choice; its time is None where it does not fit."""
    memory, time = choice.memory, choice.time
    return {
        **choice.sizes._asdict(),
        "dp": choice.dp,
        "recompute": choice.recompute,
        "max_tokens_per_micro_batch": choice.micro_batch_tokens,
        "per_device_train_batch_size": choice.batch_size,
        "gradient_accumulation_steps": choice.accumulation,
        "memory_bytes": {**asdict(memory), "total": memory.total},
        "time": time
        and {
            "seconds": time.seconds,
            "tokens_per_second_per_gpu": time.tokens_per_second_per_gpu,
            "phases": {
                name: {
                    "seconds": phase.seconds,
                    "bottleneck": phase.bottleneck,
                    "parts": phase.parts,
                }
                for name, phase in time.phases.items()
            },
        },
    }
