"""Put LoRA beside the decoder's linears: which ones, how they start, what the run says about it."""

import math
import zlib

import torch
from torch import nn

from megatron_gkd.formats.weight_map import decoder_tensors
from megatron_gkd.lora.adapter import adapter_slices, adapter_tensors, tower_loras, tower_tensors
from megatron_gkd.lora.modules import (
    LoraColumnParallel,
    LoraGrouped,
    LoraHead,
    LoraLinear,
    LoraRowParallel,
    keep_flags_for_backward,
)
from megatron_gkd.lora.targets import HEAD, resolve_targets
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.qkv_layout import qkv_segments

# Attention and MLP of a tower's layers, by their place in a layer.
_TOWER_LINEARS = {
    "audio_tower.layers": (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "fc1",
        "fc2",
    ),
    "visual.blocks": ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"),
}


def apply_lora(
    model,
    model_args: ModelArgs,
    parallel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    seed: int,
    towers: bool = False,
) -> None:
    """Wrap the targeted linears of this stage's decoder in place (the lm_head gets a module beside
    it), and with `towers` those of `model.towers`. W_up starts at zero, W_down as PEFT starts it
    (uniform, Kaiming with a = sqrt(5)), drawn from (seed, tensor name) alone, so that every
    parallel layout starts with the same adapter. No collectives.
    """
    settings = dict(rank=rank, alpha=alpha, dropout=dropout)
    qkv = [name for name in ("q_proj", "k_proj", "v_proj") if name in targets]
    gate_up = [name for name in ("gate_proj", "up_proj") if name in targets]
    segments = qkv_segments(model_args, parallel.tp_rank, parallel.tp_size)
    for layer in model.decoder.layers:
        attention, experts = layer.self_attention, layer.mlp.experts
        if qkv:
            attention.linear_qkv = LoraColumnParallel(
                attention.linear_qkv, segments, qkv, tp_group=parallel.groups.tp, **settings
            )
        if "o_proj" in targets:
            attention.linear_proj = LoraRowParallel(
                attention.linear_proj, "o_proj", tp_group=parallel.groups.tp, **settings
            )
        if gate_up:
            experts.gate_up = LoraGrouped(
                experts.gate_up, ["gate_proj", "up_proj"], gate_up, **settings
            )
        if "down_proj" in targets:
            experts.down = LoraGrouped(experts.down, ["down_proj"], ["down_proj"], **settings)
    keep_flags_for_backward(model.decoder)
    model.lora_targets = resolve_targets(targets)  # of all stages
    if HEAD in targets and parallel.is_last_stage:
        model.head_lora = LoraHead(
            model.output_layer, sequence_parallel=parallel.tp_size > 1, **settings
        )
    if towers and model.towers is not None:
        _wrap_towers(model.towers, sequence_parallel=parallel.tp_size > 1, **settings)
    full_shapes = adapter_tensors(model_args, rank, targets) | tower_tensors(model)
    for part in adapter_slices(model, model_args, parallel):
        name = part.stored.name
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(
                zlib.crc32(f"{seed} {name}".encode())
            )  # torch reads 32 bits of a seed
            bound = 1 / math.sqrt(full_shapes[name][1])
            full = torch.empty(full_shapes[name]).uniform_(-bound, bound, generator=generator)
            part.view.copy_(full[part.stored.index])


def _wrap_towers(towers: nn.Module, **settings) -> None:
    for layers, names in _TOWER_LINEARS.items():
        tower, inner = layers.split(".")
        for layer in getattr(getattr(towers, tower), inner):
            for name in names:
                parent, _, last = name.rpartition(".")
                owner = layer.get_submodule(parent)
                setattr(owner, last, LoraLinear(getattr(owner, last), last, **settings))


def count_parameters(
    model_args: ModelArgs, rank: int, targets: list[str], model=None
) -> tuple[int, int]:
    """(trainable, all) parameters of the whole decoder over all ranks: LoRA's r (d_in + d_out) a
    linear; the base's and those.

    model: the first stage; where its towers carry LoRA, that counts, and so do they.
    """
    sizes = adapter_tensors(model_args, rank, targets) | (
        tower_tensors(model) if model is not None else {}
    )
    trainable = sum(math.prod(size) for size in sizes.values())
    frozen = sum(math.prod(size) for size in decoder_tensors(model_args).values())
    if model is not None and tower_loras(model):
        frozen += sum(
            parameter.numel()
            for parameter in model.towers.parameters()
            if not parameter.requires_grad
        )
    return trainable, trainable + frozen


def banner(trainable: int, total: int) -> str:
    """What the user looks for at the start: one model in memory, LoRA on and off, and how little is
    trained.
    """
    return (
        "Using shared base model architecture:\n"
        "  - Student model: base_model + LoRA (trainable)\n"
        "  - Teacher model: base_model with LoRA disabled (frozen)\n"
        f"trainable params: {trainable:,} ({100 * trainable / total:.2f}% of {total:,})"
    )
