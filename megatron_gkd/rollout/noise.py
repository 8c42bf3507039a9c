"""Gumbel noise as a pure function of (seed, row id, step, column): a hash, so that neither layout
nor batch changes what is drawn.

The hash is splitmix64 (Steele, Lea, Flood 2014) in int64 arithmetic, which wraps around. Keys are
int64 [B]. triton_sampling.py has the same in a kernel.
"""

import torch
from torch import Tensor

# its published constants as signed numbers
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """int64 -> int64; each bit of the result depends on every bit of x."""
    x = x + GOLDEN
    x = (x ^ _shift(x, 30)) * MULTIPLIERS[0]
    x = (x ^ _shift(x, 27)) * MULTIPLIERS[1]
    return x ^ _shift(x, 31)


def keys_of_rows(row_ids: Tensor, seed: int) -> Tensor:
    """row_ids int64 [B] -> [B]."""
    return _mix(row_ids + _mix(torch.full_like(row_ids, seed)))


def keys_of_step(row_keys: Tensor, step: Tensor) -> Tensor:
    """step: int64 [1]."""
    return _mix(row_keys + step + 1)


def gumbel(step_keys: Tensor, columns: Tensor) -> Tensor:
    """Standard Gumbel noise fp64 [B, n] for columns int64 [B, n]."""
    bits = _mix(step_keys[:, None] + columns * GOLDEN)
    # 52 bits and a half are a number of 53 bits, below 1: the noise is finite
    uniform = (_shift(bits, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))
