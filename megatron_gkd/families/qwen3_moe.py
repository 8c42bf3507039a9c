"""Qwen3 MoE: text models (Qwen3-30B-A3B, Qwen3-235B-A22B), a decoder and nothing beside it."""

from typing import Any

from megatron_gkd.families.family import Family


def _config_class() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig


def _model_class() -> Any:
    from transformers import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM


FAMILY = Family(
    title="Qwen3 MoE",
    prefixes={"qwen3_moe": ""},
    text_defaults={
        "num_hidden_layers": 24,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": None,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "moe_intermediate_size": 768,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "vocab_size": 151936,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": 4096,
        "use_sliding_window": False,
    },
    aliases={"num_experts": "num_local_experts"},
    config_class=_config_class,
    model_class=_model_class,
)
