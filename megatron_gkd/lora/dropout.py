"""Dropout whose mask is a function of (seed, row, column): drawn where needed, stored nowhere.

The bits are those of Philox 4x32 (Salmon et al., SC 2011) with 7 rounds, the fewest that passed
their tests: key = the seed, counter = (c, row, 0, 0), and the four words of c = 64 g + l are those
of the columns 256 g + l, + 64, + 128 and + 192. So a program that works on 256 columns of a row
draws each counter once, and its tiles are 64 neighbouring columns wide. An entry is kept where its
word is at least round(p 2^32): the probability is exact to 2^-33.

`keep_mask` is the torch version; triton_low_product.py draws the same bits in its kernels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LANES = 64  # columns of a word
GROUP = 4 * LANES  # columns of a row whose words LANES counters give
ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_CACHED = 32_768  # counters that are worked on at a time: what a CPU's cache holds


class Drop(NamedTuple):
    """One call's dropout: entries are zero with `probability` (0 < p < 1), the others are divided
    by 1 - p.
    """

    probability: float
    seed: int
    """0 <= seed < 2^63"""

    @property
    def threshold(self) -> int:
        """A word below it drops its entry."""
        return min(round(self.probability * 2**32), _WORD)

    @property
    def scale(self) -> float:
        """1 / (1 - p)"""
        return 1 / (1 - self.probability)


def keep_mask(num_rows: int, num_columns: int, drop: Drop, device: torch.device) -> Tensor:
    """Which entries of a matrix are kept, bool [num_rows, num_columns]."""
    num_groups = -(-num_columns // GROUP)
    keep = torch.empty(num_rows, num_groups, 4, LANES, dtype=torch.bool, device=device)
    rows_at_once = max(1, _CACHED // (LANES * num_groups))
    for first in range(0, num_rows, rows_at_once):
        part = keep[first : first + rows_at_once]
        words = _words(first, len(part), LANES * num_groups, drop.seed, device)
        for index, word in enumerate(words):
            is_kept = part[:, :, index]
            torch.ge(word.view(is_kept.shape), drop.threshold, out=is_kept)
    return keep.view(num_rows, num_groups * GROUP)[:, :num_columns]


def _words(
    first_row: int, num_rows: int, num_counters: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of the counters (c, row, 0, 0), each int64 [num_rows, num_counters] with
    numbers in 0 .. 2^32 - 1.

    A round multiplies words 0 and 2; the upper halves of the products, with words 3 and 1 and the
    key, become words 2 and 0, the lower halves words 3 and 1. `even` holds words 0 and 2, after
    each round in the other order. 64-bit products wrap as those of numbers without sign do.
    """
    size = (2, num_rows, num_counters)
    even = torch.zeros(size, dtype=torch.int64, device=device)
    even[0] = torch.arange(num_counters, device=device)
    products = torch.zeros_like(even)  # of the round before: words 1 and 3 in their lower halves
    products[0] = torch.arange(first_row, first_row + num_rows, device=device)[:, None]
    upper = torch.empty_like(even)
    for index in range(ROUNDS):
        turned = index % 2
        key = [word + index * step & _WORD for word, step in zip((seed, seed >> 32), KEY_STEPS)]
        even[0] *= MULTIPLIERS[turned]
        even[1] *= MULTIPLIERS[1 - turned]
        torch.bitwise_right_shift(even, 32, out=upper)
        upper[0] ^= products[1]
        upper[1] ^= products[0]
        upper[0] ^= key[1 - turned]
        upper[1] ^= key[turned]
        upper &= _WORD
        even, products, upper = upper, even, products
    products &= _WORD
    return even[1], products[1], even[0], products[0]  # ROUNDS is odd
