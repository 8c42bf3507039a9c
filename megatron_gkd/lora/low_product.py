"""LoRA's first product with its dropout: low = (x o m / (1 - p)) W_down'.

m is the mask of 0 and 1 that dropout.py draws from (seed, row, column). It is drawn again wherever
it is used, so nothing of x's size is written but the gradient: forward saves x and W_down. With the
gradient g of low:

    dL/dx      = (g W_down) o m / (1 - p)
    dL/dW_down = g' (x o m / (1 - p))

T rows of x, in its width, R low numbers (the ranks of all projections that share x, padded). With
`offsets`, rows are sorted by expert: W_down is [E, R, in], and offsets [E] int32 are the ends of
the experts' rows, the last of them T. Products run in x's dtype whatever W_down's is; gradients
have the dtype of what they belong to.

The three functions stand here in torch, for CPUs and as the reference, and in
triton_low_product.py as a kernel each; `select_kernels` chooses. `low_product` is the dense product
for autograd; the experts' block (model/experts.py) calls the functions. No collectives, no
synchronisation, no atomics.
"""

import sys
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_gkd.kernels import runs_triton
from megatron_gkd.lora.dropout import Drop, keep_mask
from megatron_gkd.model.grouped import grouped_outer, grouped_product

__all__ = ["Drop", "low_backward_input", "low_backward_weight", "low_forward", "low_product"]


def select_kernels(device: torch.device) -> ModuleType:
    """The module with the three functions for `device`: triton_low_product on CUDA where Triton is
    installed, otherwise this one.
    """
    if runs_triton(device):
        from megatron_gkd.lora import triton_low_product

        return triton_low_product
    return sys.modules[__name__]


def low_product(x: Tensor, down: Tensor, drop: Drop | None) -> Tensor:
    """x [..., in], down [R, in] -> [..., R], in x's dtype. Differentiable in x and down. Without
    `drop` it is the plain product.
    """
    rows = x.reshape(-1, x.shape[-1])
    low = F.linear(rows, down.to(x.dtype)) if drop is None else _LowProduct.apply(rows, down, drop)
    return low.view(*x.shape[:-1], low.shape[-1])


class _LowProduct(torch.autograd.Function):
    """x [T, in], down -> low [T, R]: the module's formula. Saves x and down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, drop: Drop) -> Tensor:
        ctx.save_for_backward(x, down)
        ctx.drop = drop
        return select_kernels(x.device).low_forward(x, down, drop)

    @staticmethod
    def backward(ctx: Any, grad_low: Tensor) -> tuple:
        x, down = ctx.saved_tensors
        kernels = select_kernels(x.device)
        grad_x = grad_down = None
        if ctx.needs_input_grad[0]:
            grad_x = kernels.low_backward_input(grad_low, down, ctx.drop)
        if ctx.needs_input_grad[1]:
            grad_down = kernels.low_backward_weight(grad_low, x, ctx.drop)
            grad_down = grad_down.to(down.dtype)
        return grad_x, grad_down, None


def low_forward(x: Tensor, down: Tensor, drop: Drop, offsets: Tensor | None = None) -> Tensor:
    """x [T, in], down [R, in] or [E, R, in] -> low [T, R], in x's dtype."""
    kept, down = _kept(x, drop), down.to(x.dtype)
    low = F.linear(kept, down) if offsets is None else grouped_product(kept, down, offsets)
    return low.mul_(drop.scale)


def low_backward_input(
    grad_low: Tensor,
    down: Tensor,
    drop: Drop,
    offsets: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """grad_low [T, R] -> dL/dx [T, in], in grad_low's dtype. With `into` [T, in] it is added to
    that in place.
    """
    down = down.to(grad_low.dtype)
    if offsets is None:
        product = grad_low @ down
    else:
        product = grouped_product(grad_low, down.transpose(1, 2).contiguous(), offsets)
    product = _kept(product, drop).mul_(drop.scale)
    return product if into is None else into.add_(product)


def low_backward_weight(
    grad_low: Tensor, x: Tensor, drop: Drop, offsets: Tensor | None = None
) -> Tensor:
    """grad_low [T, R], x [T, in] -> dL/dW_down [R, in], with offsets [E, R, in]; at least fp32."""
    kept = _kept(x, drop)
    _mask.cache_clear()  # nobody needs it again
    product = grad_low.T @ kept if offsets is None else grouped_outer(grad_low, kept, offsets)
    return product.to(torch.promote_types(x.dtype, torch.float32)).mul_(drop.scale)


def _kept(x: Tensor, drop: Drop) -> Tensor:
    """x [T, in] with its dropped entries zero."""
    num_rows, num_columns = x.shape
    return torch.where(_mask(num_rows, num_columns, drop, x.device), x, 0)


@lru_cache(maxsize=1)  # the two gradients of a call need the same one
def _mask(num_rows: int, num_columns: int, drop: Drop, device: torch.device) -> Tensor:
    return keep_mask(num_rows, num_columns, drop, device)
