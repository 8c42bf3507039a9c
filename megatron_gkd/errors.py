"""What can be wrong with a data set: one bad row (`RowError`, `BadRow`), or the run's data as a
whole (`DataError`); which file an error of the system is about.
"""

import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

MAX_LISTED = 20
MAX_QUOTED = 300  # characters of another library's message
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_TYPE_NAMES = {
    "NoneType": "null",
    "bool": "a boolean",
    "int": "an integer",
    "float": "a float",
    "str": "a string",
    "list": "a list",
    "dict": "an object",
}


class DataError(ValueError):
    """The data cannot be used as it is; the message names files, lines and the way out."""


class RowError(ValueError):
    """One row cannot be used. The message is the reason alone: whoever read the row knows its file
    and line.
    """


class BadRow(NamedTuple):
    """`location` is FILE:LINE (text, counted from 1), FILE[N] (elements that share lines) or
    NAME row N (tables); N counts from 0.
    """

    location: str
    reason: str


class BrokenCell:
    """Stands for a value of a table that cannot be read: an error only for rows that use it."""

    def __init__(self, reason: str):
        self.reason = reason

    def __repr__(self) -> str:
        return "(unreadable)"


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """An OSError inside that names no file (the disk is full) names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error


def short_repr(value: Any) -> str:
    """A short `repr` for error messages, however large or deep the value."""
    return _SHORT.repr(value)


def type_name(value: Any) -> str:
    """The type of a value from JSON or a table, as JSON calls it."""
    if isinstance(value, BrokenCell):
        return f"a cell that cannot be read ({value.reason})"
    name = type(value).__name__
    return _TYPE_NAMES.get(name, name)


def bad_rows_error(bad_rows: list[BadRow], num_rows: int) -> DataError:
    """The error that lists the first MAX_LISTED bad rows of `num_rows` that were read."""
    lines = [f"  {bad.location}: {bad.reason}" for bad in bad_rows[:MAX_LISTED]]
    if len(bad_rows) > MAX_LISTED:
        lines.append(f"  ... and {len(bad_rows) - MAX_LISTED} more")
    return DataError(
        f"{len(bad_rows)} of {num_rows} data rows cannot be used; correct them, or pass "
        "--skip_bad_rows true to leave them out:\n" + "\n".join(lines)
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most MAX_QUOTED characters; its type where it has
    none.
    """
    return shortened((str(error).strip() or type(error).__name__).splitlines()[0], MAX_QUOTED)


def shortened(text: str, most: int) -> str:
    """The text, its middle left out if it has more than `most` characters."""
    if len(text) <= most:
        return text
    head = most // 3
    return f"{text[:head]}...{text[len(text) - (most - head - 3) :]}"
