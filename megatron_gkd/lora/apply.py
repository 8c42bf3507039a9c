"""Put LoRA beside the decoder's linears: which ones, how they start, what the run says about it."""

import math
import zlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from megatron_gkd.families import Family
from megatron_gkd.formats.weight_map import decoder_tensors
from megatron_gkd.lora.adapter import (
    Applied,
    adapter_slices,
    adapter_tensors,
    applied,
    tower_loras,
    tower_tensors,
)
from megatron_gkd.lora.grouped import DOWN, GATE_UP, LoraGrouped, num_columns
from megatron_gkd.lora.modules import (
    LoraColumnParallel,
    LoraHead,
    LoraLinear,
    LoraRowParallel,
)
from megatron_gkd.lora.slots import STUDENT, TEACHER, LoraModule, keep_active_for_backward
from megatron_gkd.lora_targets import HEAD, targets_in
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.qkv_layout import num_shared_rows, qkv_segments
from megatron_gkd.parallel import Parallel


def apply_lora(
    model: Any,
    model_args: ModelArgs,
    parallel: Parallel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    seed: int,
    towers: bool = False,
) -> None:
    """Give the model the LoRA that is trained, the student's; with `towers` on every linear of
    `model.towers` that can carry it. W_up starts at zero, W_down as PEFT starts it (uniform,
    Kaiming with a = sqrt(5)), drawn from (seed, tensor name) alone, so that every parallel layout
    starts with the same adapter. No collectives.
    """
    add_slot(
        model,
        model_args,
        parallel,
        STUDENT,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=targets,
        towers=tower_linears(model.towers, model_args.family) if towers else (),
    )
    full_shapes = adapter_tensors(model_args, rank, targets) | tower_tensors(model, model_args)
    for part in adapter_slices(model, model_args, parallel):
        name = part.stored.name
        if ".lora_A." in name:
            # torch reads 32 bits of a seed
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            bound = 1 / math.sqrt(full_shapes[name][1])
            full = torch.empty(full_shapes[name]).uniform_(-bound, bound, generator=generator)
            part.view.copy_(full[part.stored.index])


def add_slot(
    model: Any,
    model_args: ModelArgs,
    parallel: Parallel,
    slot: str,
    *,
    rank: int,
    alpha: float,
    targets: list[str],
    towers: Collection[str] = (),
    dropout: float = 0.0,
) -> None:
    """Add the slot `slot`, all of its matrices zero, to the targeted linears of this stage's
    decoder, and to those of its towers that `towers` names. A linear that carries no LoRA yet is
    wrapped in place; the lm_head gets a module beside it. No collectives.
    """
    if not hasattr(model, "applied_lora"):
        model.applied_lora = {}
        keep_active_for_backward(model.decoder)
    model.applied_lora[slot] = Applied(rank, alpha / rank, targets)

    def add(module: LoraModule, names: Sequence[str]) -> None:
        module.add_slot(slot, names, rank=rank, alpha=alpha, dropout=dropout)

    segments = qkv_segments(model_args, parallel.tp_rank, parallel.tp_size)
    sequence_parallel = parallel.tp_size > 1
    sharded: dict[str, Any] = dict(salt=parallel.part)
    dense = sharded | dict(tp_group=parallel.groups.tp)
    for layer in model.decoder.layers:
        attention, experts = layer.self_attention, layer.mlp.experts
        names = targets_in(targets, layer.layer_number - 1)
        qkv = [name for name in ("q_proj", "k_proj", "v_proj") if name in names]
        gate_up = [name for name in GATE_UP if name in names]
        if qkv:
            num_shared = num_shared_rows(model_args, parallel.tp_size)
            more = dict(num_shared_rows=num_shared, **dense)
            add(_wrap(attention, "linear_qkv", LoraColumnParallel, segments, **more), qkv)
        if "o_proj" in names:
            add(_wrap(attention, "linear_proj", LoraRowParallel, **dense), ["o_proj"])
        if gate_up:
            add(_wrap(experts, "gate_up", LoraGrouped, GATE_UP, **sharded), gate_up)
        if "down_proj" in names:
            add(_wrap(experts, "down", LoraGrouped, DOWN, **sharded), DOWN)
    if HEAD in targets and parallel.is_last_stage:
        if getattr(model, "head_lora", None) is None:
            num_rows, hidden_size = model.output_layer.weight.shape
            model.head_lora = LoraHead(
                num_rows, hidden_size, sequence_parallel=sequence_parallel, salt=parallel.cp_rank
            )
        add(model.head_lora, [HEAD])
    for linear in towers if model.towers is not None else ():
        parent, _, name = linear.rpartition(".")
        owner = model.towers.get_submodule(parent)
        add(_wrap(owner, name, LoraLinear, sequence_parallel=sequence_parallel), [name])


