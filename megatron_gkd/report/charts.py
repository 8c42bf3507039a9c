"""Curves as inline SVG: axes with round numbers, gaps where a value is not finite, a mark at the
edge where one is far above the others.

The colours, and light and dark, are the style sheet's (page.css), by the classes c0, c1, ... A
polyline carries its steps and values, which page.js shows under the pointer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar

from markupsafe import Markup

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 20, 30  # around the plot, in the SVG's units
MOST_POINTS = 300  # of a series that are drawn
MOST_MARKERS = 60  # points of a series that have a marker each
MOST_TICKS = 5
LOGARITHMIC = 100
SMALLEST = 1e-100  # on a logarithmic axis
COLOURS = 8

Item = TypeVar("Item")
Kind = Literal["line", "faint", "dots"]


@dataclass(frozen=True)
class Series:
    """A curve. `values[i]` belongs to `steps[i]`; None: not finite."""

    name: str
    steps: Sequence[int]
    values: Sequence[float | None]
    colour: int = 0
    kind: Kind = "line"
    """line: with markers; faint: without, thin; dots: markers alone"""
    run: int = 0
    """Number of the run, by which the page hides it"""

    @cached_property
    def points(self) -> list[tuple[int, float]]:
        """Those with a value."""
        return [(step, value) for step, value in zip(self.steps, self.values) if value is not None]


@dataclass(frozen=True)
class Chart:
    """A drawn chart: `svg` is its markup, `notes` what the picture leaves out."""

    title: str
    unit: str
    svg: Markup
    series: list[Series]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Axis:
    """Numbers -> places along an edge."""

    low: float
    high: float
    ticks: list[float]
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)


def line_chart(
    title: str, unit: str, series: Sequence[Series], *, may_be_logarithmic: bool = False
) -> Chart | None:
    """The chart of the series, whose steps are its horizontal axis; None where no value is finite.
    unit: of the values: nats, tokens, s, ...; "" for a plain number. may_be_logarithmic: where all
    values are positive and the largest is more than LOGARITHMIC times the smallest.
    """
    series = [one for one in series if one.points]
    if not series:
        return None
    values = sorted(value for one in series for _, value in one.points)
    steps = [step for one in series for step in one.steps]
    differs = SMALLEST < LOGARITHMIC * values[0] < values[-1]
    logarithmic = may_be_logarithmic and differs
    top = values[-1] if logarithmic else _cut_off(values)
    horizontal = _axis(min(steps), max(steps), LEFT, WIDTH - RIGHT, whole=True)
    if logarithmic:
        vertical = _logarithmic_axis(values[0], top, HEIGHT - BOTTOM, TOP)
    else:
        vertical = _axis(values[0], top, HEIGHT - BOTTOM, TOP)
    above = [value for value in values if value > top]
    notes = []
    if above:
        notes.append(
            f"{len(above)} point{'s' if len(above) > 1 else ''} above the axis (▲), the highest "
            f"{short(above[-1])}"
        )
    missing = sum(value is None for one in series for value in one.values)
    if missing:
        notes.append(f"{missing} value{'s' if missing > 1 else ''} missing or not finite (×)")
    thinned = [
        Series(one.name, *thin(one.steps, one.values), one.colour, one.kind, one.run)
        for one in series
    ]
    scale = ", logarithmic" if logarithmic else ""
    parts = [_frame(horizontal, vertical, (unit + scale).removeprefix(", "))]
    parts += [_drawn(one, horizontal, vertical) for one in thinned]
    label = f"{title}{f' in {unit}' if unit else ''}, by step: {_in_words(series)}"
    svg = Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" data-unit="{}" data-left="{}" '
        'data-right="{}" data-low="{}" data-high="{}">{}</svg>'
    ).format(
        WIDTH,
        HEIGHT,
        label,
        unit,
        LEFT,
        WIDTH - RIGHT,
        f"{horizontal.low:.6g}",
        f"{horizontal.high:.6g}",
        Markup("").join(parts),
    )
    return Chart(title, unit, svg, list(series), notes)


def thin(
    steps: Sequence[int], values: Sequence[float | None], most: int = MOST_POINTS
) -> tuple[list[int], list[float | None]]:
    """At most about `most` points of a curve: of each stretch its first, lowest and highest, and
    one that is not finite, so that no spike and no gap is lost.
    """
    count = len(steps)
    if count <= most:
        return list(steps), list(values)
    stretch = math.ceil(3 * count / (most - 4))
    kept = {0, count - 1}
    for first in range(0, count, stretch):
        of_stretch = range(first, min(first + stretch, count))
        kept.add(first)
        finite = [(value, at) for at in of_stretch if (value := values[at]) is not None]
        if finite:
            kept |= {min(finite)[1], max(finite)[1]}
        kept |= set([at for at in of_stretch if values[at] is None][:1])
    return [steps[at] for at in sorted(kept)], [values[at] for at in sorted(kept)]


def running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """Of the finite values among the `window` around each (fewer at the ends), else None."""
    before, after = window // 2, (window + 1) // 2
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    means: list[float | None] = []
    for at in range(len(values)):
        low, high = max(at - before, 0), min(at + after, len(values))
        count = counts[high] - counts[low]
        means.append((sums[high] - sums[low]) / count if count else None)
    return means


def short(value: float | None) -> str:
    """A number in about four digits: 0.1234, 12,345, 1.2e-5; a dash for None."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 1000:
        text = f"{value:,.0f}"
    elif size == 0 or size >= 1e-3:
        text = f"{value:.4g}"
    else:
        text = _exponent(f"{value:.3g}")
    return text.replace("-", "−", 1) if value < 0 else text


