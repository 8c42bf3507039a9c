"""docs/scaling.md says what `python -m benchmarks.scaling` prints now."""

from pathlib import Path

import pytest

from benchmarks.scaling import BEGIN, END, OFF_POLICY, WORLDS, pick, tables
from megatron_gkd.plan.layouts import Sizes

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def of_page() -> str:
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def picks_of_page(text: str, title: str, *flags: str):
    """GPUs -> the choice that a row of the table under this title names, computed again."""
    table = text.partition(f"### {title}")[2].partition("\n### ")[0]
    found = {}
    for line in (line for line in table.splitlines() if line[:3].strip("| ").isdigit()):
        gpus, layout, recompute, tokens = [cell.strip() for cell in line.split("|")[1:5]]
        sizes = dict(part.split() for part in layout.replace(",", " x").split(" x "))
        numbers = [int(sizes.get(name, 1)) for name in ("TP", "EP", "PP", "CP")]
        fixed = ["--recompute", recompute, "--max_tokens_per_micro_batch", tokens]
        world = int(gpus.replace(",", ""))
        found[world] = pick(world, *flags, *fixed, sizes=Sizes(*numbers))
    assert list(found) == list(WORLDS)
    return found


def test_the_page_is_what_the_command_prints():
    """With the layouts that the page names, which a search would only find again."""
    text = of_page()
    half = picks_of_page(text, "Half of the steps on-policy")
    off = picks_of_page(text, "No step on-policy", *OFF_POLICY)
    assert text == tables(half, off).strip()


@pytest.mark.extended
def test_the_layouts_of_the_page_are_the_picks():
    picks = [{gpus: pick(gpus, *flags) for gpus in WORLDS} for flags in ((), OFF_POLICY)]
    assert of_page() == tables(*picks).strip()