def _wrap(
    owner: nn.Module, name: str, kind: type[LoraModule], *arguments: Any, **settings: Any
) -> LoraModule:
    """The LoRA module at `owner.name`, put around the linear that is there if it is not one yet."""
    module = getattr(owner, name)
    if not isinstance(module, LoraModule):
        module = kind(module, *arguments, **settings)
        setattr(owner, name, module)
    return module


def tower_linears(towers: nn.Module | None, family: Family) -> list[str]:
    """Every linear of the towers that can carry LoRA, by name ("audio_tower.layers.0.fc1")."""
    found = []
    for tower in family.towers:
        module = getattr(towers, tower.name, None)
        for i in range(len(getattr(module, tower.layers)) if module is not None else 0):
            found += [f"{tower.name}.{tower.layers}.{i}.{name}" for name in tower.lora_linears]
    return found


def expert_columns(
    adapters: Iterable[tuple[int, Sequence[str]]], num_layers: int
) -> list[tuple[int, int]]:
    """The columns that adapters of these ranks and targets take behind the weights of the experts'
    gate_up and down, of every decoder layer.
    """
    columns = [(0, 0)] * num_layers
    for rank, targets in adapters:
        for layer, (gate_up, down) in enumerate(columns):
            names = targets_in(targets, layer)
            gate_up += num_columns(GATE_UP, rank, names)
            columns[layer] = gate_up, down + num_columns(DOWN, rank, names)
    return columns


def num_adapter_parameters(
    model_args: ModelArgs,
    rank: int,
    targets: list[str],
    model: Any = None,
    slot: str = STUDENT,
) -> int:
    """Parameters of one adapter over all ranks, r (d_in + d_out) a linear. model: the first stage,
    whose towers may carry LoRA in `slot`.
    """
    sizes = adapter_tensors(model_args, rank, targets)
    if model is not None:
        sizes |= tower_tensors(model, model_args, slot)
    return sum(math.prod(size) for size in sizes.values())


def num_teacher_parameters(model_args: ModelArgs, model: Any) -> int:
    """Parameters of the teacher's own adapter over all ranks; 0 where the teacher is the base
    alone. model: the first stage.
    """
    if TEACHER not in getattr(model, "applied_lora", {}):
        return 0
    rank, _, targets = applied(model, TEACHER)
    return num_adapter_parameters(model_args, rank, targets, model, TEACHER)


def count_parameters(
    model_args: ModelArgs, rank: int, targets: list[str], model: Any = None
) -> tuple[int, int]:
    """(trainable, all) parameters of the whole decoder over all ranks: the student's LoRA; that,
    the base and the teacher's adapter together.

    model: the first stage; where its towers carry LoRA, they count too.
    """
    trainable = num_adapter_parameters(model_args, rank, targets, model)
    frozen = sum(math.prod(size) for size in decoder_tensors(model_args).values())
    if model is not None:
        frozen += num_teacher_parameters(model_args, model)
        if tower_loras(model) or tower_loras(model, TEACHER):
            frozen += sum(
                parameter.numel()
                for name, parameter in model.towers.named_parameters()
                if ".slots." not in name
            )
    return trainable, trainable + frozen


def banner(
    trainable: int, total: int, teacher_adapter: int = 0, teacher_lora: str | None = None
) -> str:
    """What the user looks for at the start: one model in memory, what the student and the teacher
    make of it, and how little is trained. teacher_lora: what LoRA the teacher has, if any, of
    `teacher_adapter` parameters.
    """
    teacher = "base_model with LoRA disabled (frozen)"
    if teacher_lora:
        teacher = f"base_model + {teacher_lora} ({teacher_adapter:,} parameters)"
    return (
        "Using shared base model architecture:\n"
        "  - Student model: base_model + LoRA (trainable)\n"
        f"  - Teacher model: {teacher}\n"
        f"trainable params: {trainable:,} ({100 * trainable / total:.2f}% of {total:,})"
    )
