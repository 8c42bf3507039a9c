"""What the planner says of its pick, against the numbers of the plan."""

import re

import pytest

from megatron_gkd.plan.layouts import make_plan
from megatron_gkd.plan.memory import GIB
from megatron_gkd.plan.reasons import why
from megatron_gkd.plan.table import memory_table, summary, time_table
from tests.plans import job_of

NAMES = {"TP": "tp", "EP": "ep", "PP": "pp", "CP": "cp"}


@pytest.fixture(scope="module")
def plan():
    return make_plan(job_of("--gpus", "16", "--context_parallel_size", "1"))


def fastest(plan, **sizes):
    """The fastest choice of a layout."""
    wanted = plan.pick.sizes._replace(**sizes)
    return min((c for c in plan.choices if c.sizes == wanted), key=lambda c: c.seconds)


def test_neighbours_are_the_fastest_of_theirs(plan):
    """With the phase that differs most, as much of it as the mean step has."""
    best, found = plan.pick, 0
    for chosen, beside in why(plan):
        name, number = chosen.rsplit(maxsplit=1)
        if name not in NAMES:
            continue
        assert int(number) == getattr(best.sizes, NAMES[name])
        for value, more, phase, part in re.findall(
            r"(\d+)(?: over \d+ nodes)? takes ([+-][\d.]+) s \(([a-z ]+) ([+-][\d.]+)\)", beside
        ):
            other = fastest(plan, **{NAMES[name]: int(value)})
            assert float(more) == pytest.approx(other.seconds - best.seconds, abs=6e-4)
            shares = {each: 0.5 if "rollout" in each else 1 for each in other.time.phases}
            differences = {
                each: shares[each] * (of.seconds - best.time.phases[each].seconds)
                for each, of in other.time.phases.items()
            }
            assert phase == max(differences, key=lambda each: abs(differences[each]))
            assert float(part) == pytest.approx(differences[phase], abs=6e-4)
            found += 1
    assert found == 4  # TP 2, EP 4 and 16, PP 2


def test_micro_batches_beside_the_picks(plan):
    same = [c for c in plan.choices if c.sizes == plan.pick.sizes and c.recompute == "none"]
    (beside,) = (said for chosen, said in why(plan) if chosen.startswith("micro-batches"))
    tokens = plan.pick.micro_batch_tokens
    assert re.findall(r"(\d+) takes", beside) == [str(tokens // 2), str(2 * tokens)]
    for value, more in re.findall(r"(\d+) takes ([+-][\d.]+) s", beside):
        (other,) = (c for c in same if c.micro_batch_tokens == int(value))
        assert float(more) == pytest.approx(other.seconds - plan.pick.seconds, abs=6e-4)


def test_the_tables_of_the_pick(plan):
    """Each kind of memory that is some, each phase with what takes most of it."""
    best = plan.pick
    memory = best.memory
    for kinds in (memory.always, memory.training, memory.rollout, memory.outside):
        for kind, number in kinds.items():
            shown = [line for line in memory_table(best) if line.endswith(f"  {kind}")]
            assert len(shown) == (number >= GIB / 20), kind
            assert not shown or float(shown[0].split()[0]) == pytest.approx(number / GIB, abs=0.06)
    lines = time_table(best)[1:]
    for line, (name, phase) in zip(lines, best.time.phases.items(), strict=True):
        seconds, exposed, *_ = line.split()
        assert float(seconds) == pytest.approx(phase.seconds, abs=6e-4)
        assert float(exposed) == pytest.approx(phase.communication, abs=6e-4)
        assert re.search(rf"  {name} +{phase.bottleneck}", line), line


def test_the_lines_of_the_summary(plan):
    best, lines = plan.pick, summary(plan)
    assert "  EP inside a node; DP over 2 nodes" in lines
    assert any(f"writes responses ({best.seconds:.2f} s are the mean of all), " in x for x in lines)
    assert f"{best.memory.total / GIB:.1f} of {plan.job.available / GIB:.1f} GiB" in "\n".join(
        lines
    )
    counted = [
        int(n.replace(",", "")) for n in re.findall(r"^  ([\d,]+): such as", "\n".join(lines), re.M)
    ]
    assert sum(counted) == len(plan.refusals) and counted == sorted(counted, reverse=True)


def test_ten_different_layouts_are_shown():
    lines = summary(make_plan(job_of("--gpus", "8")))
    start = next(n for n, line in enumerate(lines) if line.startswith("TP "))
    shown = [tuple(line.split()[:3]) for line in lines[start + 1 : start + 11]]
    assert len(set(shown)) == len(shown) == 10
