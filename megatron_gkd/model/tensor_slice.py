"""A rectangle of a named tensor, and the two mappings that are made of such rectangles.

1. `SlicePair`: Hugging Face tensor <-> tensor of a Megatron checkpoint (formats/weight_map.py).
2. `ParameterSlice`: tensor of a folder, a model's or an adapter's <-> parameter of this rank
   (formats/loading.py, lora/adapter.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class TensorSlice:
    """`name`[index], indexed as torch does it: first the integers that choose a matrix of a stack
    (layer, expert), then a slice of its rows and, where not all are meant, one of its columns.
    """

    name: str
    index: Index

    @property
    def matrix(self) -> tuple[int, ...]:
        """Which matrix of a stack: (layer, expert), (layer,), or () of a tensor that is none."""
        return tuple(part for part in self.index if isinstance(part, int))

    @property
    def slices(self) -> tuple[slice, ...]:
        """(rows,) or (rows, columns)"""
        return tuple(part for part in self.index if isinstance(part, slice))

    @property
    def rows(self) -> slice:
        return self.slices[0]

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start

    def narrow(self, start: int, stop: int) -> TensorSlice:
        """Rows `start:stop` of the rectangle, counted from its first."""
        rows, *columns = self.slices
        rows = slice(rows.start + start, rows.start + stop)
        return TensorSlice(self.name, (*self.matrix, rows, *columns))

    def with_columns(self, columns: slice) -> TensorSlice:
        """These columns of a slice of whole rows."""
        return TensorSlice(self.name, (*self.index, columns))


@dataclass(frozen=True)
class SlicePair:
    """The same rows in a Hugging Face tensor and in a tensor of a Megatron checkpoint."""

    hf: TensorSlice
    mcore: TensorSlice

    def within(self, rows: slice) -> SlicePair | None:
        """The part whose Hugging Face rows lie in `rows`; None where there is none."""
        start, stop = self.hf.rows.start, self.hf.rows.stop
        first, last = max(rows.start, start) - start, min(rows.stop, stop) - start
        if first >= last:
            return None
        return SlicePair(self.hf.narrow(first, last), self.mcore.narrow(first, last))


class Copies(NamedTuple):
    """Where several ranks hold the same numbers: this is copy `number` of `total`, from 0. `of`
    tells apart what this rank shares with these ranks and with those.
    """

    of: str = ""
    number: int = 0
    total: int = 1


@dataclass(frozen=True)
class ParameterSlice:
    """`parameter[where]` of this rank holds `stored`, a slice of a tensor in a folder; each of its
    `copies` writes a share of it (the frozen base is never written).
    """

    stored: TensorSlice
    parameter: Tensor
    where: Index
    copies: Copies = Copies()

    @property
    def view(self) -> Tensor:
        """What it is in the parameter's own memory, without its gradient. Writing it counts as a
        change of the parameter: what was laid out of it is laid out anew (lora/grouped.py).
        """
        return self.parameter.detach()[self.where]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of a matrix or of a part of its rows."""
        first, (*_, num_rows, num_columns) = self.where[0], self.parameter.shape
        if isinstance(first, slice):
            num_rows = len(range(*first.indices(num_rows)))
        return num_rows, num_columns


def cut_rows(stack: Iterable[TensorSlice], rows: slice) -> Iterator[tuple[TensorSlice, slice]]:
    """What `rows` of the slices in `stack`, one below the other, are made of: slice by slice, each
    with the rows, counted from the first of `rows`, that it fills.
    """
    position = 0
    for part in stack:
        first, last = max(rows.start, position), min(rows.stop, position + part.num_rows)
        if first < last:
            filled = slice(first - rows.start, last - rows.start)
            yield part.narrow(first - position, last - position), filled
        position += part.num_rows


def block(size: int, rank: int, num_ranks: int) -> slice:
    """Rank's share of `size` rows or columns cut into equal blocks."""
    width = size // num_ranks
    return slice(rank * width, (rank + 1) * width)
