"""The functions of expert_torch.py as Triton kernels, for CUDA. The letters are expert_order.py's.

    chosen, spread      a program 64 tokens
    order_pairs         counts of each expert in every 64 tokens; then each block's pairs after
                        those of the blocks before it: two launches, no sort
    gather_rows         a program a row
    sum_rows            a program a token: its K rows in ascending order of the expert, in fp32
    activation          a program a row, once each way

Rows behind the last expert's are neither read nor written. No atomics: every number has one
program that writes it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gkd.model.expert_order import Order
from megatron_gkd.model.expert_triton_order import (
    chosen_kernel,
    count_kernel,
    place_kernel,
    spread_kernel,
)

TOKENS = 64  # of a program that reads ids


@triton.jit
def gather_kernel(
    x: tl.tensor,
    pairs: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    E: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(offsets + E - 1):
        token = (tl.load(pairs + row) // K).to(tl.int64)
        i = tl.arange(0, BLOCK)
        tl.store(out + row * WIDTH + i, tl.load(x + token * H + i, mask=i < H), mask=i < H)
        if WIDTH > H:
            tail = H + tl.arange(0, BLOCK_TAIL)
            zeros = tl.zeros((BLOCK_TAIL,), out.dtype.element_ty)
            tl.store(out + row * WIDTH + tail, zeros, mask=tail < WIDTH)


@triton.jit
def sum_kernel(
    y: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(rows + token * K + k).to(tl.int64)
        is_here = i < tl.where(row >= 0, H, 0)
        total += tl.load(y + row * WIDTH + i, mask=is_here, other=0.0).to(tl.float32)
    tl.store(out + token * H + i, total.to(out.dtype.element_ty), mask=i < H)


@triton.jit
def activation_kernel(
    gate_up: tl.tensor,
    probabilities: tl.tensor,
    pairs: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    E: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(offsets + E - 1):
        i = tl.arange(0, BLOCK)
        valid = i < SIZE
        gate = tl.load(gate_up + row * 2 * SIZE + i, mask=valid, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * SIZE + SIZE + i, mask=valid, other=0.0).to(tl.float32)
        p = tl.load(probabilities + tl.load(pairs + row))
        value = gate * tl.sigmoid(gate) * up * p
        tl.store(out + row * WIDTH + i, value.to(out.dtype.element_ty), mask=valid)
        if WIDTH > SIZE:
            tail = SIZE + tl.arange(0, BLOCK_TAIL)
            zeros = tl.zeros((BLOCK_TAIL,), out.dtype.element_ty)
            tl.store(out + row * WIDTH + tail, zeros, mask=tail < WIDTH)


@triton.jit
def activation_backward_kernel(
    gate_up: tl.tensor,
    probabilities: tl.tensor,
    gradient: tl.tensor,
    pairs: tl.tensor,
    offsets: tl.tensor,
    of_gate_up: tl.tensor,
    of_probabilities: tl.tensor,
    out: tl.tensor,
    E: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(offsets + E - 1):
        i = tl.arange(0, BLOCK)
        valid = i < SIZE
        gate = tl.load(gate_up + row * 2 * SIZE + i, mask=valid, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * SIZE + SIZE + i, mask=valid, other=0.0).to(tl.float32)
        d = tl.load(gradient + row * WIDTH + i, mask=valid, other=0.0).to(tl.float32)
        pair = tl.load(pairs + row)
        p = tl.load(probabilities + pair)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        product = silu * up
        tl.store(of_probabilities + pair, tl.sum(d * product, 0))
        d *= p
        of_gate = d * up * (sigmoid + silu * (1.0 - sigmoid))
        at = of_gate_up + row * 2 * SIZE + i
        tl.store(at, of_gate.to(of_gate_up.dtype.element_ty), mask=valid)
        tl.store(at + SIZE, (d * silu).to(of_gate_up.dtype.element_ty), mask=valid)
        tl.store(out + row * SIZE + i, (product * p).to(out.dtype.element_ty), mask=valid)


def _warps(size: int) -> int:
    """16 numbers a thread, at least 4 warps."""
    return min(8, max(4, triton.next_power_of_2(size) // 512))


def chosen(routing_map: Tensor, probabilities: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """As in expert_torch."""
    num_tokens, num_experts = routing_map.shape
    ids = torch.empty(num_tokens, num_chosen, dtype=torch.int32, device=routing_map.device)
    values = torch.empty_like(ids, dtype=torch.float32)
    if num_tokens:
        chosen_kernel[(triton.cdiv(num_tokens, TOKENS),)](
            routing_map.contiguous().view(torch.int8),
            probabilities.contiguous(),
            ids,
            values,
            num_tokens,
            num_experts,
            num_chosen,
            TOKENS,
            triton.next_power_of_2(num_experts),
            num_warps=8,
        )
    return ids, values


def spread(gradient: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """As in expert_torch."""
    num_tokens, num_chosen = ids.shape
    out = gradient.new_empty(num_tokens, num_experts)
    if num_tokens:
        spread_kernel[(triton.cdiv(num_tokens, TOKENS),)](
            gradient,
            ids,
            out,
            num_tokens,
            num_experts,
            num_chosen,
            TOKENS,
            triton.next_power_of_2(num_experts),
            num_warps=8,
        )
    return out


def order_pairs(ids: Tensor, first_expert: int, num_experts: int, *, is_partial: bool) -> Order:
    """As in expert_torch."""
    num_tokens, num_chosen = ids.shape
    num_blocks, block_e = triton.cdiv(num_tokens, TOKENS), triton.next_power_of_2(num_experts)
    pairs = torch.empty(num_tokens * num_chosen, dtype=torch.int32, device=ids.device)
    rows = torch.empty_like(ids)
    if not num_tokens:
        nothing = ids.new_zeros(num_experts)
        return Order(pairs, rows, nothing, nothing, is_partial)
    offsets, totals = ids.new_empty(2, num_experts)
    counts = ids.new_empty(num_blocks, num_experts)
    sizes = (num_experts, num_chosen, TOKENS, block_e)
    count_kernel[(num_blocks,)](ids, counts, num_tokens, first_expert, *sizes, num_warps=8)
    place_kernel[(num_blocks,)](
        ids,
        counts,
        pairs,
        rows,
        offsets,
        totals,
        num_tokens,
        num_blocks,
        first_expert,
        *sizes,
        max(1, 4096 // block_e),
        num_warps=8,
    )
    return Order(pairs, rows, offsets, totals, is_partial)


def gather_rows(x: Tensor, order: Order, width: int) -> Tensor:
    """As in expert_torch."""
    size = x.shape[1]
    out = x.new_empty(len(order.pairs), width)
    if len(out):
        gather_kernel[(len(out),)](
            x,
            order.pairs,
            order.offsets,
            out,
            len(order.offsets),
            size,
            order.num_chosen,
            width,
            triton.next_power_of_2(size),
            triton.next_power_of_2(max(1, width - size)),
            num_warps=_warps(size),
        )
    return out


def sum_rows(rows: Tensor, order: Order, size: int) -> Tensor:
    """As in expert_torch."""
    out = rows.new_empty(len(order.rows), size)
    if len(out):
        sum_kernel[(len(out),)](
            rows,
            order.rows,
            out,
            size,
            rows.stride(0),
            order.num_chosen,
            triton.next_power_of_2(size),
            num_warps=_warps(size),
        )
    return out


def activation(gate_up: Tensor, probabilities: Tensor, order: Order, width: int) -> Tensor:
    """As in expert_torch."""
    size = gate_up.shape[1] // 2
    out = gate_up.new_empty(len(gate_up), width)
    if len(out):
        activation_kernel[(len(out),)](
            gate_up.contiguous(),
            probabilities,
            order.pairs,
            order.offsets,
            out,
            len(order.offsets),
            size,
            width,
            triton.next_power_of_2(size),
            triton.next_power_of_2(max(1, width - size)),
            num_warps=_warps(size),
        )
    return out


def activation_backward(
    gate_up: Tensor, probabilities: Tensor, gradient: Tensor, order: Order
) -> tuple[Tensor, Tensor, Tensor]:
    """As in expert_torch."""
    size = gate_up.shape[1] // 2
    gate_up = gate_up.contiguous()
    of_gate_up, out = torch.empty_like(gate_up), gate_up.new_empty(len(gate_up), size)
    make = torch.zeros_like if order.is_partial else torch.empty_like
    of_probabilities = make(probabilities)
    if len(out):
        activation_backward_kernel[(len(out),)](
            gate_up,
            probabilities,
            gradient,
            order.pairs,
            order.offsets,
            of_gate_up,
            of_probabilities,
            out,
            len(order.offsets),
            size,
            gradient.stride(0),
            triton.next_power_of_2(size),
            num_warps=_warps(size),
        )
    return of_gate_up, of_probabilities, out
