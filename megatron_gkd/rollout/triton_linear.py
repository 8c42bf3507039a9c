"""Triton kernels of a token's dense linears and of what follows them: products with W and W_down of
few rows in one launch; the sum of a product's parts with W_up, the residual and the norm.
"""

import triton
import triton.language as tl


@triton.jit
def linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    down: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[b, split] = x[b] @ (weight, below it down)' over a part of K; out [B, SPLIT, WIDTH]."""
    block, split = tl.program_id(0), tl.program_id(1)
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns, lanes = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    first = block * BLOCK_N
    if first < N:
        matrix = weight + first * K
    else:
        matrix = down + (first - N) * K
    is_row = rows < num_rows
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K // SPLIT, BLOCK_K):
        k = split * (K // SPLIT) + start + lanes
        a = tl.load(x + rows[:, None] * K + k[None, :], mask=is_row[:, None], other=0.0)
        w = tl.load(matrix + columns[None, :] * K + k[:, None])
        total = tl.dot(a, w, total, input_precision="ieee")
    at = (rows[:, None] * SPLIT + split) * WIDTH + first + columns[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def update_of(
    parts: tl.tensor,
    up: tl.tensor,
    column: tl.tensor,
    is_column: tl.tensor,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
):
    """The sum of PARTS rows of WIDTH numbers: H of the product, then its low numbers, of which RANK
    go through up [RANK, H].
    """
    update = tl.zeros(column.shape, tl.float32)
    for part in tl.static_range(PARTS):
        update += tl.load(parts + part * WIDTH + column, mask=is_column, other=0.0).to(tl.float32)
    for first in range(0, RANK, 8):
        r = first + tl.arange(0, 8)
        low = tl.zeros((8,), tl.float32)
        for part in tl.static_range(PARTS):
            low += tl.load(parts + part * WIDTH + H + r).to(tl.float32)
        low = low.to(up.dtype.element_ty).to(tl.float32)
        tile = tl.load(up + r[:, None] * H + column[None, :], mask=is_column[None, :], other=0.0)
        update += tl.sum(tile.to(tl.float32) * low[:, None], 0)
    return update


@triton.jit
def add_norm_kernel(
    x: tl.tensor,
    parts: tl.tensor,
    up: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x[b] += the sum of its parts; out[b] = RMSNorm(x[b])."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    is_column = i < H
    dtype = x.dtype.element_ty
    update = update_of(parts + row * PARTS * WIDTH, up, i, is_column, H, WIDTH, PARTS, RANK)
    value = tl.load(x + row * H + i, mask=is_column, other=0.0).to(tl.float32)
    rounded = (value + update.to(dtype).to(tl.float32)).to(dtype)
    tl.store(x + row * H + i, rounded, mask=is_column)
    value = rounded.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / H + eps)
    value *= tl.load(weight + i, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + row * H + i, value.to(dtype), mask=is_column)


@triton.jit
def sum_kernel(
    parts: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[b] = the sum of its parts, where ranks must add theirs before the norm."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    is_column = i < H
    update = update_of(parts + row * PARTS * WIDTH, up, i, is_column, H, WIDTH, PARTS, RANK)
    tl.store(out + row * H + i, update.to(out.dtype.element_ty), mask=is_column)
