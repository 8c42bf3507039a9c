"""What decoding reads of this rank's stage: the frozen weights where they lie, and each linear's
LoRA laid out once a rollout in the activations' dtype.

The laid-out matrices keep their addresses until training ends, for the CUDA graphs that read them.
Legend: r rank, P projections of a fused linear, E experts of this rank.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_gkd.lora.slots import LoraModule
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.parallel import Parallel


class Linear(NamedTuple):
    """A frozen linear and its LoRA, alpha / r multiplied into `up`."""

    weight: Tensor
    """[out, in], or of experts [E, out, in]; rows of experts may lie further apart"""
    down: Tensor | None
    """[R, in] ([E, R, in]): P r rows, then zeros; None without LoRA"""
    up: Tensor | None
    """[rank, out], P r rows and zeros up to a multiple of 8; of experts [E, R, out]"""


@dataclass(frozen=True)
class LayerWeights:
    input_norm: Tensor
    qkv: Linear
    """In the fused order: a group's queries, its key, its value"""
    qk_norm: Tensor
    """[queries of a group + 1, D]: the query norm's weight for each, the key norm's"""
    output: Linear
    mlp_norm: Tensor
    router: Tensor
    """[experts of all ranks, H]"""
    gate_up: Linear
    down: Linear


class Sizes(NamedTuple):
    """This rank's share of the decoder."""

    hidden: int
    groups: int
    queries: int
    """Query heads of a key/value group"""
    head_dim: int
    num_experts: int
    first_expert: int
    """Of the experts that this rank holds; experts follow in order"""
    num_local_experts: int
    experts_per_token: int
    renormalize: bool
    """Softmax over the chosen experts alone"""
    eps: float


class Routing(NamedTuple):
    """The router's choice for B rows, K experts each."""

    ids: Tensor
    """[B, K], numbered as this rank holds them; `num_local_experts` where it is another rank's"""
    probabilities: Tensor
    """fp32 [B, K]"""
    is_partial: bool
    """Whether other ranks may compute some of them"""


class Delta(NamedTuple):
    """What is added to the residual stream, in parts."""

    parts: Tensor
    """[B, parts, width]: the first H columns are added up; behind them LoRA's low numbers"""
    up: Tensor | None
    """[rank, H], for the low numbers"""


class StageWeights:
    """Of the adapter that is active when it is made; `refresh` must find the same one active."""

    def __init__(self, model: Any, model_args: ModelArgs, parallel: Parallel):
        self.sizes = sizes_of(model_args, parallel)
        self._laid_out: list[tuple[Any, Linear]] = []
        self.layers = [self._layer(layer) for layer in model.decoder.layers]
        self.embedding = model.embedding.word_embeddings.weight if parallel.is_first_stage else None
        self.final_norm = model.decoder.final_layernorm.weight if parallel.is_last_stage else None
        self.rotary = model.rotary_pos_emb

    def refresh(self) -> None:
        """Lay out the adapter's newest weights. No collectives."""
        for module, linear in self._laid_out:
            down, up = (matrix.detach() for matrix in module.fused(module.slot))
            up = up * module.slot.scale
            rank = down.shape[-2]
            assert linear.down is not None and linear.up is not None
            linear.down[..., :rank, :].copy_(down)
            linear.up[..., :rank, :].copy_(up.transpose(-1, -2))

    def _layer(self, layer: Any) -> LayerWeights:
        attention, experts = layer.self_attention, layer.mlp.experts
        norms = [attention.q_layernorm.weight] * self.sizes.queries + [attention.k_layernorm.weight]
        return LayerWeights(
            input_norm=layer.input_layernorm.weight,
            qkv=self._linear(attention.linear_qkv),
            qk_norm=torch.stack([norm.detach() for norm in norms]),
            output=self._linear(attention.linear_proj),
            mlp_norm=layer.pre_mlp_layernorm.weight,
            router=layer.mlp.router.weight,
            gate_up=self._linear(experts.gate_up),
            down=self._linear(experts.down),
        )

    def _linear(self, module: nn.Module) -> Linear:
        base: Any = module.base if isinstance(module, LoraModule) else module
        weight = base.weight.detach()
        slot = module.slot if isinstance(module, LoraModule) else None
        if slot is None:
            return Linear(weight, None, None)
        *experts, num_outputs, num_inputs = weight.shape
        num_rows = len(slot.down) * slot.rank
        if experts:  # tl.dot wants powers of two from 16 on
            num_down = num_up = max(16, 1 << (num_rows - 1).bit_length())
        else:
            num_down, num_up = -(-num_rows // 32) * 32, -(-num_rows // 8) * 8
        linear = Linear(
            weight,
            weight.new_zeros(*experts, num_down, num_inputs),
            weight.new_zeros(*experts, num_up, num_outputs),
        )
        self._laid_out.append((module, linear))
        return linear


def sizes_of(model_args: ModelArgs, parallel: Parallel) -> Sizes:
    """Of this rank: with more tensor-parallel ranks than key/value heads it has one of them."""
    num_heads = model_args.num_attention_heads // parallel.tp_size
    groups = max(1, model_args.num_key_value_heads // parallel.tp_size)
    num_local_experts = model_args.num_experts // parallel.ep_size
    return Sizes(
        hidden=model_args.hidden_size,
        groups=groups,
        queries=num_heads // groups,
        head_dim=model_args.head_dim,
        num_experts=model_args.num_experts,
        first_expert=parallel.ep_rank * num_local_experts,
        num_local_experts=num_local_experts,
        experts_per_token=model_args.num_experts_per_tok,
        renormalize=model_args.norm_topk_prob,
        eps=model_args.rms_norm_eps,
    )
