"""Rows of a file that are not parsed yet: where each stands, and a function that reads one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class RawRows(NamedTuple):
    """`read(i)` is raw row i, or raises RowError; `locations[i]` names it in messages. Forked
    processes may call `read`.
    """

    locations: list[str]
    read: Callable[[int], Any]
    folder_of: Callable[[int], str]
    """Index of a row -> the folder to which paths of its media are relative"""


def in_folder(folder: str, locations: list[str], read: Callable[[int], Any]) -> RawRows:
    """Rows of one file."""
    return RawRows(locations, read, lambda index: folder)


def joined(parts: list[RawRows]) -> RawRows:
    """The rows of several files, one file behind the other."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.locations) for part in parts)])

    def place(index: int) -> tuple[RawRows, int]:
        number = int(np.searchsorted(starts, index, side="right")) - 1
        return parts[number], index - int(starts[number])

    def read(index: int) -> Any:
        part, row = place(index)
        return part.read(row)

    def folder_of(index: int) -> str:
        part, row = place(index)
        return part.folder_of(row)

    return RawRows([place for part in parts for place in part.locations], read, folder_of)


def chosen(rows: RawRows, indices: list[int]) -> RawRows:
    """The rows at `indices`, in that order."""
    return RawRows(
        [rows.locations[index] for index in indices],
        lambda index: rows.read(indices[index]),
        lambda index: rows.folder_of(indices[index]),
    )