def _exponent(text: str) -> str:
    """1e-05 as a flag has it: 1e-5."""
    return text.replace("e-0", "e-").replace("e+0", "e")


def round_ticks(
    low: float, high: float, most: int = MOST_TICKS, whole: bool = False
) -> list[float]:
    """At most `most` + 1 round numbers that lie in [low, high], at least two; whole: integers."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _axis(low: float, high: float, start: float, end: float, whole: bool = False) -> Axis:
    """Values that are all positive and differ much begin at 0, equal ones get room on both
    sides.
    """
    if not whole and 0 < low < 0.5 * high:
        low = 0.0
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
        room = 1.0 if whole else abs(high) * 0.1 or 1.0
        low, high = (low, high + room) if whole else (low - room, high + room)
    if not whole:
        room = 0.06 * (high - low)
        low, high = low if low == 0 else low - room, high + room
    return Axis(low, high, round_ticks(low, high, whole=whole), start, end)


def _logarithmic_axis(low: float, high: float, start: float, end: float) -> Axis:
    """With a tick at each power of ten, or at every second, third, ... one where they are many."""
    room = (high / low) ** 0.06
    low, high = low / room, high * room
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    every = math.ceil(len(powers) / MOST_TICKS)
    return Axis(low, high, [10.0**power for power in powers[::every]], start, end, True)


def _cut_off(values: Sequence[float]) -> float:
    """The highest value that the axis shows, of sorted ones: a few that are far above all others
    would press the rest against its bottom.
    """
    high = values[math.ceil(0.97 * len(values)) - 1]
    spread = high - values[0]
    far = len(values) >= 20 and spread > 0 and values[-1] > values[0] + 4 * spread
    return high + 0.5 * spread if far else values[-1]


def _frame(horizontal: Axis, vertical: Axis, unit: str) -> Markup:
    """Grid, axes and their numbers."""
    parts = []
    for tick in vertical.ticks:
        y = f"{vertical.at(tick):.1f}"
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                LEFT, WIDTH - RIGHT, y, y
            )
        )
        parts.append(
            Markup(
                '<text class="tick" x="{}" y="{}" text-anchor="end" dy="0.32em">{}</text>'
            ).format(LEFT - 6, y, tick_text(tick))
        )
    base = HEIGHT - BOTTOM
    parts.append(
        Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            LEFT, WIDTH - RIGHT, base, base
        )
    )
    for tick in horizontal.ticks:
        x = horizontal.at(tick)
        anchor = "end" if x > WIDTH - RIGHT - 14 else "middle"
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>').format(
                f"{x:.1f}", base + 14, anchor, tick_text(tick)
            )
        )
    parts.append(
        Markup('<text class="unit" x="{}" y="{}" text-anchor="end">step</text>').format(
            WIDTH - RIGHT, HEIGHT - 3
        )
    )
    if unit:
        parts.append(
            Markup('<text class="unit" x="{}" y="11" text-anchor="start">{}</text>').format(0, unit)
        )
    return Markup("").join(parts)


def tick_text(value: float) -> str:
    """A round number in few letters: 0.25, 12k, 1e-5."""
    value = 0.0 if abs(value) < 1e-15 else value
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        text = _exponent(f"{value:.3g}")
    elif size >= 1e4:
        text = f"{value / 1000:g}k"
    else:
        text = f"{value:.6g}"
    return text.replace("-", "−", 1) if value < 0 else text


def _drawn(one: Series, horizontal: Axis, vertical: Axis) -> Markup:
    """The line in pieces between gaps, its markers, and marks at the edges."""
    xs = [f"{horizontal.at(step):.2f}" for step in one.steps]
    top = vertical.end
    ys = [None if value is None else vertical.at(value) for value in one.values]
    bits = []
    if one.kind != "dots":
        pieces: list[list[str]] = [[]]
        for x, y in zip(xs, ys):
            if y is None:
                pieces.append([])
            else:
                pieces[-1].append(f"{x},{max(y, top):.2f}")
        bits += [
            Markup('<polyline points="{}"/>').format(" ".join(p)) for p in pieces if len(p) > 1
        ]
    if (
        one.kind == "dots"
        or (one.kind == "line" and len(xs) <= MOST_MARKERS)
        or len(one.points) == 1
    ):
        # a line of no length with round ends is a dot: one path for all of them
        path = "".join(f"M{x} {y:.2f}h0" for x, y in zip(xs, ys) if y is not None and y >= top)
        bits.append(Markup('<path class="dots" d="{}"/>').format(path))
    for x, y in zip(xs, ys):
        if y is None:
            bits.append(
                Markup('<text class="mark" x="{}" y="{}" text-anchor="middle">×</text>').format(
                    x, HEIGHT - BOTTOM - 2
                )
            )
        elif y < top:
            bits.append(
                Markup('<text class="mark" x="{}" y="{}" text-anchor="middle">▲</text>').format(
                    x, TOP + 2
                )
            )
    steps = " ".join(map(str, one.steps))
    values = " ".join("–" if value is None else f"{value:.5g}" for value in one.values)
    return Markup(
        '<g class="series {} c{} r{}" data-name="{}" data-steps="{}" data-values="{}">{}</g>'
    ).format(
        one.kind, one.colour % COLOURS, one.run, one.name, steps, values, Markup("").join(bits)
    )


def _in_words(series: Sequence[Series]) -> str:
    """What a chart shows, for those who do not see it."""
    texts = []
    for one in series:
        first, last = one.points[0], one.points[-1]
        texts.append(
            f"{one.name} from {short(first[1])} at step {first[0]} to {short(last[1])} at step "
            f"{last[0]}"
        )
    return "; ".join(texts)


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of the items in their order, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]


def table_of(chart: Chart, most: int = 12) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of a chart's numbers at some of its steps, the first and the last among
    them.
    """
    main = [one for one in chart.series if one.kind != "faint"] or chart.series
    steps = sorted({step for one in main for step in one.steps})
    steps = spread(steps, most)
    known = [dict(zip(one.steps, one.values)) for one in main]
    rows = [
        [f"{step:,}", *(short(of[step]) if step in of else "" for of in known)] for step in steps
    ]
    return ["step", *(one.name for one in main)], rows
