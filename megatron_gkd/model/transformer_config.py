"""The sizes of the decoder (args.py) -> megatron-core's TransformerConfig."""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from megatron_gkd.model.args import ModelArgs
from megatron_gkd.parallel import Parallel

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def transformer_config(
    model_args: ModelArgs, parallel: Parallel, dtype: torch.dtype, *, recompute: bool = False
) -> TransformerConfig:
    """megatron-core's configuration of the decoder. `parallel` gives tp_size, pp_size and ep_size.
    recompute: every layer is run again in backward; a smaller `recompute_num_layers` limits that to
    the first layers of a stage (recompute.py).

    Sequence parallelism is on whenever tensor parallelism is (megatron-core trains a mixture of
    experts only so).
    """
    return TransformerConfig(
        num_layers=model_args.num_layers,
        hidden_size=model_args.hidden_size,
        num_attention_heads=model_args.num_attention_heads,
        num_query_groups=model_args.num_key_value_heads,
        kv_channels=model_args.head_dim,
        ffn_hidden_size=model_args.moe_intermediate_size,
        moe_ffn_hidden_size=model_args.moe_intermediate_size,
        num_moe_experts=model_args.num_experts,
        moe_router_topk=model_args.num_experts_per_tok,
        moe_router_pre_softmax=not model_args.norm_topk_prob,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",  # replaced: model/dispatcher.py
        normalization="RMSNorm",
        layernorm_epsilon=model_args.rms_norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mrope_section=list(model_args.mrope_section),
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        expert_model_parallel_size=parallel.ep_size,
        expert_tensor_parallel_size=1,
        sequence_parallel=parallel.tp_size > 1,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=parallel.device.type == "cpu",
        perform_initialization=False,  # every weight is read from the folder
        variable_seq_lengths=True,  # micro-batches and the two views have their own lengths
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        recompute_granularity="full" if recompute else None,
        recompute_method="block" if recompute else None,
        recompute_num_layers=model_args.num_layers if recompute else None,
    )
