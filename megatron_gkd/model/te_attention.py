"""Transformer Engine's attention over packed rows. Imported only where it can run."""

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_gkd.model.packed_rows import PackedRows


class PackedTEAttention(TEDotProductAttention):
    """Transformer Engine's kernels in their packed form ("thd"). Without context parallelism."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """query [T, 1, h, d], key and value [T, 1, g, d] -> [T, 1, h * d]."""
        assert isinstance(packed_seq_params, PackedRows)
        (call,) = packed_seq_params.varlen_calls
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=call.query_ends,
            cu_seqlens_kv=call.key_ends,
            max_seqlen_q=call.longest_query,
            max_seqlen_kv=call.longest_key,
        )
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        context = super().forward(
            query, key, value, attention_mask, *args, packed_seq_params=packed, **kwargs
        )
        return context.reshape(len(query), 1, -1)
