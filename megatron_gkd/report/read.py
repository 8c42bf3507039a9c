"""A run's folder -> `RunRecord`: what its files say, in whatever state they are.

A run may still be going, or have been killed in the middle of a line, resumed, or never evaluated.
What is missing or was left out is a note, which the page shows; nothing is guessed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

LINES = {
    "metrics.jsonl": "no step was logged",
    "eval.jsonl": "no evaluation was made",
    "rollouts.jsonl": "no responses were kept (--log_rollouts)",
}
RUN_JSON, REMARKS = "run.json", "remarks.txt"
LARGEST = 1e100
MOST_NAMED = 5  # lines or steps that a note names

Line = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """What a run left. Lines are in the order of their steps; numbers that are not finite are
    None.
    """

    name: str
    folder: Path
    metrics: list[Line] = field(default_factory=list)
    evaluations: list[Line] = field(default_factory=list)
    rollouts: list[Line] = field(default_factory=list)
    description: Line = field(default_factory=dict)
    """run.json; empty where there is none"""
    remarks: str = ""
    """remarks.txt, which a person writes"""
    notes: list[str] = field(default_factory=list)
    """What is missing, incomplete or was left out"""
    last_written: datetime | None = None
    """When the newest of its files was written"""

    def setting(self, name: str) -> Any:
        """A setting by the name of its flag; None where run.json does not have it."""
        return self.settings().get(name)

    def settings(self) -> Line:
        """All settings by the names of their flags, which are unique over the groups."""
        groups = self.part("config").values()
        return {
            key: value
            for group in groups
            if isinstance(group, dict)
            for key, value in group.items()
        }

    def part(self, name: str) -> Line:
        """A group of run.json: config, versions, parameters, layout, hardware."""
        found = self.description.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def last_step(self) -> int:
        """The newest step that any line is about; 0 without lines."""
        return max((line["step"] for line in self.metrics + self.evaluations), default=0)


def number(value: Any) -> float | None:
    """A number as float, True as 1; None for all else, also for what is not finite or beyond
    LARGEST: a metric that has come there is broken, and charts can compute with the others.
    """
    if isinstance(value, (bool, int, float)) and abs(value) <= LARGEST:  # NaN is not
        return float(value)
    return None


def column(lines: Sequence[Line], name: str) -> tuple[list[int], list[float | None]]:
    """(steps, values) of the lines that have the key `name`; None: it holds no finite number."""
    found = [(line["step"], number(line[name])) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]


def read_runs(folders: Sequence[str]) -> list[RunRecord]:
    """A record for each folder, in the order given; `short_names` names them. Raises ValueError for
    a folder that is given twice or is none of a run.
    """
    paths = [Path(folder) for folder in folders]
    seen: dict[Path, str] = {}
    for path, given in zip(paths, folders):
        if path.resolve() in seen:
            raise ValueError(f"{given} is the folder of {seen[path.resolve()]}: give each run once")
        seen[path.resolve()] = given
    return [read_run(path, name) for path, name in zip(paths, short_names(paths))]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Of each folder the last part of its path, or as many as tell it from the others."""
    parts = [path.resolve().parts for path in paths]
    longest = max(map(len, parts))
    names = ["/".join(part[-1:]) for part in parts]
    for length in range(2, longest + 1):
        if len(set(names)) == len(names):
            break
        twice = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(part[-length:]) if name in twice else name for name, part in zip(names, parts)
        ]
    return names


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """The record of one run. Raises ValueError where `folder` holds none of a run's files."""
    files = [folder / file for file in (*LINES, RUN_JSON)]
    present = [path for path in files if path.is_file()]
    if not present:
        below = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
        hint = f"; runs below it: {', '.join(below[:MOST_NAMED])}" if below else ""
        what = (
            "is not a run's folder: it has no metrics.jsonl" if folder.is_dir() else "is no folder"
        )
        raise ValueError(f"{folder} {what}{hint}")
    notes: list[str] = []
    lines = {file: _read_lines(folder / file, missing, notes) for file, missing in LINES.items()}
    description = _read_json(folder / RUN_JSON, notes)
    earlier = sorted(path.name for path in folder.glob("metrics.*.jsonl"))
    if earlier:
        notes.append(f"{', '.join(earlier)}: of earlier runs in this folder, not shown")
    return RunRecord(
        name=name or folder.resolve().name,
        folder=folder,
        metrics=lines["metrics.jsonl"],
        evaluations=lines["eval.jsonl"],
        rollouts=lines["rollouts.jsonl"],
        description=description,
        remarks=_read_text(folder / REMARKS).strip(),
        notes=notes,
        last_written=datetime.fromtimestamp(max(path.stat().st_mtime for path in present)),
    )


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_json(path: Path, notes: list[str]) -> Line:
    if not path.is_file():
        notes.append(f"{path.name} is missing: settings and versions are not known")
        return {}
    try:
        found = json.loads(_read_text(path))
    except ValueError as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{path.name} holds no settings")
        return {}
    return found


def _read_lines(path: Path, missing: str, notes: list[str]) -> list[Line]:
    """The lines of a file as a run that never stopped would have written them: where steps start
    again from an earlier one, as a resumed run's do, the later lines count.
    """
    if not path.is_file():
        notes.append(f"{path.name} is missing: {missing}")
        return []
    text = _read_text(path)
    lines: list[Line] = []
    bad: list[int] = []
    undone = 0
    written = text.split("\n")
    for row, raw in enumerate(written, start=1):
        if not raw.strip():
            continue
        line = _parsed(raw)
        if line is None:
            bad.append(row)
            continue
        while lines and lines[-1]["step"] > line["step"]:
            lines.pop()
            undone += 1
        # one line a step, but of responses, which are several
        if path.name != "rollouts.jsonl" and lines and lines[-1]["step"] == line["step"]:
            lines.pop()
            undone += 1
        lines.append(line)
    if bad and bad[-1] == len(written):  # without the newline that ends a line
        notes.append(f"{path.name}: the last line is incomplete and left out")
        bad.pop()
    if bad:
        notes.append(f"{path.name}: not a line of this file and left out: {_listed(bad, 'line')}")
    if undone:
        many = "lines were" if undone > 1 else "line was"
        notes.append(
            f"{path.name}: {undone} {many} written again by a resumed run; the later count"
        )
    if not lines:
        notes.append(f"{path.name} is empty: {missing}")
    return lines


def _parsed(raw: str) -> Line | None:
    """A line with a step, or None."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    step = line.get("step")
    return line if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def _listed(numbers: Sequence[int], what: str) -> str:
    """`lines 3, 7 and 12 more`."""
    named = ", ".join(map(str, numbers[:MOST_NAMED]))
    more = f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else ""
    return f"{what}{'s' if len(numbers) > 1 else ''} {named}{more}"


def loss_notes(record: RunRecord) -> list[str]:
    """The steps whose loss is no number, in words: those without a token that carries one, and
    those that were bad.
    """
    without = [line for line in record.metrics if number(line.get("loss", 0)) is None]
    # a step that was skipped for its rollout has no batch, and no length
    is_empty = [
        line.get("num_tokens") == 0 and bool(number(line.get("response_length")))
        for line in without
    ]
    empty = [line["step"] for line, is_one in zip(without, is_empty) if is_one]
    bad = [line["step"] for line, is_one in zip(without, is_empty) if not is_one]
    found = (("no token carried a loss at", empty), ("the loss was not finite at", bad))
    return [f"{words} {_listed(steps, 'step')}" for words, steps in found if steps]
