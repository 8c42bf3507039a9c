"""A PEFT adapter into a slot of the model: the student's to go on from, or the teacher's."""

from typing import Any

from megatron_gkd.lora.adapter import adapter_slices, applied, tower_tensors
from megatron_gkd.lora.apply import add_slot, tower_linears
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.lora.slots import STUDENT, TEACHER
from megatron_gkd.lora_targets import describe_targets, missing_targets
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.parallel import Parallel


def load_adapter(
    model: Any,
    model_args: ModelArgs,
    parallel: Parallel,
    adapter: PeftAdapter,
    *,
    slot: str = STUDENT,
) -> None:
    """Set the parameters of `slot` on this stage to `adapter`, so that the model computes the same
    function as with PEFT.

    W_up absorbs a scale that is not the run's. Where the run has a larger rank than the whole
    adapter, W_up gets zero columns and W_down keeps the fresh rows it started with: they will
    learn. A linear of lower rank than the others (rank_pattern) is padded with zeros on both sides:
    these have no gradient, there is nothing for PEFT either. Linears that the adapter has nothing
    of keep their start and will learn.

    Raises ValueError for a larger rank, a target that has no LoRA here, or another base. No
    collectives.
    """
    rank, scale, targets = applied(model, slot)
    if adapter.rank > rank:
        raise ValueError(
            f"{adapter.folder}: rank {adapter.rank} does not fit into --lora_rank {rank}; "
            "raise --lora_rank, or leave it out"
        )
    absent = missing_targets(adapter.targets, targets, model_args.num_layers)
    if absent:
        raise ValueError(
            f"{adapter.folder}: has LoRA on {describe_targets(absent)}, and --lora_target_modules "
            f"and --lora_layers ask for {describe_targets(targets)}: add it, or leave them out"
        )
    _check_base(model, model_args, parallel, adapter)
    in_towers = tower_tensors(model, model_args, slot)
    for part in adapter_slices(model, model_args, parallel, slot):
        name, (rows, columns) = part.stored.name, part.stored.index
        if name not in adapter:
            continue
        values, own_scale = adapter.tensor(name)
        is_up = ".lora_B." in name
        side = 0 if is_up else 1
        if name in in_towers and values.shape[side] != in_towers[name][side]:
            raise ValueError(
                f"{adapter.path}: {name} is {list(values.shape)}, "
                f"this model's tower has {list(in_towers[name])}"
            )
        own_rank = values.shape[1] if is_up else values.shape[0]
        if is_up:
            part.view.zero_()
            part.view[:, :own_rank].copy_(values[rows] * (own_scale / scale))
        else:
            part.view[:own_rank].copy_(values[:, columns])
            if rank == adapter.rank:
                part.view[own_rank:].zero_()


def load_teacher(
    model: Any, model_args: ModelArgs, parallel: Parallel, adapter: PeftAdapter
) -> None:
    """Make the teacher the base with `adapter`, frozen in a slot of its own; its LoRA on towers
    that were not built is left out.

    Raises ValueError for another base, or towers of other sizes. No collectives.
    """
    built = tower_linears(model.towers, model_args.family)
    add_slot(
        model,
        model_args,
        parallel,
        TEACHER,
        rank=adapter.rank,
        alpha=adapter.alpha,
        targets=adapter.targets,
        towers=[linear for linear in adapter.towers if linear in built],
    )
    load_adapter(model, model_args, parallel, adapter, slot=TEACHER)


def _check_base(
    model: Any, model_args: ModelArgs, parallel: Parallel, adapter: PeftAdapter
) -> None:
    held = (
        {"embed_tokens": model.embedding.word_embeddings.weight} if parallel.is_first_stage else {}
    )
    held |= {"lm_head": model.output_layer.weight} if parallel.is_last_stage else {}
    for name, weight in held.items():
        first = parallel.tp_rank * len(weight)
        num_rows = min(max(model_args.vocab_size - first, 0), len(weight))  # the rest is padding
        adapter.check_base(name, slice(first, first + num_rows), weight[:num_rows].detach())
