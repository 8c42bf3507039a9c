"""Counts of the rows of a data set: for the console, and for what a run decides from its data."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from pyarrow import compute

from megatron_gkd.data.sample import media_pair
from megatron_gkd.data.stored_rows import StoredRows
from megatron_gkd.errors import BadRow
from megatron_gkd.loss.rows import IGNORED_LABEL


@dataclass
class DataReport:
    """Counts of one data set, printed when the run starts. Lengths and cuts are in tokens."""

    num_rows: int
    num_teacher_views: int
    num_cut_responses: int
    num_cut_tokens: int
    max_tokens: int
    num_response_tokens: int
    sources: dict[str, int]
    num_prompts_alone: int = 0
    """Rows without a response"""
    media: dict[str, int] = field(default_factory=dict)
    """Rows by the kinds of media in student's and teacher's view: `audio > text` is a student that
    hears and a teacher that reads.
    """
    num_media: dict[str, int] = field(default_factory=dict)
    """Media of each kind; a medium counts once in its row, even if both views show it."""
    skipped: list[BadRow] = field(default_factory=list)
    views_are_made: bool = False
    """Whether --teacher_template makes the views, anew for each response that the student writes"""

    @property
    def has_teacher_view(self) -> bool:
        return self.num_teacher_views > 0

    @property
    def num_skipped(self) -> int:
        return len(self.skipped)

    def summary(self) -> str:
        """One line for the console."""
        kinds = ", ".join(
            f"{number} {kind}{'s' * (number > 1)}" for kind, number in self.num_media.items()
        )
        pairs = ", ".join(f"{pair}: {number}" for pair, number in self.media.items())
        alone = f"{self.num_prompts_alone} without a response; " * bool(self.num_prompts_alone)
        media = f"{kinds} (rows by what student > teacher perceive: {pairs}); " if kinds else ""
        made = ", made anew of what the student writes" * self.views_are_made
        return (
            f"{self.num_rows} rows, {self.num_teacher_views} of them with a teacher view{made}; "
            f"{alone}"
            f"{media}"
            f"{self.num_response_tokens} trained tokens; longest view {self.max_tokens} tokens; "
            f"{self.num_cut_responses} responses cut by {self.num_cut_tokens} tokens in all; "
            f"{self.num_skipped} bad rows skipped"
        )


class Lengths(NamedTuple):
    """Tokens of each row, of its heavier view."""

    views: np.ndarray
    prompts: np.ndarray

    @property
    def has_response(self) -> np.ndarray:
        """bool, of each row"""
        return self.views > self.prompts


def view_lengths(rows: StoredRows) -> Lengths:
    """Of encoded rows."""
    table = rows.columns("input_ids", "teacher_prompt", "response_start")
    student = compute.list_value_length(table["input_ids"]).to_numpy()
    prompt = compute.list_value_length(table["teacher_prompt"])  # null without a teacher view
    start = table["response_start"].to_numpy()
    prompts = np.maximum(start, prompt.fill_null(0).to_numpy())
    return Lengths(prompts + student - start, prompts)


def make_report(
    rows: StoredRows, lengths: Lengths, skipped: list[BadRow], *, views_are_made: bool
) -> DataReport:
    """Counts encoded rows (columns: the fields of `Encoded` and `kinds`, `source`)."""
    table = rows.columns("cut_tokens", "labels", "teacher_prompt", "source")
    cuts = table["cut_tokens"].to_numpy()
    trained = compute.not_equal(compute.list_flatten(table["labels"]), IGNORED_LABEL)
    return DataReport(
        num_rows=len(rows),
        num_teacher_views=len(rows) - table["teacher_prompt"].null_count,
        num_cut_responses=int((cuts > 0).sum()),
        num_cut_tokens=int(cuts.sum()),
        max_tokens=int(lengths.views.max()),
        num_response_tokens=compute.sum(trained).as_py(),
        sources=dict(Counter(table["source"].to_pylist())),
        num_prompts_alone=int((~lengths.has_response).sum()),
        **_media_report(rows),
        skipped=skipped,
        views_are_made=views_are_made,
    )


def _media_report(rows: StoredRows) -> dict[str, dict[str, int]]:
    """DataReport's `media` and `num_media`; both empty for a data set of text. The media themselves
    are not read.
    """
    table = rows.columns("kinds", "student_media", "teacher_media")
    if not compute.sum(compute.list_value_length(table["kinds"])).as_py():
        return {}
    kinds = table["kinds"].to_pylist()
    views = zip(kinds, table["student_media"].to_pylist(), table["teacher_media"].to_pylist())
    pairs = Counter(
        media_pair([row[index] for index in student], [row[index] for index in teacher])
        for row, student, teacher in views
    )
    num_media = Counter(kind for row in kinds for kind in row)
    return {"media": dict(pairs), "num_media": dict(num_media)}
