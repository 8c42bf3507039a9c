"""The HTML page of runs: everything inline, no network. What models, rows and files said is escaped
by the template, and the page's security policy lets no script run but its own.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from megatron_gkd.report.charts import short, table_of
from megatron_gkd.report.curves import draw
from megatron_gkd.report.read import RunRecord, number
from megatron_gkd.report.samples import samples_of
from megatron_gkd.report.summary import (
    PHASES,
    brief,
    differing_settings,
    entries,
    names_of_kinds,
    phase_times,
    show,
)

READING_ONE = (
    "Each dot is a logged step, thin lines are running means; the line with markers is the "
    "evaluation. Point at a chart for its values."
)
READING_SEVERAL = (
    "Lines with markers are evaluations, thin lines running means over logged steps. Point at a "
    "chart for its values; a click on a name hides a run."
)


@dataclass(frozen=True)
class Part:
    """A source or a pair of media, as one line of a file has it."""

    run: str
    step: int
    name: str
    jsd: float | None
    agreement: float | None
    accuracy: float | None
    tokens: float | None


@dataclass(frozen=True)
class Notes:
    """Of one run."""

    name: str
    folder: str
    notes: list[str]
    facts: str


def make_page(records: Sequence[RunRecord], made: datetime) -> str:
    """The page as text."""
    script, style = _file("page.js"), _file("page.css")
    # a closing tag cannot occur in either; `</` inside would end it
    assert "</" not in script + style
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = breakable
    environment.filters["slug"] = lambda text: re.sub(r"\W+", "-", text.lower())
    log, groups = entries(records), draw(records)
    phases = [times for record in records for times in phase_times(record)]
    samples = [samples_of(record) for record in records]
    page = environment.from_string(_file("page.html.jinja")).render(
        title=records[0].name if len(records) == 1 else f"{len(records)} runs compared",
        made=f"{made:%d %b %Y, %H:%M}",
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        script=Markup(script),
        style=Markup(style),
        entries=log,
        remarks=any(entry.remarks for entry in log),
        settings=differing_settings(records),
        groups=groups,
        reading=READING_ONE if len(records) == 1 else READING_SEVERAL,
        kinds=_kinds(records[0]),
        phases=phases,
        phase_names=[name.removesuffix("_time") for name in PHASES],
        longest=max((times.total for times in phases), default=1.0) or 1.0,
        parts=[part for record in records for part in parts_of(record)],
        samples=[of for of in samples if of.questions or of.from_training],
        notes=[
            Notes(record.name, str(record.folder.resolve()), record.notes, _facts(record))
            for record in records
        ],
        short=short,
        show=show,
        brief=brief,
        share=share,
        numbers=table_of,
    )
    return printable(page)


def breakable(name: str) -> Markup:
    """A long name that may be broken behind its punctuation, before it is anywhere else."""
    return Markup("<wbr>").join(re.findall(r"[^_./-]*[_./-]?", name))


def printable(text: str) -> str:
    """The text with a question mark for what no file can hold: half of a pair of surrogates, which
    JSON can spell.
    """
    return text.encode("utf-8", "replace").decode("utf-8")


def share(value: float | None) -> str:
    """0.9131 -> 91.3 %; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f} %"


def parts_of(record: RunRecord) -> list[Part]:
    """Sources and media of the last evaluation, else of the last logged step that has them."""
    lines = [
        line
        for line in (record.evaluations or record.metrics)
        if any(isinstance(line.get(key), dict) for key in ("by_source", "by_media"))
    ]
    if not lines:
        return []
    found = []
    for key in ("by_source", "by_media"):
        split: Any = lines[-1].get(key)
        for name, means in split.items() if isinstance(split, dict) else ():
            if isinstance(means, dict):
                values = (
                    number(means.get(column))
                    for column in ("jsd", "top1_agreement", "token_accuracy", "num_tokens")
                )
                found.append(Part(record.name, lines[-1]["step"], name, *values))
    return found


def _kinds(record: RunRecord) -> list[tuple[str, int, str]]:
    """The legend of a page of one run: (name, colour, kind of curve)."""
    written = {bool(line.get("on_policy")) for line in record.metrics}
    found = [
        (name, int(on_policy), "dots")
        for name, on_policy in names_of_kinds(record)
        if on_policy in written
    ]
    return found + ([("evaluation", 2, "line")] if record.evaluations else [])


def _facts(record: RunRecord) -> str:
    """Versions and parameter counts, in a line."""
    versions = [f"{name} {version}" for name, version in record.part("versions").items()]
    counts = [
        f"{name} parameters {count:,}" if isinstance(count, int) else f"{name} {count}"
        for name, count in record.part("parameters").items()
    ]
    return "; ".join(filter(None, (", ".join(versions), ", ".join(counts))))


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
