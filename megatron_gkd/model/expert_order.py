"""The order of (token, expert) pairs.

T tokens, K experts a token, A experts of the layer, E of them on this rank, P rows: the pairs of
this rank's experts, sorted by expert and stable, so that an order depends on the routing alone.
Rows are read and written by index in both directions: nothing is added up by atomics, and equal
inputs give equal bits.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Order(NamedTuple):
    """A pair is number t * K + k."""

    pairs: Tensor
    """int32 [P]: the pair of each row; anything behind the last expert's rows"""
    rows: Tensor
    """int32 [T, K]: the row of each pair; -1 where another rank has its expert"""
    offsets: Tensor
    """int32 [E]: the end of each expert's rows. P may be larger than the last"""
    counts: Tensor
    """int32 [E]: the rows of each expert"""
    is_partial: bool
    """Whether other ranks may have some of the experts"""

    @property
    def num_chosen(self) -> int:
        return self.rows.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """To be saved for backward."""
        return self.pairs, self.rows, self.offsets, self.counts


def order_of(tensors: Sequence[Tensor], *, is_partial: bool) -> Order:
    """The order whose `tensors` these are."""
    pairs, rows, offsets, counts = tensors
    return Order(pairs, rows, offsets, counts, is_partial)
