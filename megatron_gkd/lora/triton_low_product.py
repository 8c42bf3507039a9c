"""The three functions of low_product.py as Triton kernels, for CUDA.

    forward          a program a block of rows: x once, W_down from the cache
    backward_input   a program a block of rows and 256 columns: writes dL/dx once (or adds to it)
    backward_weight  a program an expert, 256 columns and part of its rows: x once; the parts are
                     added up in a second pass, always in the same order

Each draws the mask in registers, the words of 64 counters a row for 256 columns (dropout.py):
between 2 and 3 instructions of 32 bits an entry and round. With experts a block of rows belongs to
one of them, and a grid of a fixed size finds out which on the device: there are T / BLOCK_T + E
programs, of which those that are left over do nothing. Products sum in fp32, fp32 ones without
TF32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gkd.lora.dropout import GROUP, LANES, ROUNDS, Drop

BLOCK_T = 32  # rows of a program
MOST_LOW = 64  # low numbers of a program, at most (of fp32 half); more of them draw the mask again
ENOUGH_PROGRAMS = 512  # of backward_weight, so that a GPU is full
NUM_WARPS = 4
FORWARD_STAGES = 2  # three, Triton's default, take more shared memory than an A100 or L40S has
_LANES, _GROUP, _ROUNDS = tl.constexpr(LANES), tl.constexpr(GROUP), tl.constexpr(ROUNDS)


@triton.jit
def _rows_of(
    block: tl.tensor,
    offsets: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The expert of a block of rows, the block's first row, and where the expert's rows end (not
    behind the first for a block that is left over). BLOCK_E 0: there are no experts.
    """
    if BLOCK_E == 0:
        return 0, block * BLOCK_T, num_rows
    else:
        e = tl.arange(0, BLOCK_E)
        ends = tl.load(offsets + e, mask=e < num_experts, other=0)
        begins = tl.load(offsets + e - 1, mask=(e > 0) & (e < num_experts), other=0)
        num_blocks = (ends - begins + BLOCK_T - 1) // BLOCK_T
        after = tl.cumsum(num_blocks, 0)
        expert = tl.sum((after <= block).to(tl.int32), 0)
        is_expert = e == expert
        first_block = tl.sum(tl.where(is_expert, after - num_blocks, 0), 0)
        begin = tl.sum(tl.where(is_expert, begins, 0), 0)
        end = tl.sum(tl.where(is_expert, ends, 0), 0)
        return expert, begin + (block - first_block) * BLOCK_T, end


@triton.jit
def _kept(seed: tl.tensor, rows: tl.tensor, first_column: tl.tensor, THRESHOLD: tl.constexpr):
    """Four masks [rows, LANES]: of the columns first_column + i LANES .. of a group."""
    lanes = first_column // 4 + tl.arange(0, _LANES)
    zeros = tl.zeros([rows.shape[0], _LANES], tl.int32)
    counter, row = zeros + lanes[None, :], zeros + rows[:, None]
    a, b, c, d = tl.philox(seed, counter, row, zeros, zeros, _ROUNDS)
    return a >= THRESHOLD, b >= THRESHOLD, c >= THRESHOLD, d >= THRESHOLD


@triton.jit
def _dropped_tile(
    x: tl.tensor,
    rows: tl.tensor,
    end: tl.tensor,
    first_column: tl.tensor,
    keep: tl.tensor,
    WIDTH: tl.constexpr,
    ROW: tl.constexpr,
):
    """x [rows, LANES] from first_column on, zero where it is dropped or not there."""
    columns = first_column + tl.arange(0, _LANES)
    at = rows.to(tl.int64)[:, None] * ROW + columns[None, :]
    there = (rows < end)[:, None] & (columns < WIDTH)[None, :]
    # all of it is read: masks of single entries would make many small reads of few large ones
    return tl.where(keep, tl.load(x + at, mask=there, other=0.0), 0.0)


@triton.jit
def _down_tile(
    down: tl.tensor, r: tl.tensor, first_column: tl.tensor, R: tl.constexpr, WIDTH: tl.constexpr
):
    """W_down [r, LANES] from first_column on, zero where it is not there."""
    columns = first_column + tl.arange(0, _LANES)
    there = (r < R)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(down + r[:, None] * WIDTH + columns[None, :], mask=there, other=0.0)


