"""Self-attention of a decoder layer, for megatron-core's layer specs: its linears, ours between
them.

Legend: S sequence, B rows of the batch, TP tensor-parallel ranks, h query heads and g key/value
heads of this rank, d head size.
"""

import copy
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from megatron_gkd.model.layers import RMSNorm
from megatron_gkd.model.norm_rotary import norm_rotary


class SelfAttention(nn.Module):
    """What megatron-core's SelfAttention computes with QK-norm, its modules under the same names.

    A rank has h = heads / TP query heads and the key/value heads that they read: with more ranks
    than key/value heads several ranks hold, and compute, the same one (model/qkv_layout.py), where
    megatron-core gathers the whole projection in every layer. core_attention: the class.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        core_attention: type,
        **_: Any,
    ):
        super().__init__()
        groups, tp_size = config.num_query_groups, pg_collection.tp.size()
        assert groups is not None and config.kv_channels is not None
        self.eps = config.layernorm_epsilon
        if tp_size > groups:
            config, groups = copy.copy(config), tp_size
            config.num_query_groups = groups
        self.num_groups = groups // tp_size
        queries = config.num_attention_heads * config.kv_channels
        linear = dict(config=config, bias=False, is_expert=False, tp_group=pg_collection.tp)
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size,
            queries + 2 * groups * config.kv_channels,
            init_method=config.init_method,
            gather_output=False,
            **linear,
        )
        self.q_layernorm = RMSNorm(config, config.kv_channels, self.eps)
        self.k_layernorm = RMSNorm(config, config.kv_channels, self.eps)
        self.core_attention = core_attention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            softmax_scale=config.softmax_scale,
            pg_collection=pg_collection,
        )
        self.linear_proj = RowParallelLinear(
            queries,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **linear,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S/TP, B, H], rotary_pos_emb fp32 [S, B, 2, d / 2] (cosines and sines) ->
        ([S/TP, B, H], bias). Collectives: those of the linears and of core attention.
        """
        qkv, _ = self.linear_qkv(hidden_states)
        query, key, value = norm_rotary(
            qkv,
            self.q_layernorm.weight,
            self.k_layernorm.weight,
            rotary_pos_emb,
            self.num_groups,
            self.eps,
        )
        context = self.core_attention(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=AttnMaskType.causal,
            packed_seq_params=packed_seq_params,
        )
        return self.linear_proj(context)
