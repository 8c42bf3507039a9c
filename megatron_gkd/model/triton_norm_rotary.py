"""QK-norm and rotary as Triton kernels, one launch each way. Shapes as in norm_rotary.py.

A program has some positions of one key/value group: it reads the positions' cosines and sines once,
then head after head. Forward reads q and k and writes them; backward reads q, k and the three
gradients and writes the projection's.
"""

import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # positions of a program


@triton.jit
def normed_and_rotated(
    x: tl.tensor,
    y: tl.tensor,
    weight_x: tl.tensor,
    weight_y: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
):
    """The halves x and y of heads of size D, fp32 [rows, D / 2 or more, zero there] -> the halves
    of what they become.
    """
    factor = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / D + eps)[:, None]
    x *= factor * weight_x
    y *= factor * weight_y
    return x * cos - y * sin, y * cos + x * sin


@triton.jit
def load_halves(head: tl.tensor, mask: tl.tensor, HALF: tl.constexpr):
    x = tl.load(head, mask=mask, other=0.0).to(tl.float32)
    return x, tl.load(head + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_halves(head: tl.tensor, x: tl.tensor, y: tl.tensor, mask: tl.tensor, HALF: tl.constexpr):
    dtype = head.dtype.element_ty
    tl.store(head, x.to(dtype), mask=mask)
    tl.store(head + HALF, y.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    heads: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    rotation: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    num_rows: tl.tensor,
    eps: tl.tensor,
    G: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    is_channel = i < HALF
    mask = (rows < num_rows) & is_channel
    group = rows * G + tl.program_id(1)
    cos, sin = load_halves(rotation + rows * D + i, mask, HALF)
    weight_x, weight_y = load_halves(q_weight + i, is_channel, HALF)
    head = heads + group * ((QUERIES + 2) * D) + i
    out = query + group * (QUERIES * D) + i
    for place in range(QUERIES):
        x, y = load_halves(head + place * D, mask, HALF)
        x, y = normed_and_rotated(x, y, weight_x, weight_y, cos, sin, eps, D)
        store_halves(out + place * D, x, y, mask, HALF)
    weight_x, weight_y = load_halves(k_weight + i, is_channel, HALF)
    x, y = load_halves(head + QUERIES * D, mask, HALF)
    x, y = normed_and_rotated(x, y, weight_x, weight_y, cos, sin, eps, D)
    store_halves(key + group * D + i, x, y, mask, HALF)


@triton.jit
def gradient_of_head(
    head: tl.tensor,
    upstream: tl.tensor,
    out: tl.tensor,
    weight_x: tl.tensor,
    weight_y: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    mask: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    x, y = load_halves(head, mask, HALF)
    u, v = load_halves(upstream, mask, HALF)
    factor = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / D + eps)[:, None]
    h = (u * cos + v * sin) * weight_x
    k = (v * cos - u * sin) * weight_y
    mean = ((tl.sum(h * x, 1) + tl.sum(k * y, 1)) / D)[:, None] * factor * factor
    store_halves(out, factor * (h - x * mean), factor * (k - y * mean), mask, HALF)


@triton.jit(do_not_specialize=["num_rows"])
def gradient_kernel(
    heads: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    rotation: tl.tensor,
    query_gradient: tl.tensor,
    key_gradient: tl.tensor,
    value_gradient: tl.tensor,
    gradient: tl.tensor,
    num_rows: tl.tensor,
    query_row: tl.tensor,
    query_head: tl.tensor,
    key_row: tl.tensor,
    key_head: tl.tensor,
    value_row: tl.tensor,
    value_head: tl.tensor,
    eps: tl.tensor,
    G: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    group = tl.program_id(1)
    i = tl.arange(0, BLOCK)[None, :]
    is_channel = i < HALF
    mask = (rows < num_rows) & is_channel
    cos, sin = load_halves(rotation + rows * D + i, mask, HALF)
    offset = (rows * G + group) * ((QUERIES + 2) * D) + i
    head, out = heads + offset, gradient + offset
    upstream = query_gradient + rows * query_row + group * QUERIES * query_head + i
    weight_x, weight_y = load_halves(q_weight + i, is_channel, HALF)
    for place in range(QUERIES):
        gradient_of_head(
            head + place * D,
            upstream + place * query_head,
            out + place * D,
            weight_x,
            weight_y,
            cos,
            sin,
            mask,
            eps,
            D,
        )
    head += QUERIES * D
    out += QUERIES * D
    upstream = key_gradient + rows * key_row + group * key_head + i
    weight_x, weight_y = load_halves(k_weight + i, is_channel, HALF)
    gradient_of_head(head, upstream, out, weight_x, weight_y, cos, sin, mask, eps, D)
    x, y = load_halves(value_gradient + rows * value_row + group * value_head + i, mask, HALF)
    store_halves(out + D, x, y, mask, HALF)


def normed_rotated(
    heads: Tensor, q_weight: Tensor, k_weight: Tensor, rotation: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See torch_norm_rotary.normed_rotated."""
    num_rows, groups, width, head_dim = heads.shape
    query = heads.new_empty(num_rows, groups, width - 2, head_dim)
    key = heads.new_empty(num_rows, groups, 1, head_dim)
    if num_rows:
        forward_kernel[_grid(heads)](
            heads,
            q_weight,
            k_weight,
            rotation.contiguous(),
            query,
            key,
            num_rows,
            eps,
            *_sizes(heads),
        )
    return query, key


def write_gradient(
    gradient: Tensor,
    heads: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotation: Tensor,
    query_gradient: Tensor,
    key_gradient: Tensor,
    value_gradient: Tensor,
    eps: float,
) -> None:
    """See torch_norm_rotary.write_gradient."""
    upstream = [
        x if x.stride(2) == 1 else x.contiguous()
        for x in (query_gradient, key_gradient, value_gradient)
    ]
    if len(heads):
        gradient_kernel[_grid(heads)](
            heads,
            q_weight,
            k_weight,
            rotation.contiguous(),
            *upstream,
            gradient,
            len(heads),
            *(stride for x in upstream for stride in x.stride()[:2]),
            eps,
            *_sizes(heads),
        )


def _grid(heads: Tensor) -> tuple[int, int]:
    return triton.cdiv(len(heads), ROWS), heads.shape[1]


def _sizes(heads: Tensor) -> tuple[int, ...]:
    _, groups, width, head_dim = heads.shape
    return groups, width - 2, head_dim, triton.next_power_of_2(head_dim // 2), ROWS
