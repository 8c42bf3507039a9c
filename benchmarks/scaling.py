"""The tables and the picture of docs/scaling.md: how the 30B scales from 8 to 1,024 GPUs, by the
planner's model.

    python -m benchmarks.scaling --page docs/scaling.md    # writes both into the page
    python -m benchmarks.scaling                           # prints the tables
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.report import REPOSITORY, table
from megatron_gkd.model.args import read_model_args
from megatron_gkd.plan.layouts import (
    SIZE_FLAGS,
    Choice,
    Job,
    Sizes,
    make_job,
    make_plan,
)
from megatron_gkd.plan.memory import GIB
from megatron_gkd.plan.placement import placement
from megatron_gkd.plan.rates import read_rates
from megatron_gkd.plan.saving import saved_bytes
from megatron_gkd.plan.settings import parse_plan
from megatron_gkd.plan.step_time import StepTime
from megatron_gkd.plan.table import layout_name

MODEL = "docs/qwen3_omni_30b"
WORLDS = (8, 64, 256, 1024)
BATCH = 4  # samples a GPU
HALF, OFF = "Half of the steps on-policy", "No step on-policy"
OFF_POLICY = ("--lmbda", "0")
EXPERTS = (8, 16, 64)  # EP that is compared
NICS = {"a NIC a GPU": 1.0, "a NIC for 2": 0.5, "a NIC a node": 0.125}
BEGIN, END = "<!-- python -m benchmarks.scaling writes from here -->", "<!-- to here -->"
# batch a GPU, rank, GB: ms-swift with ZeRO-3 on 8 GPUs, as our users noted
NOTED = ((4, 8, 36), (2, 4, 24), (2, 8, 28), (6, 8, 45), (4, 16, 38), (8, 4, 42))
GUIDE_LAYOUTS = (  # name, sizes, --recompute
    ("TP 1 EP 8", Sizes(1, 8, 1, 1), "none"),
    ("TP 1 EP 8, recompute", Sizes(1, 8, 1, 1), "full"),
    ("TP 8 EP 8", Sizes(8, 8, 1, 1), "none"),
    ("TP 8 EP 8, recompute", Sizes(8, 8, 1, 1), "full"),
)
MACHINE_WRITES, ALL_WRITE = 1e9, 10e9  # bytes a second, of one machine and of a file system


def job(gpus: int, *flags: str, nics: float | None = None) -> Job:
    """What the planner is asked; a rank's NICs as the rates have them, or so many."""
    samples = ["--global_batch_size", str(BATCH * gpus)]
    own, config, given = parse_plan(
        ["--model", str(REPOSITORY / MODEL), "--gpus", str(gpus), *samples, *flags]
    )
    rates = read_rates(own.gpu or "h100")
    rates = replace(rates, nics_per_gpu=nics) if nics else rates
    return make_job(own, config, given, read_model_args(config.model.model), rates)


def size_flags(sizes: Sizes) -> list[str]:
    """That fix a layout."""
    return [word for flag, size in zip(SIZE_FLAGS, sizes) for word in (f"--{flag}", str(size))]


def pick(gpus: int, *flags: str, sizes: Sizes | None = None, nics: float | None = None) -> Choice:
    """The planner's, of all layouts or of this one."""
    fixed = size_flags(sizes) if sizes else []
    return make_plan(job(gpus, *flags, *fixed, nics=nics)).pick


def phases_of(time: StepTime, share: float) -> dict[str, float]:
    """Phase -> its seconds of the mean step, of which `share` has a rollout."""
    return {
        name: phase.seconds * (share if name.startswith("rollout") else 1.0)
        for name, phase in time.phases.items()
    }


def limit(first: Choice, choice: Choice, share: float) -> str:
    """What has grown most since `first`: the phase's seconds, and the part that did it."""
    assert first.time and choice.time
    before, now = phases_of(first.time, share), phases_of(choice.time, share)
    phase = max(now, key=lambda name: now[name] - before[name])
    more = now[phase] - before[phase]
    if more < 0.0005:
        return "nothing"
    of_phase, earlier = choice.time.phases[phase].parts, first.time.phases[phase].parts
    part = max(of_phase, key=lambda name: of_phase[name] - earlier.get(name, 0.0))
    return f"{part} +{more:.3f} s"


HEADINGS = ["GPUs", "layout", "recompute", "tokens", "GiB"]
HEADINGS += ["prefill", "decode", "teacher", "student", "reduction", "optimizer", "step"]
HEADINGS += ["tokens/s a GPU", "efficiency", "lost to"]


