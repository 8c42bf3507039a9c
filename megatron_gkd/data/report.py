"""Counts of the rows of a data set: for the console, and for what a run decides from its data."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow
from pyarrow import compute

from megatron_gkd.data.sample import media_pair
from megatron_gkd.data.stored_rows import StoredRows
from megatron_gkd.errors import BadRow
from megatron_gkd.loss.rows import IGNORED_LABEL

NUM_EXAMPLES = 3


class Noted(NamedTuple):
    """What rows hold that one may want to know of."""

    number: int = 0
    rows: Sequence[str] = ()
    """The first that hold it, as FILE:LINE"""

    def summary(self, what: str) -> str:
        """A clause for the console; "" if there are none."""
        more = ", ..." if self.number > len(self.rows) else ""
        return f"; {what}: {self.number} ({', '.join(self.rows)}{more})" if self.number else ""


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
    notes: dict[str, int] = field(default_factory=dict)
    """What was done to media that one may want to know, such as `image composited on white`, and to
    how many; counted like `num_media`, by the headers of their files.
    """
    skipped: list[BadRow] = field(default_factory=list)
    shortened_turns: Noted = Noted()
    """Assistant turns that are not trained, since the chat template leaves out a part of them"""
    trimmed_turns: Noted = Noted()
    """Trained turns of which it leaves out white space"""
    tags_as_text: Noted = Noted()
    """Tags such as `<audio>` that are no placeholders"""
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
        notes = "".join(
            f"{number} {kind}{'s' * (number > 1)} {rest}; "
            for note, number in self.notes.items()
            for kind, rest in [note.split(" ", 1)]
        )
        media = (
            f"{kinds} (rows by what student > teacher perceive: {pairs}); {notes}" if kinds else ""
        )
        made = ", made anew of what the student writes" * self.views_are_made
        return (
            f"{self.num_rows} rows, {self.num_teacher_views} of them with a teacher view{made}; "
            f"{alone}"
            f"{media}"
            f"{self.num_response_tokens} trained tokens; longest view {self.max_tokens} tokens; "
            f"{self.num_cut_responses} responses cut by {self.num_cut_tokens} tokens in all; "
            f"{self.num_skipped} bad rows skipped{self._first_skipped()}"
            + self.shortened_turns.summary(
                "earlier assistant turns that are read and not trained, since the chat template "
                "leaves out a part of them, such as reasoning"
            )
            + self.trimmed_turns.summary(
                "assistant turns of which the chat template leaves out white space"
            )
            + self.tags_as_text.summary(
                "<audio>, <image> or <video> in texts of rows without such a medium in a column, "
                "read as text"
            )
        )

    def _first_skipped(self) -> str:
        first = [f"{bad.location}: {bad.reason}" for bad in self.skipped[:NUM_EXAMPLES]]
        first += ["..."] * (self.num_skipped > NUM_EXAMPLES)
        return f" ({'; '.join(first)})" if first else ""


class Lengths(NamedTuple):
    """Tokens of each row, of its heavier view."""

    views: np.ndarray
    prompts: np.ndarray
    media: np.ndarray
    """Of all its media, each once, whichever view shows it"""

    @property
    def has_response(self) -> np.ndarray:
        """bool, of each row"""
        return self.views > self.prompts

    def most_media(self, num_tokens: int) -> int:
        """Tokens of media that rows of so many tokens can have together: an upper bound. Rows come
        again when all of them were there.
        """
        prompts = np.maximum(self.prompts, 1)  # a response that is written may be short
        passes, rest = divmod(num_tokens, int(prompts.sum()))
        order = np.argsort(-self.media / prompts)
        before = np.cumsum(prompts[order]) - prompts[order]
        taken = self.media[order[before < rest]]
        return passes * int(self.media.sum()) + int(taken.sum())


def view_lengths(rows: StoredRows) -> Lengths:
    """Of encoded rows."""
    table = rows.columns("input_ids", "teacher_prompt", "response_start", "media_tokens")
    student = compute.list_value_length(table["input_ids"]).to_numpy()
    prompt = compute.list_value_length(table["teacher_prompt"])  # null without a teacher view
    start = table["response_start"].to_numpy()
    prompts = np.maximum(start, prompt.fill_null(0).to_numpy())
    return Lengths(prompts + student - start, prompts, table["media_tokens"].to_numpy())


def longest_response(rows: StoredRows) -> int:
    """Most trained tokens in a row, of any response of encoded rows: of any turn."""
    labels = rows.columns("labels")["labels"]
    ends = compute.list_value_length(labels).to_numpy().cumsum()
    is_trained = compute.not_equal(compute.list_flatten(labels), IGNORED_LABEL)
    trained = np.flatnonzero(is_trained.to_numpy(zero_copy_only=False))
    first_of_row = np.isin(trained, np.concatenate([[0], ends[:-1]]))
    begins = np.flatnonzero((np.diff(trained, prepend=-2) != 1) | first_of_row)
    return int(np.diff(begins, append=len(trained)).max(initial=0))


def make_report(
    rows: StoredRows, lengths: Lengths, skipped: list[BadRow], *, views_are_made: bool
) -> DataReport:
    """Counts encoded rows (columns: the fields of `Encoded` and `kinds`, `source`)."""
    table = rows.columns(
        "cut_tokens",
        "labels",
        "teacher_prompt",
        "source",
        "shortened_turns",
        "trimmed_turns",
        "tags_as_text",
        "location",
    )
    cuts = table["cut_tokens"].to_numpy()
    trained = compute.not_equal(compute.list_flatten(table["labels"]), IGNORED_LABEL)
    media, num_media, notes = _media_report(rows)
    return DataReport(
        num_rows=len(rows),
        num_teacher_views=len(rows) - table["teacher_prompt"].null_count,
        num_cut_responses=int((cuts > 0).sum()),
        num_cut_tokens=int(cuts.sum()),
        max_tokens=int(lengths.views.max()),
        num_response_tokens=compute.sum(trained).as_py(),
        sources=dict(Counter(table["source"].to_pylist())),
        num_prompts_alone=int((~lengths.has_response).sum()),
        media=media,
        num_media=num_media,
        notes=notes,
        skipped=skipped,
        shortened_turns=_noted(table["shortened_turns"], table["location"]),
        trimmed_turns=_noted(table["trimmed_turns"], table["location"]),
        tags_as_text=_noted(table["tags_as_text"], table["location"]),
        views_are_made=views_are_made,
    )


def _noted(counts: pyarrow.ChunkedArray, locations: pyarrow.ChunkedArray) -> Noted:
    of_rows = counts.to_numpy()
    first = np.flatnonzero(of_rows)[:NUM_EXAMPLES]
    return Noted(int(of_rows.sum()), locations.take(first).to_pylist())


def _media_report(rows: StoredRows) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """DataReport's `media`, `num_media` and `notes`; all empty for a data set of text. The media
    themselves are not read.
    """
    table = rows.columns("kinds", "notes", "student_media", "teacher_media")
    if not compute.sum(compute.list_value_length(table["kinds"])).as_py():
        return {}, {}, {}
    kinds = table["kinds"].to_pylist()
    views = zip(kinds, table["student_media"].to_pylist(), table["teacher_media"].to_pylist())
    pairs = Counter(
        media_pair([row[index] for index in student], [row[index] for index in teacher])
        for row, student, teacher in views
    )
    num_media = Counter(kind for row in kinds for kind in row)
    notes = Counter(
        f"{kind} {note}"
        for row, found in zip(kinds, table["notes"].to_pylist())
        for kind, note in zip(row, found)
        if note
    )
    return dict(pairs), dict(num_media), dict(notes)
