"""QK-norm and rotary embedding of the fused qkv projection, in one function.

A head x [d] of q or k at one position becomes, with n = 1 / sqrt(mean(x^2) + eps), z = n w x and
the position's d / 2 angles, whose cosines are c and sines s (x1, x2 are the halves of x):

    y1 = z1 c - z2 s        y2 = z2 c + z1 s

Backward, with the upstream gradient g: h = w R'g is the gradient of n x, R' the rotation back, and

    dx = n h - x n^3 mean(h x)

v passes unchanged. Everything is computed in fp32 and rounded once. Legend: S sequence, B rows of
the batch, N = S B, g key/value groups of this rank, h query heads, Q = h / g, d head size.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_gkd.kernels import runs_triton
from megatron_gkd.model import torch_norm_rotary


def select_kernels(device: torch.device) -> ModuleType:
    """triton_norm_rotary on CUDA where Triton is installed, otherwise torch_norm_rotary."""
    if runs_triton(device):
        from megatron_gkd.model import triton_norm_rotary

        return triton_norm_rotary
    return torch_norm_rotary


class _NormRotary(torch.autograd.Function):
    """See the file's docstring. Saved for backward: the projection, of which v is a view, and no
    result; n is computed again. No collectives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        rotation: Tensor,
        num_groups: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert not (q_weight.requires_grad or k_weight.requires_grad), "the norms are frozen"
        ctx.save_for_backward(qkv, q_weight, k_weight, rotation)
        ctx.num_groups, ctx.eps = num_groups, eps
        heads = _heads(qkv, num_groups, len(q_weight))
        query, key = select_kernels(qkv.device).normed_rotated(
            heads, q_weight, k_weight, rotation.flatten(0, 1), eps
        )
        positions, value = qkv.shape[:2], heads[:, :, -1]
        return (
            query.flatten(1, 2).unflatten(0, positions),
            key.flatten(1, 2).unflatten(0, positions),
            value.unflatten(0, positions),
        )

    @staticmethod
    def backward(
        ctx: Any, query_gradient: Tensor, key_gradient: Tensor, value_gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, rotation = ctx.saved_tensors
        heads = _heads(qkv, ctx.num_groups, len(q_weight))
        gradient = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        select_kernels(qkv.device).write_gradient(
            _heads(gradient, ctx.num_groups, len(q_weight)),
            heads,
            q_weight,
            k_weight,
            rotation.flatten(0, 1),
            query_gradient.flatten(0, 1),
            key_gradient.flatten(0, 1),
            value_gradient.flatten(0, 1),
            ctx.eps,
        )
        return gradient, None, None, None, None, None


def _heads(qkv: Tensor, num_groups: int, head_dim: int) -> Tensor:
    """[S, B, g (Q + 2) d] -> [N, g, Q + 2, d], a view where the tensor is contiguous."""
    return qkv.reshape(-1, num_groups, qkv.shape[-1] // num_groups // head_dim, head_dim)


def norm_rotary(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotation: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused projection [S, B, (h + 2 g) d], by group its Q queries, its key, its value ->
    (query [S, B, h, d], key [S, B, g, d], value [S, B, g, d]) in its dtype: query and key normed
    and rotated, value a view of it.

    q_weight, k_weight: [d], frozen. rotation: fp32 [S, B, 2, d / 2], cosines and sines of the
    positions. Differentiable with respect to qkv; no collectives.
    """
    assert qkv.is_contiguous() and rotation.shape[:2] == qkv.shape[:2]
    return _NormRotary.apply(qkv, q_weight, k_weight, rotation, num_groups, eps)