def scaling_row(first: Choice, choice: Choice, gpus: int, share: float) -> list[str]:
    """Of the table of weak scaling."""
    assert first.time and choice.time
    efficiency = choice.time.tokens_per_second_per_gpu / first.time.tokens_per_second_per_gpu
    return [
        f"{gpus:,}",
        layout_name(choice.sizes, choice.dp),
        choice.recompute,
        str(choice.micro_batch_tokens),
        f"{choice.memory.total / GIB:.1f}",
        *(f"{phase.seconds:.3f}" for phase in choice.time.phases.values()),
        f"{choice.seconds:.3f}",
        f"{choice.time.tokens_per_second_per_gpu:,.0f}",
        f"{efficiency:.1%}",
        limit(first, choice, share) if choice is not first else "",
    ]


def scaling_table(choices: dict[int, Choice], *flags: str) -> str:
    """Of picks by GPUs, of a run with these flags."""
    first, share = choices[WORLDS[0]], job(WORLDS[0], *flags).load.on_policy_share
    rows = [scaling_row(first, choice, gpus, share) for gpus, choice in choices.items()]
    return table(HEADINGS, rows)


def experts_table() -> str:
    """EP inside a node against EP over several."""
    rows = []
    for gpus in WORLDS:
        for experts in (size for size in EXPERTS if size <= gpus):
            sizes = Sizes(1, experts, 1, 1)
            found = {name: pick(gpus, sizes=sizes, nics=nics) for name, nics in NICS.items()}
            nodes = placement(sizes.parallel(), gpus, 8)["ep"].nodes
            one = found["a NIC a GPU"]
            assert one.time
            seconds = {name: phase.seconds for name, phase in one.time.phases.items()}
            rows.append(
                [
                    f"{gpus:,}",
                    str(experts),
                    str(nodes),
                    f"{one.memory.total / GIB:.1f}",
                    f"{seconds['rollout decode']:.2f}",
                    f"{seconds['teacher'] + seconds['student']:.2f}",
                    *(f"{choice.seconds:.2f}" for choice in found.values()),
                ]
            )
    headings = ["GPUs", "EP", "nodes of a group", "GiB", "decode", "teacher and student"]
    return table(headings + [f"step, s: {name}" for name in NICS], rows)


def of_guide(batch: int, rank: int, sizes: Sizes, recompute: str) -> Choice:
    """A micro-batch of a GPU's whole batch, whether it fits or not."""
    flags = f"--lora_rank {rank} --global_batch_size {8 * batch} --recompute {recompute} "
    flags += f"--max_tokens_per_micro_batch {2048 * batch} --gpu_memory 1000"
    return pick(8, *flags.split(), sizes=sizes)


def guide_table() -> str:
    """The guide's jobs beside what the planner computes for them."""
    rows = []
    for batch, rank, noted in NOTED:
        row = [f"{batch} x 2,048", str(rank), f"~{noted}"]
        for _, sizes, recompute in GUIDE_LAYOUTS:
            row.append(f"{of_guide(batch, rank, sizes, recompute).memory.total / GIB:.1f}")
        rows.append(row)
    headings = ["batch a GPU", "LoRA rank", "ms-swift, ZeRO-3, as our users noted, GB"]
    return table([*headings, *(f"{name}, GiB" for name, _, _ in GUIDE_LAYOUTS)], rows)


def kinds_table() -> str:
    """GiB by kind of the guide's first job."""
    batch, rank, _ = NOTED[0]
    choices = [of_guide(batch, rank, sizes, how) for _, sizes, how in GUIDE_LAYOUTS]
    found = [choice.memory for choice in choices]
    rows = []
    for when in ("always", "training", "rollout", "outside"):
        for kind in dict.fromkeys(kind for memory in found for kind in getattr(memory, when)):
            numbers = [getattr(memory, when).get(kind, 0) / GIB for memory in found]
            if max(numbers) >= 0.05:
                rows.append([when, kind, *(f"{number:.1f}" for number in numbers)])
    rows.append(["", "in all", *(f"{memory.total / GIB:.1f}" for memory in found)])
    rows.append(["", "a step on H100, s", *(f"{choice.seconds:.2f}" for choice in choices)])
    return table(["when", "what", *(name for name, _, _ in GUIDE_LAYOUTS)], rows)


