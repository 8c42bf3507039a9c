"""Triton kernels of the order of the pairs: a router's chosen experts, and the row of each pair.

The letters are expert_order.py's; a program reads TOKENS tokens. Numbers that differ from call to
call are not specialised: a kernel is compiled once, not again for multiples of 16.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens"])
def chosen_kernel(
    routing_map: tl.tensor,
    probabilities: tl.tensor,
    ids: tl.tensor,
    values: tl.tensor,
    num_tokens: tl.tensor,
    A: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, BLOCK_A)
    at = t[:, None] * A + e[None, :]
    valid = (t[:, None] < num_tokens) & (e[None, :] < A)
    is_chosen = tl.load(routing_map + at, mask=valid, other=0).to(tl.int32)
    p = tl.load(probabilities + at, mask=valid, other=0.0)
    number = tl.cumsum(is_chosen, 1)
    for k in tl.static_range(K):
        is_kth = (is_chosen > 0) & (number == k + 1)
        place = t * K + k
        tl.store(ids + place, tl.sum(tl.where(is_kth, e[None, :], 0), 1), mask=t < num_tokens)
        tl.store(values + place, tl.sum(tl.where(is_kth, p, 0.0), 1), mask=t < num_tokens)


@triton.jit(do_not_specialize=["num_tokens"])
def spread_kernel(
    gradient: tl.tensor,
    ids: tl.tensor,
    out: tl.tensor,
    num_tokens: tl.tensor,
    A: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, BLOCK_A)
    total = tl.zeros((TOKENS, BLOCK_A), tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(ids + t * K + k, mask=t < num_tokens, other=-1)
        value = tl.load(gradient + t * K + k, mask=t < num_tokens, other=0.0)
        total = tl.where(e[None, :] == expert[:, None], value[:, None], total)
    valid = (t[:, None] < num_tokens) & (e[None, :] < A)
    tl.store(out + t[:, None] * A + e[None, :], total, mask=valid)


@triton.jit
def one_hot(
    ids: tl.tensor,
    t: tl.tensor,
    num_tokens: tl.tensor,
    first_expert: tl.tensor,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """int32 [TOKENS, BLOCK_E]: 1 where the token has chosen this rank's expert."""
    e = tl.arange(0, BLOCK_E)
    found = tl.zeros((TOKENS, BLOCK_E), tl.int32)
    for k in tl.static_range(K):
        expert = tl.load(ids + t * K + k, mask=t < num_tokens, other=-1) - first_expert
        is_real = (e[None, :] == expert[:, None]) & (t[:, None] < num_tokens)
        found += is_real.to(tl.int32)
    return found


@triton.jit(do_not_specialize=["num_tokens", "first_expert"])
def count_kernel(
    ids: tl.tensor,
    counts: tl.tensor,
    num_tokens: tl.tensor,
    first_expert: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """counts [blocks, E]"""
    block = tl.program_id(0)
    t = block.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, BLOCK_E)
    found = one_hot(ids, t, num_tokens, first_expert, K, TOKENS, BLOCK_E)
    tl.store(counts + block * E + e, tl.sum(found, 0), mask=e < E)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "first_expert"])
def place_kernel(
    ids: tl.tensor,
    counts: tl.tensor,
    pairs: tl.tensor,
    rows: tl.tensor,
    offsets: tl.tensor,
    totals: tl.tensor,
    num_tokens: tl.tensor,
    num_blocks: tl.tensor,
    first_expert: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A pair's row is its expert's first row, the pairs of that expert in the blocks before, and
    those before it in its own block.
    """
    block = tl.program_id(0)
    e, lanes = tl.arange(0, BLOCK_E), tl.arange(0, BLOCKS)
    total = tl.zeros((BLOCK_E,), tl.int32)
    before = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        other = start + lanes
        valid = (other[:, None] < num_blocks) & (e[None, :] < E)
        number = tl.load(counts + other[:, None] * E + e[None, :], mask=valid, other=0)
        total += tl.sum(number, 0)
        before += tl.sum(tl.where(other[:, None] < block, number, 0), 0)
    ends = tl.cumsum(total, 0)
    if block == 0:
        tl.store(offsets + e, ends, mask=e < E)
        tl.store(totals + e, total, mask=e < E)
    t = block.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    found = one_hot(ids, t, num_tokens, first_expert, K, TOKENS, BLOCK_E)
    row = (ends - total + before)[None, :] + tl.cumsum(found, 0) - found
    for k in tl.static_range(K):
        expert = tl.load(ids + t * K + k, mask=t < num_tokens, other=-1) - first_expert
        is_local = (expert >= 0) & (expert < E) & (t < num_tokens)
        own = tl.sum(tl.where(e[None, :] == expert[:, None], row, 0), 1)
        pair = t * K + k
        tl.store(rows + pair, tl.where(is_local, own, -1), mask=t < num_tokens)
        tl.store(pairs + own, pair.to(tl.int32), mask=is_local)
