"""The page and the table as text: charts, what is escaped, the command line."""

import json
import math
import random
import re
from html.parser import HTMLParser

import pytest

from megatron_gkd.report.__main__ import main, write_report
from megatron_gkd.report.charts import (
    Series,
    line_chart,
    round_ticks,
    running_mean,
    short,
    table_of,
    thin,
    tick_text,
)
from megatron_gkd.report.curves import draw
from megatron_gkd.report.read import read_runs
from tests.report_runs import HOSTILE, metrics_line, write_lines, write_run


class Tags(HTMLParser):
    """The elements of a page, and those that are still open."""

    VOID = ("meta", "link", "br", "wbr", "img")

    def __init__(self, text: str):
        super().__init__()
        self.seen: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_command(tmp_path, capsys, monkeypatch):
    """Both files, beside the run or where --output says; whatever a model wrote stays text."""
    folder = write_run(tmp_path / "run")
    main([str(folder)])
    assert capsys.readouterr().out == f"{folder}/report.html\n{folder}/report.md\n"
    page = (folder / "report.html").read_text(encoding="utf-8")
    tags = Tags(page)
    assert tags.open == []
    assert [tag for tag, _ in tags.seen].count("script") == 1
    assert not {"img", "iframe", "object", "form"} & {tag for tag, _ in tags.seen}
    addresses = [
        value
        for _, attributes in tags.seen
        for name, value in attributes.items()
        if name in ("src", "href") and not value.startswith("#")
    ]
    assert addresses == ["data:,"]
    assert HOSTILE not in page and "&lt;/script&gt;&lt;script&gt;window.hacked" in page
    assert not list(folder.glob("*.tmp"))
    table = (folder / "report.md").read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if line.startswith("| run | 27 Nov 2026"))
    assert "| 36.5 |" in row and "LoRA r 16, α 32" in row
    assert "| lora_rank | 16 | – |" in table

    monkeypatch.chdir(tmp_path)
    other = write_run(tmp_path / "a|b<c>", learning_rate=0.1)
    main([str(folder), str(other)])
    assert (tmp_path / "report.html").is_file()
    table = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| learning_rate | 1e-5 | 0.1 |" in table and r"a\|b&lt;c>" in table
    main([str(folder), "--output", str(tmp_path / "new" / "page.html")])
    assert (tmp_path / "new" / "page.md").is_file()


@pytest.mark.parametrize(
    "words, reason",
    [
        (["nowhere"], "nowhere is no folder"),
        ([], "the following arguments are required: RUN"),
        (["RUN", "--output", "page.png"], "must be the name of an .html file"),
        (["RUN", "--outptu", "x"], "the nearest is --output"),
    ],
)
def test_what_is_refused(tmp_path, capsys, words, reason):
    folder = str(write_run(tmp_path / "run"))
    with pytest.raises(SystemExit) as ended:
        main([folder if word == "RUN" else word for word in words])
    assert ended.value.code == 2 and reason in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("report.*"))


DAMAGE = [None, True, -1, 1e308, -1e-320, math.nan, "x", "", [], [1], {}, {"a": {"jsd": "x"}}]
DAMAGE += ["\ud800", 10**400]


def damage(values: dict, draw: random.Random) -> None:
    """Values of another kind, or none, at any depth."""
    for key in list(values):
        chance = draw.random()
        if chance < 0.12:
            values[key] = draw.choice(DAMAGE)
        elif chance < 0.18:
            del values[key]
        elif isinstance(values[key], dict):
            damage(values[key], draw)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_files_hold_there_is_a_page(tmp_path, seed):
    draw = random.Random(seed)
    whole, damaged = (
        write_run(tmp_path / "whole", steps=2),
        write_run(tmp_path / "damaged", steps=5),
    )
    for name in ("metrics.jsonl", "eval.jsonl", "rollouts.jsonl"):
        lines = [json.loads(line) for line in (damaged / name).read_text().splitlines()]
        for line in lines:
            damage(line, draw)
        write_lines(damaged / name, lines)
    description = json.loads((damaged / "run.json").read_text())
    damage(description, draw)
    (damaged / "run.json").write_text(json.dumps(description))
    for folders in ([damaged], [damaged, whole], [whole, damaged]):
        page, table = write_report(list(map(str, folders)), str(tmp_path / "page.html"))
        assert Tags(page.read_text(encoding="utf-8")).open == []
        assert "| damaged |" in table.read_text(encoding="utf-8")


def test_half_surrogates_and_control_characters_do_not_end_the_page(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "rollouts.jsonl").write_text(
        '{"step": 1, "when": "eval", "author": "student", "row": 0, "prompt": "\\ud800\\u0000", '
        '"response": ["not text"], "num_tokens": "x"}\n'
    )
    main([str(folder)])
    assert "not text" in (folder / "report.html").read_text(encoding="utf-8")


