"""Which curves the page shows: the metrics of a run by name, their titles and units, as charts."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_gkd.report.charts import Chart, Kind, Series, line_chart, running_mean
from megatron_gkd.report.read import Line, RunRecord, column, number
from megatron_gkd.report.summary import by_kind

WINDOWS = 40  # a running mean is over one part in so many of a curve
FEW = 40  # points of training that are shown as they are, without a running mean


@dataclass(frozen=True)
class Metric:
    """A column of metrics.jsonl, of eval.jsonl or of both."""

    key: str
    title: str
    unit: str = ""
    factor: float = 1.0
    may_be_logarithmic: bool = False
    by_kind: bool = True
    """Whether steps on data and on-policy steps are apart; no for what does not depend on it"""


@dataclass(frozen=True)
class Group:
    """Charts under one heading."""

    title: str
    text: str
    metrics: tuple[Metric, ...]


GROUPS = (
    Group(
        "Distance to the teacher",
        "Means over the response tokens.",
        (
            Metric("loss", "Loss", "nats a token", may_be_logarithmic=True),
            Metric("jsd", "Divergence", "nats a token", may_be_logarithmic=True),
            Metric("kl_reverse", "KL(student ‖ teacher)", "nats a token", may_be_logarithmic=True),
            Metric("kl_forward", "KL(teacher ‖ student)", "nats a token", may_be_logarithmic=True),
            Metric(
                "sft_loss", "Cross-entropy of the response", "nats a token", may_be_logarithmic=True
            ),
        ),
    ),
    Group(
        "Agreement",
        "How often the most probable token of student and teacher is the same, how often the "
        "student’s is that of the response, and how decided both are.",
        (
            Metric("top1_agreement", "Top-1 agreement", "%", 100.0),
            Metric("token_accuracy", "Token accuracy", "%", 100.0),
            Metric("entropy_student", "Entropy of the student", "nats a token"),
            Metric("entropy_teacher", "Entropy of the teacher", "nats a token"),
        ),
    ),
    Group(
        "Responses",
        "Their lengths, and how many were cut.",
        (
            Metric("response_length", "Response length", "tokens, mean of a step"),
            Metric(
                "truncated_responses", "Written responses cut at their limit", "responses a step"
            ),
            Metric("cut_tokens", "Data tokens beyond the limit", "tokens a step"),
            Metric("rollout_logprob_gap", "Rollout’s log-probability against training’s", "nats"),
            Metric("importance_ratio", "Importance ratio of written tokens"),
            Metric("importance_clipped", "Written tokens beyond --importance_clip", "%", 100.0),
        ),
    ),
    Group(
        "Optimisation",
        "",
        (
            Metric("grad_norm", "Gradient norm before clipping", may_be_logarithmic=True),
            Metric("learning_rate", "Learning rate", by_kind=False),
            Metric("on_policy_share", "On-policy steps so far", "%", 100.0, by_kind=False),
            Metric("skipped_steps", "Skipped steps so far", "steps", by_kind=False),
            Metric(
                "zero_gradient_steps", "Steps with a gradient of 0 so far", "steps", by_kind=False
            ),
        ),
    ),
    Group(
        "Time and memory",
        "",
        (
            Metric("step_time", "Time of a step", "s"),
            Metric("tokens_per_second", "Throughput, both views", "tokens/s"),
            Metric("peak_memory_gib", "Peak memory of any rank", "GiB", by_kind=False),
            Metric("padding", "Padding", "% of positions", 100.0),
        ),
    ),
)
# Columns that have no chart of their own: what they say stands elsewhere on the page.
NOT_DRAWN = {
    "step",
    "epoch",
    "on_policy",
    "num_tokens",
    "micro_batches",
    "eval_time",
    "data_time",
    "rollout_time",
    "teacher_time",
    "student_time",
    "optimizer_time",
}


@dataclass(frozen=True)
class Drawn:
    """A group with its charts."""

    title: str
    text: str
    charts: list[Chart]


def draw(records: Sequence[RunRecord]) -> list[Drawn]:
    """The groups that have anything to show; other numbers that the files hold come last."""
    known = {metric.key for group in GROUPS for metric in group.metrics} | NOT_DRAWN
    others = sorted(
        {
            key
            for record in records
            for line in (*record.metrics, *record.evaluations)
            for key, value in line.items()
            if key not in known and number(value) is not None
        }
    )
    more = Group("Other metrics", "", tuple(Metric(key, key) for key in others))
    drawn = []
    for group in (*GROUPS, more):
        charts = [chart for metric in group.metrics if (chart := _chart(metric, records))]
        if charts:
            drawn.append(Drawn(group.title, group.text, charts))
    return drawn


def _chart(metric: Metric, records: Sequence[RunRecord]) -> Chart | None:
    """None where there is nothing to see: no number, or zeros alone."""
    one = len(records) == 1
    series = [
        curve
        for index, record in enumerate(records)
        for curve in (_of_one(metric, record) if one else _of_several(metric, record, index))
    ]
    if not any(value for curve in series for value in curve.values):
        return None
    if metric.key == "jsd" and all(_is_the_loss(record) for record in records):
        return None
    return line_chart(
        metric.title, metric.unit, series, may_be_logarithmic=metric.may_be_logarithmic
    )


def _is_the_loss(record: RunRecord) -> bool:
    """Whether the divergence is all of the loss, whose curve then shows it."""
    lines = [*record.metrics, *record.evaluations]
    return all(line.get("jsd") == line.get("loss") for line in lines)


def _of_one(metric: Metric, record: RunRecord) -> list[Series]:
    """Training as dots with a running mean, apart for the kinds of steps; evaluation as a line."""
    found = []
    if not metric.by_kind:
        steps, values = _values(metric, record.metrics)
        found.append(Series("logged steps", steps, values, 0, "faint"))
    for name, lines in by_kind(record, record.metrics) if metric.by_kind else ():
        colour = 1 if name == "on-policy steps" else 0
        steps, values = _values(metric, lines)
        found.append(Series(name, steps, values, colour, "dots"))
        if len(steps) > FEW:
            means = running_mean(values, max(3, len(values) // WINDOWS))
            found.append(Series(f"{name}, mean", steps, means, colour, "faint"))
    steps, values = _values(metric, record.evaluations)
    if steps:
        found.append(Series("evaluation", steps, values, 2))
    return found


def _of_several(metric: Metric, record: RunRecord, index: int) -> list[Series]:
    """A run's evaluation as a line, and its training as a thin one, a running mean."""
    steps, values = _values(metric, record.metrics)
    window = max(1, len(values) // WINDOWS) if len(values) > FEW else 1
    evaluated, measured = _values(metric, record.evaluations)
    found = []
    if steps:
        kind: Kind = "faint" if evaluated else "line"
        name = f"{record.name}, training"
        found.append(Series(name, steps, running_mean(values, window), index, kind, index))
    if evaluated:
        found.append(
            Series(f"{record.name}, evaluation", evaluated, measured, index, "line", index)
        )
    return found


def _values(metric: Metric, lines: Sequence[Line]) -> tuple[list[int], list[float | None]]:
    steps, values = column(lines, metric.key)
    return steps, [None if value is None else metric.factor * value for value in values]
