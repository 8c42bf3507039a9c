"""Core attention without Transformer Engine: torch's scaled-dot-product attention, and an eager
version for comparison. Both are causal: rows are padded on the right.

Both can be megatron-core's `core_attention`. Shapes: S positions, B rows, h heads, g key/value
heads of this rank, d head size.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn
from torch.nn import functional as F


class SdpaAttention(nn.Module):
    """softmax(q k' / sqrt(d)) v through `torch.nn.functional.scaled_dot_product_attention`, which
    selects the kernel.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        softmax_scale: float | None = None,
        **_: Any,
    ):
        super().__init__()
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """query [S, B, h, d], key and value [S, B, g, d] -> [S, B, h * d].

        Raises ValueError for a mask, for other numbers of queries than keys, and for packed
        sequences.
        """
        if packed_seq_params is not None:
            raise ValueError(
                "packed sequences need Transformer Engine's attention: use --attn_impl te, or pad "
                "the rows of a batch"
            )
        num_queries, batch_size, num_heads, head_dim = query.shape
        if attention_mask is not None or num_queries != len(key):
            raise ValueError(
                f"this attention is causal, {num_queries} queries over {len(key)} keys, and takes "
                "no mask"
            )
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = self.attend(query, key, value)
        return context.permute(2, 0, 1, 3).reshape(num_queries, batch_size, num_heads * head_dim)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, h, S, d], [B, g, S, d] twice -> [B, h, S, d]."""
        is_grouped = query.shape[1] > key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=is_grouped
        )


class EagerAttention(SdpaAttention):
    """The same with materialized [S, S] scores, softmax in fp32."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        size = query.shape[2]
        visible = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
        scores = (query @ key.transpose(2, 3)).float() * self.scale
        scores = scores.masked_fill(~visible, -float("inf"))
        return scores.softmax(dim=-1).to(value.dtype) @ value
