"""Triton kernels of a token's experts: the router's choice, the order of the pairs, products.

A pair is a row and one of its K chosen experts, number b * K + k. Pairs of experts that live on
other ranks have the id E (the number of experts here) and take part in nothing. Of R low numbers
only the rank's are not zero.
"""

import triton
import triton.language as tl


@triton.jit
def route_kernel(
    logits: tl.tensor,
    ids: tl.tensor,
    probabilities: tl.tensor,
    first_expert: tl.tensor,
    num_local: tl.tensor,
    share: tl.tensor,
    num_shares: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """The K largest of a row's E logits (the lowest id among equals) and their softmax, over these
    K or (not RENORMALIZE) over all. Local are the experts first_expert .. and the rows of `share`.
    """
    row, e, k = tl.program_id(0), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    x = tl.load(logits + row * E + e, mask=e < E, other=-float("inf"))
    top = tl.max(x, 0)
    total = tl.sum(tl.exp(x - top), 0)
    values = tl.full((BLOCK_K,), -float("inf"), tl.float32)
    chosen = tl.full((BLOCK_K,), E, tl.int32)
    for index in tl.static_range(K):
        best = tl.max(x, 0)
        at = tl.min(tl.where(x == best, e, E), 0)
        values = tl.where(k == index, best, values)
        chosen = tl.where(k == index, at, chosen)
        x = tl.where(e == at, -float("inf"), x)
    weights = tl.exp(values - top)
    if RENORMALIZE:
        total = tl.sum(weights, 0)
    local = chosen - first_expert
    is_local = (local >= 0) & (local < num_local) & (row % num_shares == share)
    tl.store(ids + row * K + k, tl.where(is_local, local, num_local), mask=k < K)
    tl.store(probabilities + row * K + k, weights / total, mask=k < K)


@triton.jit
def low_of(
    x: tl.tensor,
    down: tl.tensor,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """down [R, WIDTH] @ x [WIDTH], fp32 [R]. Two blocks are loaded at once; of all of them the
    registers would not hold the numbers of a large R.
    """
    r, lanes = tl.arange(0, R), tl.arange(0, BLOCK)
    total = tl.zeros((R, BLOCK), tl.float32)
    AT_ONCE: tl.constexpr = 1 if WIDTH <= BLOCK else 2
    for first in range(0, WIDTH, AT_ONCE * BLOCK):
        for start in tl.static_range(0, AT_ONCE * BLOCK, BLOCK):
            i = first + start + lanes
            is_column = i < WIDTH
            a = tl.load(x + i, mask=is_column, other=0.0).to(tl.float32)
            at = down + r[:, None] * WIDTH + i[None, :]
            total += tl.load(at, mask=is_column[None, :], other=0.0).to(tl.float32) * a[None, :]
    return tl.sum(total, 1)


@triton.jit
def order_kernel(
    ids: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    num_pairs: tl.tensor,
    num_blocks: tl.tensor,
    num_experts: tl.tensor,
    x: tl.tensor,
    down: tl.tensor,
    low: tl.tensor,
    K: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The first num_blocks programs: the pairs sorted by expert, stable; the next one: where each
    expert begins [E + 1]. One more a pair (with R): low[pair] = W_down of its expert @ x[row].
    """
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    if program < num_blocks:
        i = program * BLOCK + lanes
        mine = tl.load(ids + i, mask=i < num_pairs, other=num_experts)
        place = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, num_pairs, BLOCK):
            j = start + lanes
            other = tl.load(ids + j, mask=j < num_pairs, other=num_experts)
            before = (other[None, :] == mine[:, None]) & (j[None, :] < i[:, None])
            before = before | (other[None, :] < mine[:, None])
            place += tl.sum((before & (j[None, :] < num_pairs)).to(tl.int32), 1)
        tl.store(order + place, i, mask=i < num_pairs)
    elif program == num_blocks:
        e = tl.arange(0, BLOCK_E)
        begin = tl.zeros((BLOCK_E,), tl.int32)
        for start in range(0, num_pairs, BLOCK):
            j = start + lanes
            other = tl.load(ids + j, mask=j < num_pairs, other=num_experts)
            below = (other[None, :] < e[:, None]) & (j[None, :] < num_pairs)
            begin += tl.sum(below.to(tl.int32), 1)
        tl.store(offsets + e, begin, mask=e <= num_experts)
    else:
        if R > 0:
            pair = program - num_blocks - 1
            expert = tl.load(ids + pair)
            if expert < num_experts:
                matrix = down + expert.to(tl.int64) * R * H
                numbers = low_of(x + (pair // K) * H, matrix, H, R, BLOCK_H)
                tl.store(low + pair * R + tl.arange(0, R), numbers.to(low.dtype.element_ty))


@triton.jit
def low_kernel(
    ids: tl.tensor,
    num_experts: tl.tensor,
    x: tl.tensor,
    down: tl.tensor,
    low: tl.tensor,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """low[pair] = W_down of the pair's expert @ x[pair]."""
    pair = tl.program_id(0)
    expert = tl.load(ids + pair)
    if expert < num_experts:
        matrix = down + expert.to(tl.int64) * R * WIDTH
        numbers = low_of(x + pair * WIDTH, matrix, WIDTH, R, BLOCK)
        tl.store(low + pair * R + tl.arange(0, R), numbers.to(low.dtype.element_ty))


@triton.jit
def gate_up_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    low: tl.tensor,
    up: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    probabilities: tl.tensor,
    out: tl.tensor,
    K: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[pair] = silu(gate) * up * probability, WIDTH numbers; weight [E, 2 WIDTH, H], its
    rows ROW numbers apart, up [E, R, 2 WIDTH]. One program an expert and BLOCK_N columns; 16 of the
    expert's pairs at a time.
    """
    expert, block = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    columns, lanes, sixteen = (
        block * BLOCK_N + tl.arange(0, BLOCK_N),
        tl.arange(0, BLOCK_K),
        tl.arange(0, 16),
    )
    matrix = weight + expert.to(tl.int64) * 2 * WIDTH * ROW
    for start in range(begin, end, 16):
        at = start + sixteen
        is_pair = at < end
        pair = tl.load(order + at, mask=is_pair, other=0)
        rows = x + (pair // K)[:, None] * H
        gate = tl.zeros((16, BLOCK_N), tl.float32)
        value = tl.zeros((16, BLOCK_N), tl.float32)
        for k in range(0, H, BLOCK_K):
            a = tl.load(rows + k + lanes[None, :], mask=is_pair[:, None], other=0.0)
            w = tl.load(matrix + columns[None, :] * ROW + k + lanes[:, None])
            gate = tl.dot(a, w, gate, input_precision="ieee")
            w = tl.load(matrix + (WIDTH + columns[None, :]) * ROW + k + lanes[:, None])
            value = tl.dot(a, w, value, input_precision="ieee")
        if R > 0:
            r = tl.arange(0, R)
            numbers = tl.load(
                low + pair[:, None] * R + r[None, :], mask=is_pair[:, None], other=0.0
            )
            of_expert = up + (expert * R + r[:, None]).to(tl.int64) * 2 * WIDTH + columns[None, :]
            gate = tl.dot(numbers, tl.load(of_expert), gate, input_precision="ieee")
            value = tl.dot(numbers, tl.load(of_expert + WIDTH), value, input_precision="ieee")
        probability = tl.load(probabilities + pair, mask=is_pair, other=0.0)
        value = gate * tl.sigmoid(gate) * value * probability[:, None]
        tl.store(
            out + pair[:, None] * WIDTH + columns[None, :],
            value.to(out.dtype.element_ty),
            mask=is_pair[:, None],
        )


@triton.jit
def down_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    low: tl.tensor,
    up: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[pair] = W x[pair], H numbers of WIDTH; weight [E, H, WIDTH], its rows ROW apart,
    up [E, R, H].
    """
    expert, block = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    columns, lanes, sixteen = (
        block * BLOCK_N + tl.arange(0, BLOCK_N),
        tl.arange(0, BLOCK_K),
        tl.arange(0, 16),
    )
    matrix = weight + expert.to(tl.int64) * H * ROW
    for start in range(begin, end, 16):
        at = start + sixteen
        is_pair = at < end
        pair = tl.load(order + at, mask=is_pair, other=0)
        total = tl.zeros((16, BLOCK_N), tl.float32)
        for k in range(0, WIDTH, BLOCK_K):
            a = tl.load(
                x + pair[:, None] * WIDTH + k + lanes[None, :], mask=is_pair[:, None], other=0.0
            )
            w = tl.load(matrix + columns[None, :] * ROW + k + lanes[:, None])
            total = tl.dot(a, w, total, input_precision="ieee")
        if R > 0:
            r = tl.arange(0, R)
            numbers = tl.load(
                low + pair[:, None] * R + r[None, :], mask=is_pair[:, None], other=0.0
            )
            of_expert = up + (expert * R + r[:, None]).to(tl.int64) * H + columns[None, :]
            total = tl.dot(numbers, tl.load(of_expert), total, input_precision="ieee")
        tl.store(
            out + pair[:, None] * H + columns[None, :],
            total.to(out.dtype.element_ty),
            mask=is_pair[:, None],
        )
