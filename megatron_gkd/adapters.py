"""The adapters of a run: what the student's LoRA starts from and how large it is, decided by flags,
an adapter or a checkpoint, and the teacher's; both put on the model.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from megatron_gkd.checkpoint import TEACHER_FOLDER, check_whole, find_checkpoint, latest_of_rank_0
from megatron_gkd.config import Config, flag_targets
from megatron_gkd.lora.adapter import applied
from megatron_gkd.lora.apply import (
    apply_lora,
    banner,
    count_parameters,
    num_teacher_parameters,
)
from megatron_gkd.lora.average import add_average
from megatron_gkd.lora.load import load_adapter, load_teacher
from megatron_gkd.lora.peft_config import TENSORS
from megatron_gkd.lora.peft_folder import PeftAdapter, merge_only_message
from megatron_gkd.lora.slots import TEACHER
from megatron_gkd.lora_settings import LoraConfig, scale_divisor
from megatron_gkd.lora_targets import (
    HEAD,
    describe_targets,
    is_expression,
    parse_layers,
    resolve_targets,
    tower_paths,
)
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.parallel import Parallel, agreed, log_rank_0


def resolve(
    config: Config, model_args: ModelArgs, parallel: Parallel, *, has_media: bool = True
) -> tuple[Config, PeftAdapter | None, Path | None]:
    """(the settings with what an adapter, a checkpoint or the machine decides filled in, the
    adapter to start from, the checkpoint to resume), both checked against their manifest.
    Collectives: for `latest` those of `latest_of_rank_0`, else those of `agreed` and `check_whole`.
    """
    resume_folder = None
    if config.run.resume_from_checkpoint == "latest":
        resume_folder = latest_of_rank_0(config.run.output_dir, parallel)
        if resume_folder is None:
            log_rank_0(
                parallel,
                f"--resume_from_checkpoint latest: no checkpoint in {config.run.output_dir} yet, "
                "starting at step 0",
            )
    elif config.run.resume_from_checkpoint:
        with agreed(parallel.device, ""):
            named = config.run.resume_from_checkpoint
            resume_folder = find_checkpoint(named, config.run.output_dir)
        if resume_folder:
            check_whole(resume_folder, None, parallel, "--resume_from_checkpoint")
    elif config.lora.adapter:
        check_whole(Path(config.lora.adapter), [TENSORS], parallel, "--adapter")
    source = resume_folder or config.lora.adapter
    adapter = None
    if source:
        with named_by_flag("resume_from_checkpoint" if resume_folder else "adapter"):
            adapter = PeftAdapter(source, model_args)
    if adapter and adapter.towers and not config.lora.lora_towers:
        what = (
            f"{source}: has LoRA on {len(adapter.towers)} linears of the towers "
            f"({adapter.towers[0]}, ...)"
        )
        if has_media:
            raise ValueError(f"{what}; add --lora_towers")
        log_rank_0(
            parallel,
            f"Note: {what}, which text does not reach: it is left out here and in what this run "
            "saves",
        )
    if adapter and adapter.outside:
        log_rank_0(
            parallel,
            f"Note: {source}: {len(adapter.outside)} tensors of "
            f"{model_args.family.other_models_title} "
            f"({adapter.outside[0]}, ...) are left out here and in what this run saves",
        )
    if adapter:
        check_trainable_linears(adapter, model_args, parallel, has_media=has_media)
    rank = config.lora.lora_rank or (adapter.rank if adapter else 8)
    use_rslora = config.lora.use_rslora or bool(adapter and adapter.use_rslora)
    alpha = config.lora.lora_alpha or 16.0
    if adapter and not config.lora.lora_alpha:  # at its own rank exactly its own
        of_adapter = scale_divisor(adapter.rank, adapter.use_rslora)
        alpha = adapter.stated_alpha * (scale_divisor(rank, use_rslora) / of_adapter)
    targets = _targets(config.lora, model_args, parallel, adapter)
    if HEAD in targets and model_args.tie_word_embeddings:
        raise ValueError(
            f"--lora_target_modules {','.join(targets)}: the {HEAD} of this model is its embedding "
            f"(tie_word_embeddings), on which LoRA would change both; leave {HEAD} out"
        )
    resolved = replace(
        config,
        model=replace(config.model, device="cuda" if parallel.device.type == "cuda" else "cpu"),
        lora=replace(
            config.lora,
            lora_rank=rank,
            lora_alpha=alpha,
            use_rslora=use_rslora,
            lora_target_modules=targets,
        ),
        run=replace(
            config.run, resume_from_checkpoint=str(resume_folder) if resume_folder else None
        ),
    )
    return resolved, adapter, resume_folder


def _targets(
    lora: LoraConfig, model_args: ModelArgs, parallel: Parallel, adapter: PeftAdapter | None
) -> list[str]:
    """The linears of the student's LoRA: by the flags, or the adapter's."""
    words = lora.lora_target_modules
    if words or not adapter:
        targets = flag_targets(lora, model_args)
    else:
        layers = parse_layers(lora.lora_layers, model_args.num_layers) if lora.lora_layers else None
        targets = resolve_targets(adapter.targets, model_args, layers) if adapter.targets else []
    if not targets:
        raise ValueError(
            f"--lora_layers {' '.join(lora.lora_layers) or '(all)'} leaves the decoder no linear "
            "with LoRA, which is what is trained; name others, or --lora_target_modules"
        )
    if is_expression(words):
        expression = re.compile(words[0])
        in_towers = [
            path for path in tower_paths(model_args, ends=False) if expression.fullmatch(path)
        ]
        log_rank_0(parallel, f"--lora_target_modules {words[0]}: {describe_targets(targets)}")
        if in_towers:
            done = "all their linears carry LoRA" if lora.lora_towers else "they stay frozen"
            log_rank_0(
                parallel,
                f"Note: it matches linears of the towers too ({in_towers[0]}, ...), which "
                f"--lora_towers alone decides on: {done}",
            )
    return targets


def check_trainable_linears(
    adapter: PeftAdapter,
    model_args: ModelArgs,
    parallel: Parallel,
    *,
    has_media: bool,
    may_be_merged: bool = True,
) -> None:
    """Raise ValueError for LoRA on linears that can only be merged; that of the towers' ends is
    left out, with a note, where text alone is trained. may_be_merged: False for a teacher's, which
    would change the student's base.
    """
    in_towers = tuple(f"{tower.name}." for tower in model_args.family.towers)
    merge_only = adapter.merge_only
    if not has_media and in_towers:
        idle = [linear for linear in merge_only if linear.startswith(in_towers)]
        merge_only = [linear for linear in merge_only if linear not in idle]
        if idle:
            log_rank_0(
                parallel,
                f"Note: {adapter.folder}: has LoRA on {len(idle)} linears at the towers' ends "
                f"({idle[0]}, ...), which text does not reach: it is left out",
            )
    if merge_only:
        raise ValueError(merge_only_message(adapter, merge_only, may_be_merged))


@contextmanager
def named_by_flag(flag: str) -> Iterator[None]:
    """Prefixes errors about a folder with the flag that named it."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"--{flag} {error}") from error


