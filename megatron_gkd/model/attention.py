"""Core attention without Transformer Engine: torch's scaled-dot-product attention, and an eager
version for comparison.

Both can be megatron-core's `core_attention`. Shapes: S query positions, K key positions,
B rows, h heads, g key/value heads of this rank, d head size.
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
        """query [S, B, h, d], key and value [K, B, g, d] -> [S, B, h * d].

        attention_mask [B, 1, S, K] bool, True = hidden (megatron-core's convention); None is
        causal, and there are as many queries as keys, or one query at the last position. Raises
        ValueError for other numbers without a mask, and for packed sequences.
        """
        if packed_seq_params is not None:
            raise ValueError(
                "packed sequences need Transformer Engine's attention: use --attn_impl te, or pad "
                "the rows of a batch"
            )
        num_queries, batch_size, num_heads, head_dim = query.shape
        if attention_mask is None and num_queries not in (1, key.shape[0]):
            raise ValueError(
                f"{num_queries} queries over {key.shape[0]} keys need an explicit attention mask"
            )
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = self.attend(
            query, key, value, None if attention_mask is None else ~attention_mask
        )
        return context.permute(2, 0, 1, 3).reshape(num_queries, batch_size, num_heads * head_dim)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        """[B, h, S, d], [B, g, K, d] twice, visible [B, 1, S, K] or None -> [B, h, S, d].

        On a GPU the only kernel that takes a mask and shares key/value heads is the one that
        materializes all scores. So with one query position, the query heads of a group are passed
        as query positions; otherwise keys and values are repeated.
        """
        num_rows, num_heads, num_queries, head_dim = query.shape
        group = num_heads // key.shape[1]
        if num_queries == 1:
            grouped = query.view(num_rows, key.shape[1], group, head_dim)
            context = F.scaled_dot_product_attention(
                grouped, key, value, attn_mask=visible, scale=self.scale
            )
            return context.reshape(num_rows, num_heads, 1, head_dim)
        if visible is None:
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scale, enable_gqa=group > 1
            )
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=self.scale
        )


class EagerAttention(SdpaAttention):
    """The same with materialized [S, K] scores, softmax in fp32."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        if visible is None:
            visible = torch.ones(
                query.shape[2], key.shape[2], dtype=torch.bool, device=query.device
            )
            visible = visible.tril(key.shape[2] - query.shape[2])
        scores = (query @ key.transpose(2, 3)).float() * self.scale
        # The lowest number, not -inf: a query that sees nothing (padding) must not turn into NaN.
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1).to(value.dtype) @ value
