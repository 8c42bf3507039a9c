"""Layers of the decoder that replace megatron-core's: RMSNorm, and the rotations of positions in
Qwen's interleaved layout.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / rms(x) * weight as Qwen3 computes it, statistics in fp32, for megatron-core's layer
    specs.

    The frozen weight is marked `sequence_parallel`, as megatron-core expects of weights that are
    replicated over sequence shards.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__()
        self.eps = eps
        weight: Any = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        weight.sequence_parallel = config.sequence_parallel
        self.weight: nn.Parameter = weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> the same shape and dtype. One kernel on a GPU."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class InterleavedRotaryEmbedding(nn.Module):
    """Replaces `GPTModel.rotary_pos_emb` of position_embedding_type "mrope", with the same call
    signature.

    Channel pair i rotates with the position in time, except that pairs below three times the
    section of height (width) rotate with the height (width) if i % 3 is 1 (2): TMRoPE.
    megatron-core's own mrope splits the channels into blocks instead. In text all three positions
    are equal.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, rope_theta: float):
        super().__init__()
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        self.register_buffer("inv_freq", 1.0 / rope_theta**exponent, persistent=False)

    @torch.no_grad()
    def forward(self, position_ids: Tensor, mrope_section: list[int], **_: Any) -> Tensor:
        """position_ids [3, B, S] (time, height, width) -> cosines and sines of the channel pairs'
        angles, fp32 [S, B, 2, head_dim / 2]: computed once a forward, for all layers.
        """
        angles = position_ids.float()[..., None] * self.inv_freq.to(position_ids.device)
        mixed = angles[0].clone()
        for axis in (1, 2):
            channels = slice(axis, 3 * mrope_section[axis], 3)
            mixed[..., channels] = angles[axis][..., channels]
        mixed = mixed.transpose(0, 1)
        return torch.stack((mixed.cos(), mixed.sin()), dim=2)
