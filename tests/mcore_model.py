"""megatron-core's own GPTModel of a folder's sizes, as far as checkpoints go: its parameters, saved
and loaded by it.

Experts are megatron-core's SequentialMLP, whose keys are those of Transformer Engine's grouped
experts, and the input norm is named as in Transformer Engine's fused linear: what loads here loads
on a GPU.
"""

import multiprocessing

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from megatron_gkd.model.attention import SdpaAttention
from megatron_gkd.model.decoder import layer_spec
from megatron_gkd.model.layers import RMSNorm
from megatron_gkd.model.transformer_config import transformer_config


def build(model_args, place, dtype):
    config = transformer_config(model_args, place, dtype)
    spec = layer_spec(SdpaAttention)
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    spec.submodules.self_attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SdpaAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm,
            k_layernorm=RMSNorm,
        ),
    )
    experts = ModuleSpec(module=SequentialMLP, submodules=mlp)
    spec.submodules.mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))
    spec.submodules.sharded_state_dict_keys_map = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_"
    }
    num_layers = get_num_layers_to_build(config, pp_rank=place.pp_rank)
    return GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[spec] * num_layers, layer_norm=RMSNorm
        ),
        vocab_size=model_args.padded_vocab_size(place.tp_size),
        max_sequence_length=1,
        pre_process=place.is_first_stage,
        post_process=place.is_last_stage,
        share_embeddings_and_output_weights=model_args.tie_word_embeddings,
        position_embedding_type="mrope",
        pg_collection=place.groups,
    )


def load(model, folder):
    """megatron-core reads the checkpoint; a key that it asks for and does not find raises."""
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder))
    model.load_state_dict(loaded["model"])


def save(model, folder, rank):
    """megatron-core writes the checkpoint, with the helper processes that it starts for it; none is
    left.
    """
    if rank == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    multiprocessing.current_process()._config["daemon"] = (
        False  # test ranks are daemons, which may start no process
    )
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(folder))
    if filesystem_async._results_queue is not None:
        filesystem_async._results_queue._manager.shutdown()
