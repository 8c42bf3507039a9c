"""Conversions between Hugging Face folders and Megatron checkpoints: sizes of small folders, and
both ways in shards of 300 kB.
"""

from checkpoint_tools.hf_to_megatron import HfToMegatronConfig
from checkpoint_tools.hf_to_megatron import convert as hf_to_megatron
from checkpoint_tools.megatron_to_hf import MegatronToHfConfig
from checkpoint_tools.megatron_to_hf import convert as megatron_to_hf

SMALL = dict(
    num_hidden_layers=4,
    hidden_size=32,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    num_experts=4,
    moe_intermediate_size=16,
    vocab_size=601,  # padded to 640 at TP 1, 768 at TP 2, 1024 at TP 4 and 8
)
WHOLE = dict(**SMALL, torch_dtype="bfloat16", max_shard_size="200KB")
TIED = dict(**SMALL, thinker_only=True, tie_word_embeddings=True)
SHARD_BYTES = 300_000


def to_megatron(folder, output, tp=1, **settings):
    config = HfToMegatronConfig(
        str(folder), str(output), tensor_model_parallel_size=tp, num_workers=2, **settings
    )
    return hf_to_megatron(config, SHARD_BYTES)


def to_hf(checkpoint, output, **settings):
    return megatron_to_hf(
        MegatronToHfConfig(str(checkpoint), str(output), num_workers=2, **settings), SHARD_BYTES
    )