def open_teacher(
    config: Config, model_args: ModelArgs, parallel: Parallel, *, has_media: bool
) -> PeftAdapter | None:
    """The adapter of --teacher_adapter, if it is set. Raises FileNotFoundError or ValueError naming
    the flag, where the folder is missing, damaged or does not fit the model. Collectives: those of
    `check_whole`.
    """
    folder = config.distill.teacher_adapter
    if folder is None:
        return None
    check_whole(Path(folder), [TENSORS], parallel, "--teacher_adapter")
    with named_by_flag("teacher_adapter"):
        adapter = PeftAdapter(folder, model_args)
        check_trainable_linears(
            adapter, model_args, parallel, has_media=has_media, may_be_merged=False
        )
        if HEAD in adapter.targets and model_args.tie_word_embeddings:
            raise ValueError(
                f"{folder}: has LoRA on the {HEAD}, which is the embedding of this model "
                "(tie_word_embeddings): what it computes depends on whether it was merged; use an "
                f"adapter without {HEAD}"
            )
        if not adapter.targets and not (has_media and adapter.towers):
            raise ValueError(
                f"{folder}: has LoRA on the towers alone, which text does not reach, so that the "
                "teacher would be the base model: leave the flag out, or give another adapter"
            )
        if not adapter.is_trained:
            raise ValueError(
                f"{folder}: its update is zero (LoRA starts so), and the teacher would be the base "
                "model: leave the flag out, or give an adapter that was trained"
            )
    if adapter.towers and not has_media:
        log_rank_0(
            parallel,
            f"Note: {folder}: has LoRA on {len(adapter.towers)} linears of the towers "
            f"({adapter.towers[0]}, ...), which text does not reach: it is left out",
        )
    if adapter.outside:
        log_rank_0(
            parallel,
            f"Note: {folder}: {len(adapter.outside)} tensors of "
            f"{model_args.family.other_models_title} "
            f"({adapter.outside[0]}, ...) are left out",
        )
    return adapter


