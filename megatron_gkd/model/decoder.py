"""The decoder as megatron-core's GPTModel, frozen, without the lm_head product.

`build_decoder` returns this pipeline stage. Its forward ends at the final norm (hidden states
[S/TP, 1, H] of packed rows): only the response rows reach the lm_head, in the loss (`forward.py`)
or in the sampler (`rollout/`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.attention import EagerAttention, SdpaAttention
from megatron_gkd.model.dispatcher import use_dispatcher
from megatron_gkd.model.experts import GroupedExperts, check_experts_impl
from megatron_gkd.model.layers import InterleavedRotaryEmbedding, RMSNorm
from megatron_gkd.model.router import Router
from megatron_gkd.model.self_attention import SelfAttention
from megatron_gkd.model.transformer_config import transformer_config
from megatron_gkd.parallel import Parallel
from megatron_gkd.startup import transformer_engine_usable

FASTEST = ("auto", "flash", "flash_attn", "flash_attention_2")  # of --attn_impl: what there is


def core_attention(attn_impl: str, device: torch.device, context_parallel_size: int = 1) -> type:
    """The core attention module for `--attn_impl`. Raises ValueError if that cannot run.

    `auto`, `flash` and `flash_attention_2` select Transformer Engine's if it is installed, the
    device is a GPU and rows are not cut over context-parallel ranks, else torch's (with its own
    flash kernels).
    """
    te_usable = transformer_engine_usable(device) and context_parallel_size == 1
    if attn_impl == "te" and context_parallel_size > 1:
        raise ValueError(
            f"--attn_impl te does not know --context_parallel_size {context_parallel_size}; use "
            "--attn_impl sdpa"
        )
    if attn_impl == "te" and not te_usable:
        raise ValueError(
            "--attn_impl te needs Transformer Engine and a GPU; use --attn_impl sdpa, or install "
            "it: EXTRAS=test,gpu bash launch/setup_env.sh"
        )
    if attn_impl == "te" or (attn_impl in FASTEST and te_usable):
        from megatron_gkd.model.te_attention import PackedTEAttention

        return PackedTEAttention
    classes: dict[str, type] = {
        "eager": EagerAttention,
        "sdpa": SdpaAttention,
        **dict.fromkeys(FASTEST, SdpaAttention),
    }
    if attn_impl not in classes:
        raise ValueError(f"--attn_impl {attn_impl!r} is not one of {sorted(classes) + ['te']}")
    return classes[attn_impl]


class DeepstackLayer(TransformerLayer):
    """A TransformerLayer that adds `context[layer number - 1]` to its output at the tokens of
    images and videos (DeepStack: the first decoder layers also read features of inner layers of the
    vision tower). Without `context` it is megatron-core's layer, but for the dispatcher that brings
    tokens to their experts.

    The features are passed as the `context` that megatron-core's TransformerBlock hands from layer
    to layer, an explicit input of every recomputed layer. D layers with features, M media tokens in
    this rank's shard of the sequence.
    """

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        if isinstance(self.mlp.experts, GroupedExperts):
            use_dispatcher(self.mlp, self.pg_collection)

    def forward(
        self,
        *args: Any,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [S/TP, 1, H] as megatron-core passes them, context [D, M, H] and
        context_mask int64 [M], each token's position in the shard -> (hidden states, the next
        layer's `context`). No collectives besides those of megatron-core's layer.
        """
        output, _ = super().forward(*args, **kwargs)
        if context is None or context_mask is None:
            return output, None
        output = output.index_add(0, context_mask, context[self.layer_number - 1][:, None])
        return output, context if self.layer_number < len(context) else None


