"""Triton kernels of a token's attention: LoRA's update, QK-norm and rotary with the write into the
cache; attention over a part of the keys, and the parts together.

Their rows find keys and values through `KeyValueCache.table`: one graph serves the cache wherever
it lies and however long it is.
"""

import triton
import triton.language as tl

from megatron_gkd.model.triton_norm_rotary import normed_and_rotated


@triton.jit
def cache_offset(
    table: tl.tensor,
    region: tl.constexpr,
    layer: tl.tensor,
    side: tl.constexpr,
    row: tl.tensor,
    group: tl.tensor,
    G: tl.constexpr,
    D: tl.constexpr,
):
    """Elements from the cache's anchor to the first key (side 0) or value (1) of a row's group."""
    start = tl.multiple_of(tl.load(table + region), 16)
    num_rows = tl.load(table + 2 + region)
    capacity = tl.load(table + 4 + region)
    index = ((layer * 2 + side) * num_rows + row) * G + group
    return start + index * capacity * D


@triton.jit
def sum_of_parts(
    parts: tl.tensor,
    is_number: tl.tensor,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The sum of SPLIT blocks of numbers, WIDTH apart."""
    total = tl.zeros(parts.shape, tl.float32)
    for split in tl.static_range(SPLIT):
        total += tl.load(parts + split * WIDTH, mask=is_number, other=0.0).to(tl.float32)
    return total


@triton.jit
def rotate_kernel(
    qkv: tl.tensor,
    up: tl.tensor,
    norm: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    step: tl.tensor,
    table: tl.tensor,
    anchor: tl.tensor,
    query: tl.tensor,
    num_rows: tl.tensor,
    eps: tl.tensor,
    layer: tl.tensor,
    QUERIES: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """W_up, QK-norm and rotary of 16 rows and one head of the fused order (a group's queries, its
    key, its value); the key and the value go into the cache.
    """
    head, rows = tl.program_id(0), tl.program_id(1) * 16 + tl.arange(0, 16)
    group, place = head // (QUERIES + 2), head % (QUERIES + 2)
    N: tl.constexpr = (QUERIES + 2) * G * D
    i = tl.arange(0, D // 2)
    is_row = rows < num_rows
    dtype = query.dtype.element_ty
    first = rows * SPLIT * WIDTH
    column = head * D + i
    at = qkv + first[:, None] + column[None, :]
    x = sum_of_parts(at, is_row[:, None], WIDTH, SPLIT)
    y = sum_of_parts(at + D // 2, is_row[:, None], WIDTH, SPLIT)
    for start in range(0, RANK, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        is_low = r < RANK
        numbers = qkv + first[:, None] + N + r[None, :]
        low = sum_of_parts(numbers, is_row[:, None] & is_low[None, :], WIDTH, SPLIT).to(dtype)
        tile = up + r[:, None] * N + column[None, :]
        w = tl.load(tile, mask=is_low[:, None], other=0.0)
        x = tl.dot(low, w, x, input_precision="ieee")
        w = tl.load(tile + D // 2, mask=is_low[:, None], other=0.0)
        y = tl.dot(low, w, y, input_precision="ieee")
    x = x.to(dtype).to(tl.float32)
    y = y.to(dtype).to(tl.float32)
    if place <= QUERIES:
        weight = norm + place * D + i
        weight_x = tl.load(weight).to(tl.float32)[None, :]
        weight_y = tl.load(weight + D // 2).to(tl.float32)[None, :]
        angle = rows[:, None] * D + D // 2 + i[None, :]  # the sines of this half are positive
        c = tl.load(cos + angle, mask=is_row[:, None], other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=is_row[:, None], other=0.0).to(tl.float32)
        x, y = normed_and_rotated(x, y, weight_x, weight_y, c, s, eps, D)
    if place < QUERIES:
        out = query + ((rows * G + group) * QUERIES + place)[:, None] * D + i[None, :]
        tl.store(out, x.to(dtype), mask=is_row[:, None])
        tl.store(out + D // 2, y.to(dtype), mask=is_row[:, None])
    else:
        slot = tl.load(slots + rows, mask=is_row, other=0)
        position = tl.load(step)
        if place == QUERIES:
            offset = cache_offset(table, 1, layer, 0, slot, group, G, D)
        else:
            offset = cache_offset(table, 1, layer, 1, slot, group, G, D)
        kept = anchor + (offset + position * D)[:, None] + i[None, :]
        tl.store(kept, x.to(dtype), mask=is_row[:, None])
        tl.store(kept + D // 2, y.to(dtype), mask=is_row[:, None])


@triton.jit
def attend_to(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    context: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Online softmax over the keys start .. end - 1; scale holds log2(e)."""
    i, lanes = tl.arange(0, D), tl.arange(0, BLOCK)
    for k in range(start, end, BLOCK):
        at = k + lanes
        is_key = at < end
        key = tl.load(keys + at[None, :] * D + i[:, None], mask=is_key[None, :], other=0.0)
        scores = tl.dot(query, key, input_precision="ieee") * scale
        scores = tl.where(is_key[None, :], scores, -1e30)
        new = tl.maximum(top, tl.max(scores, 1))
        factor = tl.exp2(top - new)
        weights = tl.where(is_key[None, :], tl.exp2(scores - new[:, None]), 0.0)
        value = tl.load(values + at[:, None] * D + i[None, :], mask=is_key[:, None], other=0.0)
        context = tl.dot(
            weights.to(value.dtype), value, context * factor[:, None], input_precision="ieee"
        )
        total = total * factor + tl.sum(weights, 1)
        top = new
    return top, total, context


@triton.jit
def attention_kernel(
    query: tl.tensor,
    prompts: tl.tensor,
    prompt_lengths: tl.tensor,
    slots: tl.tensor,
    step: tl.tensor,
    table: tl.tensor,
    anchor: tl.tensor,
    contexts: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    scale: tl.tensor,
    layer: tl.tensor,
    QUERIES: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A group's queries over one part of the row's keys: its prompt's, then its own."""
    row_group, split = tl.program_id(0), tl.program_id(1)
    row, group = row_group // G, row_group % G
    prompt_length = tl.load(prompt_lengths + row)
    length = prompt_length + tl.load(step).to(tl.int32) + 1
    span = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    start, end = split * span, tl.minimum(split * span + span, length)
    heads, i = tl.arange(0, 16), tl.arange(0, D)
    is_head = heads < QUERIES
    q = tl.load(
        query + (row_group * QUERIES + heads[:, None]) * D + i[None, :],
        mask=is_head[:, None],
        other=0.0,
    )
    top = tl.full((16,), -1e30, tl.float32)
    total = tl.zeros((16,), tl.float32)
    context = tl.zeros((16, D), tl.float32)
    prompt, slot = tl.load(prompts + row), tl.load(slots + row)
    keys = anchor + cache_offset(table, 0, layer, 0, prompt, group, G, D)
    values = anchor + cache_offset(table, 0, layer, 1, prompt, group, G, D)
    top, total, context = attend_to(
        q, keys, values, start, tl.minimum(end, prompt_length), top, total, context, scale, D, BLOCK
    )
    keys = anchor + cache_offset(table, 1, layer, 0, slot, group, G, D)
    values = anchor + cache_offset(table, 1, layer, 1, slot, group, G, D)
    start = tl.maximum(start - prompt_length, 0)
    top, total, context = attend_to(
        q, keys, values, start, end - prompt_length, top, total, context, scale, D, BLOCK
    )
    at = (row_group * SPLITS + split) * 16 + heads
    tl.store(contexts + at[:, None] * D + i[None, :], context, mask=is_head[:, None])
    tl.store(tops + at, top)
    tl.store(totals + at, total)


@triton.jit
def join_kernel(
    contexts: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    out: tl.tensor,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The parts of one row and query head together."""
    row_group, head = tl.program_id(0), tl.program_id(1)
    splits, i = tl.arange(0, SPLITS), tl.arange(0, D)
    at = (row_group * SPLITS + splits) * 16 + head
    top = tl.load(tops + at)
    factor = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(tl.load(totals + at) * factor, 0)
    context = tl.load(contexts + at[:, None] * D + i[None, :])
    context = tl.sum(context * factor[:, None], 0) / total
    tl.store(out + (row_group * QUERIES + head) * D + i, context.to(out.dtype.element_ty))
