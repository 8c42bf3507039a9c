"""Core attention over packed rows, without Transformer Engine: torch's kernels, and an eager
version for comparison. A query sees the keys of its own row up to itself.

Both can be megatron-core's `core_attention`. Shapes: T positions of the packed sequence, C
context-parallel ranks, h heads, g key/value heads of this rank, d head size.
"""

import inspect
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from megatron_gkd.model.packed_rows import PackedRows, VarlenCall

# torch 2.11 takes fewer key/value heads as they are, later versions want to be told
_KNOWN = inspect.signature(varlen_attn).parameters
_GROUPED: Any = {"enable_gqa": True} if "enable_gqa" in _KNOWN else {}


def has_varlen_kernel(query: Tensor) -> bool:
    """Whether torch has one for sequences of several lengths: on CUDA from Ampere on, in 16 bits,
    for heads of a multiple of 8 up to 256. query [T, h, d].
    """
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    if not (query.is_cuda and is_half and fits):
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


class SdpaAttention(nn.Module):
    """softmax(q k' / sqrt(d)) v. Several rows of one length are a batch of
    `torch.nn.functional.scaled_dot_product_attention`, for which an H100 has faster kernels than
    for sequences of several lengths. Other rows are one call of `torch.nn.attention.varlen` where
    it has a kernel (`has_varlen_kernel`), elsewhere a call of the first a row. A row alone is not a
    batch: cuDNN, behind the first on an H100, compiles for every new length.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ):
        super().__init__()
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.cp_group = getattr(pg_collection, "cp", None)

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
        """query [T/C, 1, h, d], key and value [T/C, 1, g, d], packed_seq_params the rows ->
        [T/C, 1, h * d]. Raises ValueError for a mask and without the rows.

        Collectives: with C > 1 an all-gather of keys and values in forward, a reduce-scatter of
        their gradients in backward.
        """
        rows = packed_seq_params
        if attention_mask is not None or not isinstance(rows, PackedRows):
            raise ValueError(
                "this attention reads packed rows and takes no mask: pass PackedRows as "
                f"packed_seq_params, not {type(rows).__name__}"
            )
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        if rows.num_parts > 1:
            # with few key/value heads little to hold: one exchange, where a ring has C - 1
            pair = torch.stack((key, value), dim=1)
            pair = gather_from_sequence_parallel_region(pair, group=self.cp_group)
            key, value = pair.index_select(0, rows.order).unbind(1)
        return self.attend(query, key, value, rows).reshape(len(query), 1, -1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: PackedRows) -> Tensor:
        """query [T/C, h, d], key and value of the whole sequence [T, g, d] -> [T/C, h, d]."""
        if rows.common_length:
            query, key, value = (
                x.unflatten(0, (-1, rows.common_length)) for x in (query, key, value)
            )
            return self.attend_span(query, key, value, None).flatten(0, 1)
        if has_varlen_kernel(query):
            return self.attend_at_once(query, key, value, rows)
        return self.attend_by_row(query, key, value, rows)

    def attend_by_row(self, query: Tensor, key: Tensor, value: Tensor, rows: PackedRows) -> Tensor:
        """As `attend`, span by span."""
        if len(rows.spans) == 1:  # a row alone: nothing to cut or to join
            return self.attend_span(query[None], key[None], value[None], None)[0]
        parts = []
        for span in rows.spans:
            is_whole = span.num_queries == span.num_keys
            mask = None if is_whole else rows.mask(span, query.dtype)
            of_keys = key[None, span.keys], value[None, span.keys]
            parts.append(self.attend_span(query[None, span.queries], *of_keys, mask)[0])
        return torch.cat(parts)

    def attend_span(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query [B, q, h, d], key and value [B, k, g, d] of B rows up to the last query ->
        [B, q, h, d]. mask: see `PackedRows.mask`; None where q = k.
        """
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.shape[1] > key.shape[1],
        )
        return context.transpose(1, 2)

    def attend_at_once(self, query: Tensor, key: Tensor, value: Tensor, rows: PackedRows) -> Tensor:
        """As `attend`, through a kernel for sequences of several lengths."""

        def call(call: VarlenCall) -> Tensor:
            output: Any = varlen_attn(
                query if call.query_index is None else query.index_select(0, call.query_index),
                key if call.key_index is None else key.index_select(0, call.key_index),
                value if call.key_index is None else value.index_select(0, call.key_index),
                call.query_ends,
                call.key_ends,
                call.longest_query,
                call.longest_key,
                scale=self.scale,
                window_size=(-1, 0),
                **_GROUPED,
            )
            return output

        parts = [call(one) for one in rows.varlen_calls]
        return parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, rows.varlen_order)


class EagerAttention(SdpaAttention):
    """The same with materialized scores, softmax in fp32, row by row on every device."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: PackedRows) -> Tensor:
        """See `SdpaAttention.attend`."""
        return self.attend_by_row(query, key, value, rows)

    def attend_span(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """See `SdpaAttention.attend_span`."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        scores = (query @ key.transpose(2, 3)).float() * self.scale
        if mask is None:
            mask = torch.full_like(scores[0, 0], -float("inf")).triu(diagonal=1)
        return ((scores + mask).softmax(dim=-1).to(value.dtype) @ value).transpose(1, 2)
