"""The router's logits in fp32, from inputs and weights of 16 bits, for megatron-core's MoE layer.

Legend: N tokens, H hidden size, E experts.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class _RouterProduct(torch.autograd.Function):
    """logits = x W' in fp32; backward dx = g W, rounded to x's dtype. Nothing of x is saved, W is
    frozen and has no gradient. No collectives.

    On CUDA the 16-bit numbers go to the tensor cores as they are: a product of two of them is exact
    in fp32, so the logits differ from an fp32 product's in the order of its sums alone. The
    upstream gradient g is fp32: in bfloat16 it is the sum of three numbers of 8 bits each, side by
    side in one product with W repeated. float16 has not the range for that, and multiplies in fp32.
    Elsewhere both products are fp32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        assert not weight.requires_grad, "the router is frozen"
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        return logits_product(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return input_gradient(gradient, weight, ctx.dtype), None


def logits_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, H], weight [E, H] -> x W' in fp32."""
    if x.is_cuda and x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return torch.mm(x.float(), weight.float().t())


def input_gradient(gradient: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient fp32 [N, E], weight [E, H] -> their product in `dtype`."""
    if gradient.is_cuda and dtype == weight.dtype == torch.bfloat16:
        return torch.mm(bfloat16_parts(gradient), weight.repeat(3, 1))
    return torch.mm(gradient, weight.float()).to(dtype)


def bfloat16_parts(x: Tensor) -> Tensor:
    """fp32 [N, E] -> bfloat16 [N, 3 E]: three parts side by side whose sum is x."""
    first = x.to(torch.bfloat16)
    rest = x - first
    second = rest.to(torch.bfloat16)
    return torch.cat((first, second, (rest - second).to(torch.bfloat16)), dim=1)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., H], weight [E, H] frozen -> fp32 [..., E]. Differentiable with respect to x."""
    return _RouterProduct.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


class Router(TopKRouter):
    """megatron-core's router with these logits."""

    def gating(self, input: Tensor) -> Tensor:
        """[S, B, H] -> fp32 [S, B, E]. No collectives."""
        return router_logits(input, self.weight)
