"""`RunRecord` -> the lines of the experiment log: date, configuration, data, hardware, memory,
seconds a step, loss, remarks; what differs between runs, and what one changed against the one
before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePath
from typing import Any

from megatron_gkd.config import default_settings
from megatron_gkd.report.charts import short
from megatron_gkd.report.read import Line, RunRecord, column, loss_notes, number

PHASES = ("data_time", "rollout_time", "teacher_time", "student_time", "optimizer_time")
FINAL_LINES = 10  # logged steps whose mean is the final training loss
MOST_CHANGES = 6  # settings that are named as changed against the run before
MOST_FILES = 4  # of the data that are named
MOST_CHARACTERS = 160  # of a setting that are shown
# Where a run is kept and how it is looked at: no difference between two runs.
BOOKKEEPING = {
    "output_dir",
    "logging_steps",
    "report_to",
    "log_rollouts",
    "resume_from_checkpoint",
    "prepared_rows",
    "prepared_rows_gib",
}
# Named in the configuration where they are set.
LOSS_OPTIONS = {
    "divergence_clip": "clip",
    "loss_top_k": "top K",
    "skip_first_tokens": "without first tokens",
    "token_weight": "weight",
    "importance_clip": "importance at most",
    "sft_alpha": "SFT",
}
TEACHERS = {
    "teacher_adapter": "teacher adapter",
    "teacher_ema": "teacher EMA",
    "teacher_sync_steps": "teacher copied every",
}


@dataclass(frozen=True)
class Entry:
    """A run in the experiment log. Numbers are None where they were not measured."""

    name: str
    started: str
    state: str
    """`150 steps`, or `at step 120 of 500`"""
    configuration: list[str]
    data: list[str]
    hardware: list[str]
    memory_gib: float | None
    """The most of any rank"""
    step_seconds: float | None
    """Mean, without the first logged step, which has start-up in it"""
    tokens_per_second: float | None
    final_loss: float | None
    """Mean over the last logged steps, in nats a token"""
    first_jsd: float | None
    last_jsd: float | None
    """Divergence on the evaluation data, first and last, in nats a token"""
    first_agreement: float | None
    last_agreement: float | None
    remarks: list[str]
    changes: list[str]
    """Against the run before"""


@dataclass(frozen=True)
class PhaseTimes:
    """Mean seconds of the phases of a kind of step."""

    run: str
    kind: str
    num_steps: int
    seconds: list[float]
    """In the order of PHASES"""

    @property
    def total(self) -> float:
        return sum(self.seconds)


def entries(records: Sequence[RunRecord]) -> list[Entry]:
    """An entry for each run, each compared with the one before it."""
    found: list[Entry] = []
    for index, record in enumerate(records):
        entry = _entry(record)
        if index:
            entry.changes.extend(_changes(records[index - 1], record, found[-1], entry))
        found.append(entry)
    return found


def _entry(record: RunRecord) -> Entry:
    losses = [value for value in column(record.metrics, "loss")[1] if value is not None]
    jsd, agreement = (column(record.evaluations, name)[1] for name in ("jsd", "top1_agreement"))
    return Entry(
        name=record.name,
        started=_started(record),
        state=_state(record),
        configuration=_configuration(record),
        data=_data(record),
        hardware=_hardware(record),
        memory_gib=max(_finite(record.metrics, "peak_memory_gib"), default=None),
        step_seconds=_mean(_finite(record.metrics[1:] or record.metrics, "step_time")),
        tokens_per_second=_mean(_finite(record.metrics[1:] or record.metrics, "tokens_per_second")),
        final_loss=_mean(losses[-FINAL_LINES:]),
        first_jsd=jsd[0] if jsd else None,
        last_jsd=jsd[-1] if jsd else None,
        first_agreement=agreement[0] if agreement else None,
        last_agreement=agreement[-1] if agreement else None,
        remarks=_remarks(record),
        changes=[],
    )


def differing_settings(records: Sequence[RunRecord]) -> list[tuple[str, list[Any]]]:
    """(name, value in each run) of the settings, the layout and the versions that are not the same
    in all runs; of one run, those that are not the default, with the default as second value.
    """
    known = [record for record in records if record.description]
    if len(records) == 1:
        default = default_settings()
        return [
            (name, [value, default[name]])
            for name, value in records[0].settings().items()
            if name in default and name not in BOOKKEEPING and not _same(value, default[name])
        ]
    tables = [_described(record) for record in records]
    names = dict.fromkeys(name for table in tables for name in table)
    return [
        (name, [table.get(name) for table in tables])
        for name in names
        if name.split(": ")[-1] not in BOOKKEEPING
        and any(
            not _same(table.get(name), tables[records.index(known[0])].get(name))
            for record, table in zip(records, tables)
            if record.description
        )
    ]


def _described(record: RunRecord) -> Line:
    """Settings by name, and `layout: tp` and so on."""
    others = {
        f"{part}: {name}": value
        for part in ("layout", "versions")
        for name, value in record.part(part).items()
    }
    settings = record.settings()  # of an earlier version: without those that came later
    return (default_settings() | settings if settings else {}) | others


def _same(first: Any, second: Any) -> bool:
    """Equal, or numbers or lists that are written alike: `0.5` of a schedule and 0.5."""
    return first == second or show(first) == show(second)


def show(value: Any) -> str:
    """A setting as a person writes it."""
    if value is None or value == []:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(map(show, value))
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


def brief(value: Any) -> str:
    """`show`, of a long text its beginning and its length."""
    text = show(value)
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]}… ({len(text):,} characters)"


def phase_times(record: RunRecord) -> list[PhaseTimes]:
    """Mean seconds of each phase, apart for steps on data and steps on text that the run wrote; the
    first logged step, which has start-up in it, counts only where it is alone.
    """
    lines = record.metrics[1:] or record.metrics
    found = []
    for kind, of_kind in by_kind(record, lines):
        seconds = [_mean(_finite(of_kind, phase)) for phase in PHASES]
        if any(value is not None for value in seconds):
            found.append(
                PhaseTimes(record.name, kind, len(of_kind), [value or 0.0 for value in seconds])
            )
    return found


def names_of_kinds(record: RunRecord) -> tuple[tuple[str, bool], tuple[str, bool]]:
    """Steps on others' responses, the data's or with --seq_kd the teacher's, and on the student's:
    (name, on_policy).
    """
    others = "steps on the teacher's text" if record.setting("seq_kd") else "steps on data"
    return (others, False), ("on-policy steps", True)


def by_kind(record: RunRecord, lines: Sequence[Line]) -> list[tuple[str, list[Line]]]:
    """The logged steps of each kind that there is."""
    parts = [
        (name, [line for line in lines if bool(line.get("on_policy")) is written])
        for name, written in names_of_kinds(record)
    ]
    return [(name, part) for name, part in parts if part]


def _started(record: RunRecord) -> str:
    started = record.description.get("started")
    if isinstance(started, str):
        try:
            return f"{datetime.fromisoformat(started):%d %b %Y, %H:%M}"
        except ValueError:
            pass
    return f"before {record.last_written:%d %b %Y, %H:%M}" if record.last_written else "–"


def _state(record: RunRecord) -> str:
    total, step = number(record.setting("max_steps")), record.last_step
    steps = f"{step:,} step{'' if step == 1 else 's'}"
    if total is None or total < 0:
        return steps
    if step >= total:
        return f"complete: {steps}"
    written = f", last written {record.last_written:%d %b, %H:%M}" if record.last_written else ""
    return f"at step {step:,} of {total:,.0f}{written}"


def _configuration(record: RunRecord) -> list[str]:
    settings = record.settings()
    if not settings:
        return ["not known: no run.json"]

    def of(*names: str) -> list[str]:
        return [show(settings.get(name)) for name in names]

    rank, alpha = of("lora_rank", "lora_alpha")
    kind, beta, temperature, lmbda = of("divergence", "beta", "temperature", "lmbda")
    rate, schedule = of("learning_rate", "lr_scheduler_type")
    loss = f"{kind}{f' β {beta}' if kind == 'jsd' else ''}, T {temperature}, λ {lmbda}"
    if settings.get("seq_kd"):
        loss += ", teacher writes"
    for name, words in LOSS_OPTIONS.items():
        if settings.get(name) not in (None, 0, "none"):
            loss += f", {words} {show(settings[name])}"
    batch = f"lr {rate} {schedule}"
    if size := _global_batch_size(record):
        batch += f", batch {size:,}"
    model = PurePath(str(settings.get("model", "–"))).name
    if settings.get("recipe"):
        model += f", recipe {show(settings['recipe'])}"
    lora = f"LoRA r {rank}, α {alpha}{', rsLoRA' if settings.get('use_rslora') else ''}"
    if settings.get("lora_layers"):
        lora += f", layers {show(settings['lora_layers'])}"
    teachers = [
        f"{words} {PurePath(show(settings[name])).name}"
        for name, words in TEACHERS.items()
        if settings.get(name)
    ]
    return [model, lora, *teachers, loss, batch]


def _global_batch_size(record: RunRecord) -> int | None:
    factors = [
        number(record.setting("per_device_train_batch_size")),
        number(record.setting("gradient_accumulation_steps")),
        number(record.part("layout").get("dp")),
    ]
    size = 1.0
    for factor in factors:
        if factor is None:
            return None
        size *= factor
    return int(size)


def _data(record: RunRecord) -> list[str]:
    names = record.setting("dataset")
    names = names if isinstance(names, list) else []
    found = [PurePath(str(name)).name for name in names[:MOST_FILES]]
    if len(names) > MOST_FILES:
        found.append(f"and {len(names) - MOST_FILES} more")
    epoch = number(record.metrics[-1].get("epoch")) if record.metrics else None
    if epoch is not None:
        found.append("1 epoch" if epoch == 1 else f"{epoch:.3g} epochs")
    return found or ["–"]


def _hardware(record: RunRecord) -> list[str]:
    layout, hardware = record.part("layout"), record.part("hardware")
    ranks = layout.get("world_size")
    device = hardware.get("device") or record.setting("device") or "device not known"
    sizes = [
        f"{name.upper()} {layout[name]}"
        for name in ("tp", "pp", "dp", "ep", "cp")
        if layout.get(name) not in (None, 1)
    ]
    return [f"{ranks} × {device}" if ranks else str(device), *([" ".join(sizes)] if sizes else [])]


def _remarks(record: RunRecord) -> list[str]:
    remarks = record.remarks.splitlines()[:5]
    remarks += loss_notes(record)
    last = record.metrics[-1] if record.metrics else {}
    if skipped := number(last.get("skipped_steps")):
        remarks.append(f"{skipped:.0f} skipped steps")
    if zero := number(last.get("zero_gradient_steps")):
        remarks.append(f"{zero:.0f} steps with a gradient of exactly 0")
    written = [line for line in record.metrics if number(line.get("truncated_responses"))]
    if written:
        count = sum(int(line["truncated_responses"]) for line in written)
        remarks.append(f"{count:,} responses cut at their limit in logged steps")
    return remarks


def _changes(
    before: RunRecord, after: RunRecord, entry_before: Entry, entry_after: Entry
) -> list[str]:
    """What was set otherwise than in the run before, and what came of it."""
    found = []
    if before.description and after.description:
        first, second = before.settings(), after.settings()
        changed = [
            f"{name} {brief(first.get(name))} → {brief(second.get(name))}"
            for name in dict.fromkeys([*first, *second])
            if name not in BOOKKEEPING and not _same(first.get(name), second.get(name))
        ]
        more = len(changed) - MOST_CHANGES
        found += changed[:MOST_CHANGES] + ([f"{more} more settings"] if more > 0 else [])
        found += [] if changed else ["the same settings"]
    if entry_before.last_jsd is not None and entry_after.last_jsd is not None:
        found.append(f"divergence {short(entry_before.last_jsd)} → {short(entry_after.last_jsd)}")
    for name, old, new in (
        ("s/step", entry_before.step_seconds, entry_after.step_seconds),
        ("memory", entry_before.memory_gib, entry_after.memory_gib),
    ):
        if old and new is not None and abs(new - old) >= 0.005 * abs(old):
            found.append(f"{name} {100 * (new / old - 1):+.0f} %".replace("-", "−"))
    return found


def _finite(lines: Sequence[Line], name: str) -> list[float]:
    return [value for value in column(lines, name)[1] if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
