"""Where the rows of a packed sequence lie, and which part of each a context-parallel rank reads.

A micro-batch is one sequence, its rows one behind the other. Legend: T positions, B rows, C
context-parallel ranks. With C > 1 every row is cut into 2 C chunks of one length: rank c has chunk
c and its mirror, chunk 2 C - 1 - c, so that the ranks have equally many (query, key) pairs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class Span(NamedTuple):
    """Consecutive queries and the keys from the row's first to the last query's own."""

    queries: slice
    """Of this rank's T/C positions"""
    keys: slice
    """Of the T positions of the whole sequence"""

    @property
    def num_queries(self) -> int:
        return self.queries.stop - self.queries.start

    @property
    def num_keys(self) -> int:
        return self.keys.stop - self.keys.start


class VarlenCall(NamedTuple):
    """What one call of an attention kernel for sequences of several lengths takes. Indices are None
    where the tensors are taken as they are.
    """

    query_index: Tensor | None
    """int64: this rank's positions, span by span"""
    key_index: Tensor | None
    """int64: positions of the whole sequence, span by span"""
    query_ends: Tensor
    """int32 [spans + 1], cumulative"""
    key_ends: Tensor
    longest_query: int
    longest_key: int


@dataclass
class PackedRows(PackedSeqParams):
    """Handed to the decoder in the place of megatron-core's parameters of packed sequences: its
    modules pass it on to core attention. Their rotary embedding must not restart with each row,
    since positions come with the rows: hence no `qkv_format` "thd".
    """

    starts: list[int] = field(default_factory=list)
    """[B + 1]: of each row in the whole sequence, and T. What follows a row's tokens before the
    next start is padding"""
    num_parts: int = 1
    """C"""
    part: int = 0
    """c"""
    device: torch.device = torch.device("cpu")

    @cached_property
    def spans(self) -> list[Span]:
        """In the order of this rank's positions, which they cover."""
        spans, first = [], 0
        for start, end in pairwise(self.starts):
            for chunk_start, chunk_end in self._chunks(start, end, self.part):
                size = chunk_end - chunk_start
                spans.append(Span(slice(first, first + size), slice(start, chunk_end)))
                first += size
        return spans

    @cached_property
    def common_length(self) -> int | None:
        """Positions of every row, where several have equally many and none is cut."""
        lengths = [end - start for start, end in pairwise(self.starts)]
        is_batch = self.num_parts == 1 and len(lengths) > 1 and len(set(lengths)) == 1
        return lengths[0] if is_batch else None

    def _chunks(self, start: int, end: int, part: int) -> list[tuple[int, int]]:
        """The positions from..to that rank `part` has of a row."""
        if self.num_parts == 1:
            return [(start, end)]
        size, rest = divmod(end - start, 2 * self.num_parts)
        assert rest == 0, "rows are padded to a multiple of 2 C"
        firsts = (start + part * size, start + (2 * self.num_parts - 1 - part) * size)
        return [(first, first + size) for first in firsts]

    def positions(self, part: int) -> Tensor:
        """int64 [T/C] on the CPU: the positions of the whole sequence that rank `part` has, in its
        order.
        """
        return _ranges(
            chunk
            for start, end in pairwise(self.starts)
            for chunk in self._chunks(start, end, part)
        )

    @cached_property
    def own_positions(self) -> Tensor:
        """int64 [T/C] on the device: those of this rank."""
        return self.positions(self.part).to(self.device)

    @cached_property
    def own_index(self) -> Tensor:
        """int64 [T] on the device: each position's index at this rank, -1 if another has it."""
        index = torch.full((self.starts[-1],), -1, dtype=torch.int64)
        own = self.positions(self.part)
        index[own] = torch.arange(len(own))
        return index.to(self.device)

    @cached_property
    def order(self) -> Tensor:
        """int64 [T] on the device: the ranks' parts, one behind the other -> the whole sequence."""
        gathered = torch.cat([self.positions(part) for part in range(self.num_parts)])
        return gathered.argsort().to(self.device)

    def mask(self, span: Span, dtype: torch.dtype) -> Tensor:
        """[queries, keys] to be added to a span's scores: the last query sees all keys, each one
        before it one fewer. Made once, for all layers.
        """
        shape = (span.num_queries, span.num_keys)
        if (shape, dtype) not in self._masks:
            hidden = torch.full(shape, -float("inf"), dtype=dtype, device=self.device)
            self._masks[shape, dtype] = hidden.triu(diagonal=shape[1] - shape[0] + 1)
        return self._masks[shape, dtype]

    @cached_property
    def _masks(self) -> dict[tuple[tuple[int, int], torch.dtype], Tensor]:
        return {}

    @cached_property
    def varlen_calls(self) -> list[VarlenCall]:
        """The spans as one call, or with C > 1 as two, of which each reads a key once: so the
        gradient of keys is summed in one order.
        """
        if self.num_parts == 1:
            return [self._call(self.spans, whole=True)]
        return [self._call(self.spans[half::2], whole=False) for half in (0, 1)]

    @cached_property
    def varlen_order(self) -> Tensor:
        """int64 [T/C] on the device: the calls' outputs in a row -> this rank's order."""
        index = [call.query_index for call in self.varlen_calls if call.query_index is not None]
        return torch.cat(index).argsort()

    def _call(self, spans: Sequence[Span], *, whole: bool) -> VarlenCall:
        def ends(sizes: list[int]) -> Tensor:
            return torch.tensor([0, *sizes]).cumsum(0).to(self.device, torch.int32)

        num_queries, num_keys = ([s.num_queries for s in spans], [s.num_keys for s in spans])
        query_ends = ends(num_queries)
        if whole:
            longest = max(num_queries)
            return VarlenCall(None, None, query_ends, query_ends, longest, longest)
        queries, keys = ([s.queries for s in spans], [s.keys for s in spans])
        return VarlenCall(
            _ranges((s.start, s.stop) for s in queries).to(self.device),
            _ranges((s.start, s.stop) for s in keys).to(self.device),
            query_ends,
            ends(num_keys),
            max(num_queries),
            max(num_keys),
        )


def _ranges(bounds: Iterable[tuple[int, int]]) -> Tensor:
    return torch.cat([torch.arange(first, end) for first, end in bounds])
