"""LoRA's second product, added to the base's output where that lies; W_ups laid out block by block
for a fused linear.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


def add_up_product(output: Tensor, low: Tensor, up: Tensor, scale: float) -> Tensor:
    """output [..., out] + scale low [..., R] up' [out, R], in output's memory and dtype: one
    product, nothing of output's size beside it. Differentiable in all three. The caller gives
    `output` away: it is what a linear has just computed, which no backward needs.
    """
    return _AddUpProduct.apply(output, low, up, scale)


class _AddUpProduct(torch.autograd.Function):
    """With the gradient g [T, out] of the sum: dL/doutput = g, dL/dlow = scale g up, dL/dup = scale
    g' low. Saves low and up. Products in output's dtype, dL/dup in up's. No collectives.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, low: Tensor, up: Tensor, scale: float) -> Tensor:
        # The sum is a tensor of its own for autograd: as a view that was changed in place it would
        # cost a copy of its gradient, and some linears return views that refuse such a change.
        # Their version still counts it: a backward that needs `output` after all raises.
        total = output.detach()
        low = low.reshape(-1, low.shape[-1])
        total.view(-1, total.shape[-1]).addmm_(low, up.to(total.dtype).T, alpha=scale)
        ctx.save_for_backward(low, up)
        ctx.scale, ctx.sizes = scale, (*output.shape[:-1], low.shape[-1])
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        low, up = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        nothing = rows.new_empty(())  # beta 0: not read
        grad_low = grad_up = None
        if ctx.needs_input_grad[1]:
            grad_low = torch.addmm(nothing, rows, up.to(rows.dtype), beta=0, alpha=ctx.scale)
            grad_low = grad_low.view(ctx.sizes)
        if ctx.needs_input_grad[2]:
            grad_up = torch.addmm(nothing, rows.T, low, beta=0, alpha=ctx.scale).to(up.dtype)
        return gradient, grad_low, grad_up, None


class Layout(NamedTuple):
    """Where the numbers of several W_ups stand in one matrix [rows, P r], flattened."""

    source: Tensor
    """int64 [rows * P * r]: for each entry its place in the W_ups one after the other, behind which
    a zero follows"""
    place: Tensor
    """int64 [sum of the W_ups' sizes]: the inverse; 0 for numbers that stand nowhere"""
    is_used: Tensor | None
    """bool, of `place`'s shape; None where all numbers are used"""


@lru_cache(maxsize=16)  # the same for all layers
def block_layout(
    segments: tuple[tuple[str, int, int], ...],
    sizes: tuple[tuple[str, int], ...],
    rank: int,
    device: torch.device,
) -> Layout:
    """segments: (name, first row in that W_up, rows) of the fused linear, from its first row to its
    last; sizes: the name and rows of each W_up that there is, in the order of the blocks of
    columns. Rows of a projection without a W_up are zero.
    """
    num_columns, total = len(sizes) * rank, rank * sum(rows for _, rows in sizes)
    blocks, start = {}, 0
    for number, (name, rows) in enumerate(sizes):
        blocks[name] = (number * rank, start)
        start += rows * rank
    source = torch.full((sum(rows for *_, rows in segments), num_columns), total)
    row = 0
    for name, first, rows in segments:
        if name in blocks:
            column, start = blocks[name]
            numbers = torch.arange(rows * rank).view(rows, rank) + start + first * rank
            source[row : row + rows, column : column + rank] = numbers
        row += rows
    place = torch.full((total + 1,), -1)
    place[source.flatten()] = torch.arange(source.numel())
    place = place[:total]
    is_used = None if bool((place >= 0).all()) else (place >= 0).to(device)
    return Layout(source.flatten().to(device), place.clamp(min=0).to(device), is_used)


def lay_out(ups: Iterable[Tensor], layout: Layout, num_columns: int) -> Tensor:
    """W_ups [rows, r] -> one matrix [rows, num_columns]."""
    return _LayOut.apply(layout, num_columns, *ups)


class _LayOut(torch.autograd.Function):
    """A gather each way, of which no two read the same place: no sums, no atomics. Saves nothing of
    the matrices.
    """

    @staticmethod
    def forward(ctx: Any, layout: Layout, num_columns: int, *ups: Tensor) -> Tensor:
        ctx.layout, ctx.sizes = layout, [up.shape for up in ups]
        zero = layout.source.new_zeros(1, dtype=ups[0].dtype)
        flat = torch.cat([*(up.flatten() for up in ups), zero])
        return flat[layout.source].view(-1, num_columns)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        flat = gradient.flatten()[ctx.layout.place]
        if ctx.layout.is_used is not None:
            flat = flat * ctx.layout.is_used
        parts = flat.split([size.numel() for size in ctx.sizes])
        return None, None, *(part.view(size) for part, size in zip(parts, ctx.sizes))