def test_all_metrics_have_a_chart_also_those_of_tomorrow(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = [metrics_line(step, 9, clip_share=0.5 * step) for step in range(1, 10)]
    write_lines(folder / "metrics.jsonl", lines)
    drawn = {
        group.title: [chart.title for chart in group.charts] for group in draw(read_runs([folder]))
    }
    assert drawn["Distance to the teacher"] == [
        "Loss",
        "Divergence",
        "KL(student ‖ teacher)",
        "KL(teacher ‖ student)",
    ]
    assert drawn["Other metrics"] == ["clip_share"]
    assert "Skipped steps so far" not in drawn["Optimisation"]  # none was


def points(chart, kind: str = "polyline") -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, point.split(","))) for point in line.split()]
        for line in re.findall(rf'<{kind} points="([^"]*)"', chart.svg)
    ]


def test_a_curve_lies_where_its_numbers_are():
    chart = line_chart("a", "nats", [Series("b", [0, 50, 100], [0.0, 1.0, 2.0])])
    ((first, middle, last),) = points(chart)
    assert first[0] == 46 and last[0] == 390 and middle[0] == 218  # the plot's width
    assert first[1] > middle[1] > last[1]
    assert first[1] - middle[1] == pytest.approx(middle[1] - last[1], abs=0.01)
    assert 'data-values="0 1 2"' in chart.svg and chart.notes == []
    assert "a in nats, by step: b from 0 at step 0 to 2 at step 100" in chart.svg


def test_gaps_points_far_above_and_logarithmic_axes():
    values = [1.0, None, 3.0, 4.0]
    chart = line_chart("a", "", [Series("b", [1, 2, 3, 4], values)])
    assert [len(piece) for piece in points(chart)] == [2] and chart.svg.count("×</text>") == 1
    assert chart.notes == ["1 value missing or not finite (×)"]

    spike = [1 + 0.01 * step for step in range(99)] + [500.0]
    chart = line_chart("a", "", [Series("b", list(range(100)), spike, kind="dots")])
    assert chart.svg.count("▲</text>") == 1 and "the highest 500" in chart.notes[0]

    falling = [10.0**-step for step in range(4)]
    chart = line_chart("a", "", [Series("b", [0, 1, 2, 3], falling)], may_be_logarithmic=True)
    ((_, *middle, _),) = points(chart)
    heights = [y for _, y in points(chart)[0]]
    assert heights[1] - heights[0] == pytest.approx(heights[3] - heights[2], abs=0.02)
    assert "logarithmic" in chart.svg and len(middle) == 2
    assert line_chart("a", "", [Series("b", [1], [None])]) is None
    assert line_chart("a", "", [Series("b", [7], [0.25])]).svg.count("<path") == 1


def test_long_curves_keep_their_extremes_and_gaps():
    steps = list(range(1, 10_001))
    values = [float(step % 10) for step in steps]
    values[4321], values[777] = 99.0, None
    thinned_steps, thinned = thin(steps, values)
    assert len(thinned_steps) <= 450 and thinned_steps == sorted(set(thinned_steps))
    assert dict(zip(thinned_steps, thinned))[4322] == 99.0
    assert dict(zip(thinned_steps, thinned))[778] is None
    assert (thinned_steps[0], thinned_steps[-1]) == (1, 10_000)


def test_running_mean():
    assert running_mean([1.0, 2.0, 6.0, None, 2.0], 3) == [1.5, 3.0, 4.0, 4.0, 2.0]
    assert running_mean([None, None], 2) == [None, None]
    assert running_mean([1.0, 5.0], 1) == [1.0, 5.0]


@pytest.mark.parametrize(
    "low, high, ticks",
    [
        (0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (0, 10_000, ["0", "2000", "4000", "6000", "8000", "10k"]),
        (0.1, 0.12, ["0.1", "0.105", "0.11", "0.115", "0.12"]),
        (0, 1e-5, ["0", "2e-6", "4e-6", "6e-6", "8e-6", "1e-5"]),
        (-1, 1, ["−1", "−0.5", "0", "0.5", "1"]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert [tick_text(tick) for tick in round_ticks(low, high)] == ticks


def test_numbers_in_words_and_tables():
    assert [short(value) for value in (None, 0.12345, 12345.6, 1.5e-7, -2.0, 0.0)] == [
        "–",
        "0.1235",
        "12,346",
        "1.5e-7",
        "−2",
        "0",
    ]
    chart = line_chart("a", "", [Series("b", list(range(101)), [float(x) for x in range(101)])])
    headings, rows = table_of(chart)
    assert headings == ["step", "b"] and len(rows) == 12
    assert rows[0] == ["0", "0"] and rows[-1] == ["100", "100"]
