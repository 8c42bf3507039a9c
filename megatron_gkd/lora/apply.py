"""Put LoRA beside the decoder's linears: which ones, how they start, what the run says about it."""

import math
import zlib

import torch

from megatron_gkd.lora.adapter import adapter_pieces, adapter_tensors
from megatron_gkd.lora.modules import LoraColumnParallel, LoraGrouped, LoraRowParallel, keep_flags_for_backward
from megatron_gkd.model.config import ModelShape
from megatron_gkd.model.layout import qkv_segments
from megatron_gkd.model.table import decoder_tensors


def apply_lora(model, shape: ModelShape, parallel, *, rank: int, alpha: float, dropout: float, targets: list[str], seed: int) -> None:
    """Wrap the targeted linears of this stage in place. W_up starts at zero, W_down as PEFT starts it (uniform, Kaiming with a = sqrt(5)),
    drawn from (seed, tensor name) alone, so that every parallel layout starts with the same adapter. No collectives.
    """
    settings = dict(rank=rank, alpha=alpha, dropout=dropout)
    qkv = [name for name in ("q_proj", "k_proj", "v_proj") if name in targets]
    gate_up = [name for name in ("gate_proj", "up_proj") if name in targets]
    segments = qkv_segments(shape, parallel.tp_rank, parallel.tp_size)
    for layer in model.decoder.layers:
        attention, experts = layer.self_attention, layer.mlp.experts
        if qkv:
            attention.linear_qkv = LoraColumnParallel(attention.linear_qkv, segments, qkv, tp_group=parallel.groups.tp, **settings)
        if "o_proj" in targets:
            attention.linear_proj = LoraRowParallel(attention.linear_proj, "o_proj", tp_group=parallel.groups.tp, **settings)
        if gate_up:
            experts.gate_up = LoraGrouped(experts.gate_up, ["gate_proj", "up_proj"], gate_up, **settings)
        if "down_proj" in targets:
            experts.down = LoraGrouped(experts.down, ["down_proj"], ["down_proj"], **settings)
    keep_flags_for_backward(model.decoder)
    full_shapes = adapter_tensors(shape, rank, targets)
    for piece in adapter_pieces(model, shape, parallel):
        if ".lora_A." in piece.name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {piece.name}".encode()))  # torch reads 32 bits of a seed
            bound = 1 / math.sqrt(full_shapes[piece.name][1])
            full = torch.empty(full_shapes[piece.name]).uniform_(-bound, bound, generator=generator)
            piece.target.copy_(full[piece.index])


def count_parameters(shape: ModelShape, rank: int, targets: list[str]) -> tuple[int, int]:
    """(trainable, all) parameters of the whole decoder over all ranks: LoRA's r (d_in + d_out) a linear; the base's and those."""
    trainable = sum(math.prod(size) for size in adapter_tensors(shape, rank, targets).values())
    return trainable, trainable + sum(math.prod(size) for size in decoder_tensors(shape).values())


def banner(trainable: int, total: int) -> str:
    """What the user looks for at the start: one model in memory, LoRA on and off, and how little is trained."""
    return (
        "Using shared base model architecture:\n"
        "  - Student model: base_model + LoRA (trainable)\n"
        "  - Teacher model: base_model with LoRA disabled (frozen)\n"
        f"trainable params: {trainable:,} ({100 * trainable / total:.2f}% of {total:,})"
    )