def add_lora(
    model: torch.nn.Module,
    config: Config,
    model_args: ModelArgs,
    parallel: Parallel,
    adapter: PeftAdapter | None,
) -> None:
    """LoRA on the decoder and, with --lora_towers, on the towers: fresh, or with the weights of
    `adapter` (--adapter, or the checkpoint that is resumed); linears that it lacks start fresh.
    Raises ValueError where they do not fit.
    """
    lora = config.lora
    rank, targets = lora.rank, lora.lora_target_modules
    apply_lora(
        model,
        model_args,
        parallel,
        rank=rank,
        alpha=lora.plain_alpha,
        dropout=lora.lora_dropout,
        targets=targets,
        seed=config.train.seed,
        towers=lora.lora_towers,
    )
    applied(model)  # raises where no linear of this stage carries LoRA
    if adapter:
        load_adapter(model, model_args, parallel, adapter)
        line = f"LoRA from {adapter.folder} (rank {adapter.rank}" + (
            f", continued at rank {rank})" if rank != adapter.rank else ")"
        )
        if not config.run.resume_from_checkpoint:  # otherwise `resume` says how the run goes on
            line += (
                f": alpha {adapter.stated_alpha:g} -> {lora.alpha:g}. The function is unchanged; "
                "the optimizer starts anew at step 0"
            )
        log_rank_0(parallel, line)
        for note in adapter_notes(adapter):
            log_rank_0(parallel, note)


def add_teacher(
    model: torch.nn.Module,
    config: Config,
    model_args: ModelArgs,
    parallel: Parallel,
    adapter: PeftAdapter | None,
    resume_folder: Path | None,
) -> None:
    """The teacher's LoRA beside the student's, if it has any: `adapter`, frozen, or one that
    follows the student's, from --teacher_start or the checkpoint that is resumed. Raises ValueError
    where it does not fit.
    """
    if adapter:
        with named_by_flag("teacher_adapter"):
            load_teacher(model, model_args, parallel, adapter)
    if not config.distill.teacher_follows:
        return
    start = config.distill.teacher_start
    saved = resume_folder / TEACHER_FOLDER if resume_folder else None
    has_saved = saved is not None and saved.is_dir()
    # what a saved teacher lacks, ranks or linears, did nothing: W_up is zero there
    add_average(model, model_args, parallel, from_base=start == "base" or has_saved)
    if saved and has_saved:
        load_adapter(model, model_args, parallel, PeftAdapter(saved, model_args), slot=TEACHER)
    elif saved:
        log_rank_0(
            parallel,
            f"Note: {resume_folder} has no {TEACHER_FOLDER}/, the run that wrote it had no teacher "
            f"that follows the student: this one's starts from the {start}",
        )


def adapter_notes(adapter: PeftAdapter) -> list[str]:
    """In what the gradient here is not PEFT's, for adapters that this backend lays out in another
    way.
    """
    notes = []
    if not adapter.one_scale:
        notes.append(
            "Note: its linears have several alpha / r; W_up absorbs them, so gradient norm and "
            "updates are those of one alpha / r for all"
        )
    if adapter.shares_downs:
        notes.append(
            "Note: gate_proj and up_proj share one W_down in it; here each has its own, and the "
            "gradient norm counts both"
        )
    if adapter.in_old_order:
        notes.append(
            "Note: its LoRA on fused experts is in the order of peft before 0.19.1 and read so; "
            "what this run saves is in today's"
        )
    return notes


def count_lora(
    model: torch.nn.Module, model_args: ModelArgs, parallel: Parallel, teacher_lora: str | None
) -> dict[str, int]:
    """Trainable and all parameters of the whole model, and those of the teacher's LoRA, for
    run.json; rank 0 prints them. teacher_lora: what it is, if there is any.
    """
    rank, _, targets = applied(model)
    trainable, total = count_parameters(model_args, rank, targets, model)
    num_parameters = {"trainable": trainable, "total": total}
    if teacher_lora:
        num_parameters["teacher_adapter"] = num_teacher_parameters(model_args, model)
    log_rank_0(parallel, banner(**num_parameters, teacher_lora=teacher_lora))
    return num_parameters