def layer_spec(attention: type, spare_columns: tuple[int, int] = (0, 0)) -> ModuleSpec:
    """One decoder layer: megatron-core's modules with our norm, attention and experts, and the
    addition of deepstack features. spare_columns: of gate_up and of down, see `build_decoder`.
    """
    return ModuleSpec(
        module=DeepstackLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(SelfAttention, params={"core_attention": attention}),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MoELayer,
                submodules=MoESubmodules(
                    experts=ModuleSpec(GroupedExperts, params={"spare_columns": spare_columns}),
                    router=Router,
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def build_decoder(
    model_args: ModelArgs,
    parallel: Parallel,
    dtype: torch.dtype,
    *,
    attn_impl: str = "auto",
    experts_impl: str = "auto",
    recompute: bool = False,
    spare_columns: Sequence[tuple[int, int]] = (),
) -> GPTModel:
    """This rank's stage of the decoder, frozen, its weights allocated but not set (see
    `formats.loading`).

    dtype: of weights and activations. spare_columns: of every layer of the model, room for LoRA's
    columns behind the weights of the experts' gate_up and down (model/grouped.py); without it LoRA
    moves these weights. Raises ValueError if layers, heads or experts cannot be divided among the
    ranks.
    """
    check_experts_impl(experts_impl)
    check_divides(
        "num_hidden_layers", model_args.num_layers, "pipeline_model_parallel_size", parallel.pp_size
    )
    check_divides(
        "num_attention_heads",
        model_args.num_attention_heads,
        "tensor_model_parallel_size",
        parallel.tp_size,
    )
    check_divides(
        "num_experts", model_args.num_experts, "expert_model_parallel_size", parallel.ep_size
    )
    if (
        model_args.num_key_value_heads % parallel.tp_size
        and parallel.tp_size % model_args.num_key_value_heads
    ):
        raise ValueError(
            f"tensor_model_parallel_size {parallel.tp_size} and num_key_value_heads "
            f"{model_args.num_key_value_heads}: one must divide the other"
        )

    config = transformer_config(model_args, parallel, dtype, recompute=recompute)
    num_stage_layers = get_num_layers_to_build(config, pp_rank=parallel.pp_rank)
    attention = core_attention(attn_impl, parallel.device, parallel.cp_size)
    first = parallel.pp_rank * num_stage_layers
    spare_columns = spare_columns or [(0, 0)] * model_args.num_layers
    of_stage = spare_columns[first : first + num_stage_layers]
    model = GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[layer_spec(attention, columns) for columns in of_stage],
            layer_norm=RMSNorm,
        ),
        vocab_size=model_args.padded_vocab_size(parallel.tp_size),
        max_sequence_length=1,  # only a learned position table would use it
        pre_process=parallel.is_first_stage,
        post_process=parallel.is_last_stage,
        parallel_output=True,
        # tied weights are loaded into both: frozen, they cannot drift apart
        share_embeddings_and_output_weights=False,
        position_embedding_type="mrope",
        pg_collection=parallel.groups,
    )
    model.rotary_pos_emb = InterleavedRotaryEmbedding(
        model_args.head_dim, model_args.rope_theta
    ).to(parallel.device)
    model.towers = None  # set if a run has media: towers.py
    # forward returns the final norm's output; the decoder block keeps its own flag
    model.post_process = False
    model.requires_grad_(False)
    if parallel.is_first_stage:
        # Without this, full recomputation finds no input that requires a gradient and silently
        # skips the backward of the first layers.
        model.decoder.register_forward_pre_hook(_require_grad_when_recording, with_kwargs=True)
    return model.to(parallel.device)


def _require_grad_when_recording(
    block: Any, args: tuple[Any, ...], kwargs: dict[str, Tensor]
) -> None:
    if torch.is_grad_enabled():
        kwargs["hidden_states"].requires_grad_()


def check_divides(what: str, number: int, by: str, divisor: int) -> None:
    """Raise ValueError naming both numbers unless `divisor` divides `number`."""
    if number % divisor:
        raise ValueError(f"{what} {number} is not divisible by {by} {divisor}")


def check_deepstack(num_features: int, num_layers: int, pp_size: int) -> None:
    """Raise ValueError unless the first of `pp_size` equal pipeline stages holds every layer that
    gets features of the vision tower.

    num_features: the number of those layers; num_layers: of all decoder layers.
    """
    needed, held = min(num_features, num_layers), num_layers // pp_size
    if needed > held:
        most = max(
            size
            for size in range(1, pp_size)
            if num_layers % size == 0 and num_layers // size >= needed
        )
        raise ValueError(
            f"the vision tower feeds the first {needed} decoder layers, and the first of {pp_size} "
            f"pipeline stages holds {held}: images and videos need --pipeline_model_parallel_size "
            f"{most} or less with this model"
        )
