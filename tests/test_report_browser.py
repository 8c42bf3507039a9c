"""The page of `python -m megatron_gkd.report` in a headless Chromium: nothing is fetched, no script
but its own runs, charts are drawn, nothing is wider than a phone's or a desktop's window.
"""

from pathlib import Path

import pytest

from megatron_gkd.report.__main__ import write_report
from tests.browser import find_browser, open_browser
from tests.report_runs import write_run

LONG = "a_rather_long_name_that_somebody_gave_to_a_run_of_rank_16_with_learning_rate_1e-5"
# What is wider than the window although it does not lie in something that scrolls by itself.
WIDE = """[...document.querySelectorAll("body *")].filter((one) => {
    const box = one.getBoundingClientRect();
    if (box.width === 0 || box.right <= innerWidth + 0.5 && box.left >= -0.5) return false;
    return !one.closest(".scroll, .hidden, #tip");
}).map((one) => one.tagName + "." + one.getAttribute("class"))"""
UNDRAWN = """[...document.querySelectorAll(".plot svg")].filter((svg) => {
    const box = svg.getBoundingClientRect();
    const drawn = [...svg.querySelectorAll(".series > *")];
    const curves = drawn.map((one) => one.getBoundingClientRect());
    const inside = curves.every((one) => one.left >= box.left && one.right <= box.right
        && one.top >= box.top && one.bottom <= box.bottom);
    return box.width < 200 || box.height < 100 || !inside || !curves.some((one) => one.width > 50);
}).length"""


@pytest.fixture(scope="module")
def page():
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with open_browser(path) as found:
        yield found


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[int, Path]:
    """Pages by the number of their runs."""
    root = tmp_path_factory.mktemp("report")
    runs = [
        write_run(root / f"{LONG}_{number}", bad_steps=(7, 20), learning_rate=10.0 ** (-3 - number))
        for number in range(8)
    ]
    (runs[0] / "remarks.txt").write_text(5 * LONG)
    return {
        number: write_report([str(run) for run in runs[:number]], str(root / f"{number}.html"))[0]
        for number in (1, 8)
    }


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("number", [1, 8])
def test_the_page_is_whole(page, reports, number, width):
    page.open(reports[number], width)
    assert [url for url in page.requests() if not url.startswith("data:")] == [
        reports[number].resolve().as_uri()
    ]
    assert page.errors() == []
    assert page.run("window.hacked") is None and page.run("document.images.length") == 0
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run(WIDE) == []
    if width < 400:
        assert page.run("document.querySelector('#log .scroll').scrollWidth") <= width
    assert page.run("document.querySelectorAll('.plot svg').length") >= 10
    assert page.run(UNDRAWN) == 0
    text = page.run("document.body.innerText")
    for words in ("Experiment log", "KL(student ‖ teacher)", "What the student wrote", "莱茵河"):
        assert words in text
    assert "</script><script>window.hacked" in text


def test_values_under_the_pointer_and_hidden_runs(page, reports):
    page.open(reports[8], 1280)
    box = page.run("""(() => {
        const svg = document.querySelector(".plot svg");
        svg.scrollIntoView({block: "center"});
        const {left, top, width, height} = svg.getBoundingClientRect();
        return {x: left + 0.545 * width, y: top + height / 2};  // the middle of the plot
    })()""")
    page.command("Input.dispatchMouseEvent", type="mouseMoved", **box)
    shown = page.run("document.getElementById('tip').innerText")
    assert shown.startswith("step 30") and f"{LONG}_0, evaluation 0.1004" in shown
    visible = """[...document.querySelectorAll(".plot .r0")].filter(
        (one) => one.getBoundingClientRect().width).length"""
    assert page.run(visible) > 10
    page.run("document.querySelector('.legend button').click()")
    assert page.run(visible) == 0
    assert (
        page.run("document.querySelector('.legend button').getAttribute('aria-pressed')") == "false"
    )


def test_light_and_dark(page, reports):
    colours = []
    for scheme in ("light", "dark"):
        page.command(
            "Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)]
        )
        page.open(reports[1], 1280)
        colours.append(page.run("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(251, 251, 250)", "rgb(20, 22, 26)"]


def test_on_paper(page, reports):
    """A4: tables of many columns are as wide as the sheet."""
    page.command("Emulation.setEmulatedMedia", media="print", features=[])
    for path in reports.values():
        page.open(path, 794)
        assert page.run("document.documentElement.scrollWidth") <= 794
        assert page.run("document.querySelector('#log .scroll').scrollWidth") <= 794
        assert page.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    page.command("Emulation.setEmulatedMedia", media="")
