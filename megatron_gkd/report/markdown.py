"""The experiment log as Markdown: a table of the runs, and one of the settings that differ."""

from collections.abc import Sequence
from datetime import datetime

from megatron_gkd.report.charts import short
from megatron_gkd.report.page import printable, share
from megatron_gkd.report.read import RunRecord
from megatron_gkd.report.summary import brief, differing_settings, entries

HEADINGS = (
    "run",
    "date",
    "configuration",
    "data",
    "hardware",
    "memory a rank (GiB)",
    "s a step",
    "final loss (nats)",
    "evaluation: divergence (nats)",
    "evaluation: agreement",
    "remarks",
    "against the run before",
)


def make_markdown(records: Sequence[RunRecord], made: datetime) -> str:
    """The tables as text, with what the runs' files lack below them."""
    log = [
        (
            entry.name,
            f"{entry.started}; {entry.state}",
            "; ".join(entry.configuration),
            "; ".join(entry.data),
            "; ".join(entry.hardware),
            short(entry.memory_gib),
            short(entry.step_seconds),
            short(entry.final_loss),
            f"{short(entry.first_jsd)} → {short(entry.last_jsd)}",
            f"{share(entry.first_agreement)} → {share(entry.last_agreement)}",
            "; ".join(entry.remarks) or "–",
            "; ".join(entry.changes) or "–",
        )
        for entry in entries(records)
    ]
    one = len(records) == 1
    titles = ("here", "default") if one else tuple(record.name for record in records)
    settings = [(name, *map(brief, values)) for name, values in differing_settings(records)]
    notes = [f"- {record.name}: {note}" for record in records for note in record.notes]
    parts = [f"# Experiment log, {made:%d %b %Y}", _table(HEADINGS, log)]
    if settings:
        title = "Settings that are not the defaults" if one else "Settings that differ"
        parts += [f"## {title}", _table(("setting", *titles), settings)]
    if notes:
        parts += ["## Notes", "\n".join(notes)]
    return printable("\n\n".join(parts) + "\n")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """On one line, with nothing that ends the cell or is markup."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