def save_table(choices: dict[int, Choice]) -> str:
    """Bytes and seconds of a save at the picked layouts."""
    rows = []
    for gpus, choice in choices.items():
        load, args = job(gpus).load, job(gpus).args
        layout = choice.sizes.parallel()
        saved = saved_bytes(
            args, layout, world_size=gpus, lora_rank=load.lora_rank, targets=load.targets
        )
        seconds = max(saved.node / MACHINE_WRITES, saved.total / ALL_WRITE)
        numbers = [f"{number / 1e6:,.1f}" for number in (saved.rank, saved.node, saved.total)]
        rows.append([f"{gpus:,}", *numbers, f"{seconds:.2f}"])
    headings = ["GPUs", "the busiest rank, MB", "the busiest machine, MB", "all, MB"]
    return table([*headings, "seconds"], rows)


def picture(half: dict[int, Choice], off: dict[int, Choice], path: Path) -> None:
    """Seconds of a step by phase, stacked, and the efficiency."""
    across = {gpus: pick(gpus, sizes=Sizes(1, 16, 1, 1)) for gpus in WORLDS if gpus > 8}
    runs = {HALF: half, OFF: off, f"{HALF}, EP 16 over 2 nodes": across}
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    figure.suptitle("Weak scaling of the 30B, 4 samples a GPU: modelled, not measured")
    axes = figure.subplots(1, len(runs) + 1)
    for plot, (name, found) in zip(axes, runs.items()):
        share = job(8, *(OFF_POLICY if found is off else ())).load.on_policy_share
        bottom = [0.0] * len(found)
        steps = [phases_of(choice.time, share) for choice in found.values() if choice.time]
        for phase in steps[0]:
            heights = [step[phase] for step in steps]
            label = phase if found is half else None
            plot.bar([f"{gpus:,}" for gpus in found], heights, bottom=bottom, label=label)
            bottom = [below + height for below, height in zip(bottom, heights)]
        plot.set_title(name.replace(", ", ",\n"), fontsize=9)
        plot.set(xlabel="GPUs", ylabel="seconds of a step" if found is half else "")
    axes[-1].set_title("tokens/s a GPU against 8 GPUs, %", fontsize=9)
    for name, found in runs.items():
        first = (off if found is off else half)[8].time
        speeds = {gpus: c.time.tokens_per_second_per_gpu for gpus, c in found.items() if c.time}
        assert first
        places = [WORLDS.index(gpus) for gpus in speeds]
        shares = [100 * speed / first.tokens_per_second_per_gpu for speed in speeds.values()]
        axes[-1].plot(places, shares, "o-", label=name.rpartition(", ")[2])
    axes[-1].set_xticks(range(len(WORLDS)), [f"{gpus:,}" for gpus in WORLDS])
    axes[-1].set(xlabel="GPUs", ylim=(0, 105))
    axes[-1].legend(fontsize=7, loc="lower left")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]), fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def tables(half: dict[int, Choice], off: dict[int, Choice]) -> str:
    """All of the page, of the picks for a run with rollouts in half of its steps and one without
    any.
    """
    parts = {
        f"{HALF} (the guide's `--lmbda 0.5`)": scaling_table(half),
        f"{OFF} (`--lmbda 0`)": scaling_table(off, *OFF_POLICY),
        "Experts inside a node, and over several": experts_table(),
        "The guide's job": guide_table(),
        "Its memory by kind: batch 4, rank 8, GiB": kinds_table(),
        "A save": save_table(half),
    }
    return "\n".join(f"### {title}\n\n{text}" for title, text in parts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--page", type=Path, help="rewrite the tables there, and the picture beside"
    )
    page = parser.parse_args().page
    half = {gpus: pick(gpus) for gpus in WORLDS}
    off = {gpus: pick(gpus, *OFF_POLICY) for gpus in WORLDS}
    text = tables(half, off)
    if page is None:
        print(text)
        return
    old = page.read_text(encoding="utf-8")
    pattern = f"{re.escape(BEGIN)}.*{re.escape(END)}"
    if not re.search(pattern, old, re.DOTALL):
        raise SystemExit(f"{page} has no place for the tables: a line {BEGIN}, and {END}")
    new = re.sub(pattern, lambda _: f"{BEGIN}\n\n{text}\n{END}", old, flags=re.DOTALL)
    page.write_text(new, encoding="utf-8")
    picture(half, off, page.with_suffix(".png"))


if __name__ == "__main__":
    main()
