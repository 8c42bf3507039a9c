"""QK-norm and rotary in torch: the reference of triton_norm_rotary.py, and what CPUs run.

Shapes as in norm_rotary.py. The norm's weight is multiplied into the cosines and sines of a
position, which all its heads share, so that a head is read and written few times.
"""

import torch
from torch import Tensor


def normed_rotated(
    heads: Tensor, q_weight: Tensor, k_weight: Tensor, rotation: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """heads [N, g, Q + 2, d], rotation [N, 2, d / 2] -> (query [N, g, Q, d], key [N, g, 1, d]),
    contiguous.
    """
    half, (wide, factor) = heads.shape[-1] // 2, _wide(heads, eps)
    results = []
    for part, (cos, sin) in zip(_PARTS, _weighted(rotation, q_weight, k_weight, wide.dtype)):
        x = wide[:, :, part]
        y = x * cos
        y[..., :half].addcmul_(x[..., half:], sin[..., half:], value=-1)
        y[..., half:].addcmul_(x[..., :half], sin[..., :half])
        results.append(y.mul_(factor[:, :, part]).to(heads.dtype))
    query, key = results
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
    """Fills `gradient` [N, g, Q + 2, d], of `heads`, from those of the results: [N, h, d] of the
    query, [N, g, d] of key and value.
    """
    head_dim, half, (wide, factor) = heads.shape[-1], heads.shape[-1] // 2, _wide(heads, eps)
    written, cubed = gradient[:, :, :-1], factor.pow(3).div_(head_dim)
    tables = _weighted(rotation, q_weight, k_weight, wide.dtype)
    upstreams = query_gradient.unflatten(1, (heads.shape[1], -1)), key_gradient[:, :, None]
    for part, (cos, sin), upstream in zip(_PARTS, tables, upstreams):
        x, g = wide[:, :, part], upstream.to(wide.dtype)
        h = g * cos
        h[..., :half].addcmul_(g[..., half:], sin[..., :half])
        h[..., half:].addcmul_(g[..., :half], sin[..., half:], value=-1)
        mean = (h * x).sum(dim=-1, keepdim=True).mul_(cubed[:, :, part])
        written[:, :, part] = h.mul_(factor[:, :, part]).addcmul_(x, mean, value=-1)
    gradient[:, :, -1] = value_gradient


_PARTS = slice(None, -1), slice(-1, None)  # of a group's queries and key


def _wide(heads: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Queries and keys in fp32 [N, g, Q + 1, d], and 1 / sqrt(mean(x^2) + eps) [N, g, Q + 1, 1]."""
    wide = heads[:, :, :-1].to(torch.promote_types(heads.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide, norm.square_().div_(heads.shape[-1]).add_(eps).rsqrt_()


def _weighted(
    rotation: Tensor, q_weight: Tensor, k_weight: Tensor, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], ...]:
    """Of queries and of keys (cosines, sines) [N, 1, 1, d], each times the norm's weight of the
    channel that it multiplies.
    """
    weights = torch.stack((q_weight, k_weight)).to(dtype).view(2, 1, 2, -1)
    table = (rotation.to(dtype)[:, None, :, None] * weights).flatten(3)  # [N, 2, 2, d]
    return tuple(side[:, None, None].unbind(3) for side in table.unbind(1))
