"""What can be wrong with a data set: one bad row (`RowError`, `BadRow`), or the run's data as a
whole (`DataError`).
"""

import reprlib
from typing import NamedTuple

MAX_SHOWN = 20
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class DataError(ValueError):
    """The data cannot be used as it is; the message names files, lines and the way out."""


class RowError(ValueError):
    """One row cannot be used. The message is the reason alone: whoever read the row knows its file
    and line.
    """


class BadRow(NamedTuple):
    """`location` is FILE:LINE (jsonl, counted from 1) or NAME row N (tables, counted from 0)."""

    location: str
    reason: str


def shown(value) -> str:
    """A short repr for error messages, however large or deep the value."""
    return _SHORT.repr(value)


def bad_rows_error(bad_rows: list[BadRow], num_rows: int) -> DataError:
    """The error that lists the first MAX_SHOWN bad rows of `num_rows` that were read."""
    lines = [f"  {bad.location}: {bad.reason}" for bad in bad_rows[:MAX_SHOWN]]
    if len(bad_rows) > MAX_SHOWN:
        lines.append(f"  ... and {len(bad_rows) - MAX_SHOWN} more")
    return DataError(
        f"{len(bad_rows)} of {num_rows} data rows cannot be used; correct them, or pass --skip_bad_rows true to "
        "leave them out:\n" + "\n".join(lines)
    )