@triton.jit(do_not_specialize=["num_rows", "seed"])
def forward_kernel(
    x: tl.tensor,
    down: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    seed: tl.tensor,
    scale: tl.tensor,
    THRESHOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out [T, R] = scale (x o keep) W_down'; W_down of the rows' expert."""
    expert, first, end = _rows_of(
        tl.program_id(0), offsets, num_rows, num_experts, BLOCK_T, BLOCK_E
    )
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if first < end:
        rows = first + tl.arange(0, BLOCK_T)
        if BLOCK_E > 0:
            down += expert.to(tl.int64) * R * WIDTH
        low = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        for column in range(0, WIDTH, _GROUP):
            keep = _kept(seed, rows, column, THRESHOLD)
            for i in tl.static_range(4):
                a = _dropped_tile(x, rows, end, column + i * _LANES, keep[i], WIDTH, ROW)
                w = _down_tile(down, r, column + i * _LANES, R, WIDTH).to(a.dtype)
                low = tl.dot(a, tl.trans(w), low, input_precision="ieee")
        there = (rows < end)[:, None] & (r < R)[None, :]
        at = out + rows.to(tl.int64)[:, None] * R + r[None, :]
        tl.store(at, (low * scale).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_rows", "seed"])
def backward_input_kernel(
    grad_low: tl.tensor,
    down: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    seed: tl.tensor,
    scale: tl.tensor,
    THRESHOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    R: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out [T, WIDTH] = scale (grad_low W_down) o keep, added to what is there with ADD."""
    expert, first, end = _rows_of(
        tl.program_id(0), offsets, num_rows, num_experts, BLOCK_T, BLOCK_E
    )
    column = tl.program_id(1) * _GROUP
    if first < end:
        rows = first + tl.arange(0, BLOCK_T)
        if BLOCK_E > 0:
            down += expert.to(tl.int64) * R * WIDTH
        keep = _kept(seed, rows, column, THRESHOLD)
        for i in tl.static_range(4):
            columns = column + i * _LANES + tl.arange(0, _LANES)
            total = tl.zeros([BLOCK_T, _LANES], tl.float32)
            for start in tl.static_range(0, R, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                there = (rows < end)[:, None] & (r < R)[None, :]
                at = grad_low + rows.to(tl.int64)[:, None] * R + r[None, :]
                g = tl.load(at, mask=there, other=0.0)
                w = _down_tile(down, r, column + i * _LANES, R, WIDTH).to(g.dtype)
                total = tl.dot(g, w, total, input_precision="ieee")
            total = tl.where(keep[i], total * scale, 0.0)
            there = (rows < end)[:, None] & (columns < WIDTH)[None, :]
            at = out + rows.to(tl.int64)[:, None] * ROW + columns[None, :]
            if ADD:
                total += tl.load(at, mask=there, other=0.0).to(tl.float32)
            tl.store(at, total.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_rows", "seed"])
def backward_weight_kernel(
    grad_low: tl.tensor,
    x: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    seed: tl.tensor,
    scale: tl.tensor,
    THRESHOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out [PARTS, E, R, WIDTH] fp32 = scale grad_low' (x o keep) over a part of the rows."""
    column = tl.program_id(0) * _GROUP
    expert, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin, end = 0, num_rows
    if BLOCK_E > 0:
        begin = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
        end = tl.load(offsets + expert)
    part_rows = tl.cdiv(tl.cdiv(end - begin, PARTS), BLOCK_T) * BLOCK_T
    begin += part * part_rows
    end = tl.minimum(begin + part_rows, end)
    total_0 = tl.zeros([BLOCK_R, _LANES], tl.float32)
    total_1 = tl.zeros([BLOCK_R, _LANES], tl.float32)
    total_2 = tl.zeros([BLOCK_R, _LANES], tl.float32)
    total_3 = tl.zeros([BLOCK_R, _LANES], tl.float32)
    for start in range(begin, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        keep = _kept(seed, rows, column, THRESHOLD)
        there = (rows < end)[None, :] & (r < R)[:, None]
        at = grad_low + rows.to(tl.int64)[None, :] * R + r[:, None]
        g = tl.load(at, mask=there, other=0.0)
        tile = _dropped_tile(x, rows, end, column, keep[0], WIDTH, ROW)
        total_0 = tl.dot(g, tile, total_0, input_precision="ieee")
        tile = _dropped_tile(x, rows, end, column + _LANES, keep[1], WIDTH, ROW)
        total_1 = tl.dot(g, tile, total_1, input_precision="ieee")
        tile = _dropped_tile(x, rows, end, column + 2 * _LANES, keep[2], WIDTH, ROW)
        total_2 = tl.dot(g, tile, total_2, input_precision="ieee")
        tile = _dropped_tile(x, rows, end, column + 3 * _LANES, keep[3], WIDTH, ROW)
        total_3 = tl.dot(g, tile, total_3, input_precision="ieee")
    out += (part * num_experts + expert).to(tl.int64) * R * WIDTH
    _store_part(out, r, column, total_0 * scale, R, WIDTH)
    _store_part(out, r, column + _LANES, total_1 * scale, R, WIDTH)
    _store_part(out, r, column + 2 * _LANES, total_2 * scale, R, WIDTH)
    _store_part(out, r, column + 3 * _LANES, total_3 * scale, R, WIDTH)


@triton.jit
def _store_part(
    out: tl.tensor,
    r: tl.tensor,
    first_column: tl.tensor,
    value: tl.tensor,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
):
    columns = first_column + tl.arange(0, _LANES)
    there = (r < R)[:, None] & (columns < WIDTH)[None, :]
    tl.store(out + r[:, None] * WIDTH + columns[None, :], value, mask=there)


def low_forward(x: Tensor, down: Tensor, drop: Drop, offsets: Tensor | None = None) -> Tensor:
    """As in low_product.py."""
    x, down = _rows(x), down.to(x.dtype).contiguous()
    low = x.new_empty(len(x), down.shape[-2])
    grid = (_num_blocks(len(x), offsets), triton.cdiv(low.shape[1], _block_r(low)))
    if low.numel():
        arguments = _arguments(x, low, drop, offsets)
        forward_kernel[grid](x, down, offsets, low, num_stages=FORWARD_STAGES, **arguments)
    return low


def low_backward_input(
    grad_low: Tensor,
    down: Tensor,
    drop: Drop,
    offsets: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """As in low_product.py."""
    grad_low, down = grad_low.contiguous(), down.contiguous()
    width = down.shape[-1]
    out = grad_low.new_empty(len(grad_low), width) if into is None else into
    grid = (_num_blocks(len(out), offsets), triton.cdiv(width, GROUP))
    if out.numel():
        backward_input_kernel[grid](
            grad_low,
            down,
            offsets,
            out,
            ADD=into is not None,
            **_arguments(out, grad_low, drop, offsets),
        )
    return out


def low_backward_weight(
    grad_low: Tensor, x: Tensor, drop: Drop, offsets: Tensor | None = None
) -> Tensor:
    """As in low_product.py."""
    grad_low, x = grad_low.contiguous(), _rows(x)
    (num_rows, num_low), width = grad_low.shape, x.shape[1]
    num_experts = 1 if offsets is None else len(offsets)
    low_tiles = triton.cdiv(num_low, _block_r(grad_low))
    num_tiles = triton.cdiv(width, GROUP) * low_tiles
    parts = triton.cdiv(ENOUGH_PROGRAMS, num_tiles * num_experts)
    parts = max(1, min(parts, num_rows // num_experts // BLOCK_T))
    out = x.new_empty(parts, num_experts, num_low, width, dtype=torch.float32)
    grid = (triton.cdiv(width, GROUP), parts * num_experts, low_tiles)
    backward_weight_kernel[grid](
        grad_low, x, offsets, out, PARTS=parts, **_arguments(x, grad_low, drop, offsets)
    )
    total = out[0] if parts == 1 else out.sum(0)
    return total[0] if offsets is None else total


def _rows(x: Tensor) -> Tensor:
    """x with neighbouring columns; its rows may lie further apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _block_r(low: Tensor) -> int:
    """Of low [T, R] or its gradient."""
    most = MOST_LOW * 2 // low.element_size()
    return max(16, min(most, triton.next_power_of_2(low.shape[1])))


def _num_blocks(num_rows: int, offsets: Tensor | None) -> int:
    return triton.cdiv(num_rows, BLOCK_T) + (0 if offsets is None else len(offsets))


def _arguments(x: Tensor, low: Tensor, drop: Drop, offsets: Tensor | None) -> dict:
    """What all kernels take; x [T, in] or its gradient, whose rows may lie further apart; low
    [T, R] or its gradient.
    """
    num_experts = 1 if offsets is None else len(offsets)
    return dict(
        num_rows=len(x),
        num_experts=num_experts,
        seed=drop.seed,
        scale=drop.scale,
        THRESHOLD=drop.threshold,
        WIDTH=x.shape[1],
        ROW=x.stride(0),
        R=low.shape[1],
        BLOCK_T=BLOCK_T,
        BLOCK_R=_block_r(low),
        BLOCK_E=0 if offsets is None else triton.next_power_of_2(num_experts),
        num_warps=NUM_WARPS,
    )
