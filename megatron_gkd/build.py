"""What a run is made of: data, model with LoRA, optimizer, sampler; built from the settings, each
with a line on the screen.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_gkd.checkpoint import find_checkpoint
from megatron_gkd.config import Config
from megatron_gkd.data import load_datasets
from megatron_gkd.data.chat import read_stop_token_ids
from megatron_gkd.data.dataset import DataReport
from megatron_gkd.formats.loading import load_weights
from megatron_gkd.forward import LossSettings
from megatron_gkd.lora.adapter import applied
from megatron_gkd.lora.apply import apply_lora, banner, count_parameters
from megatron_gkd.lora.peft_folder import PeftAdapter, load_adapter
from megatron_gkd.lora.targets import HEAD, resolve_targets
from megatron_gkd.media.towers import Towers, build_towers
from megatron_gkd.metrics import package_versions, write_run_json
from megatron_gkd.model.args import DTYPES, ModelArgs
from megatron_gkd.model.decoder import build_decoder, core_attention
from megatron_gkd.model.experts import grouped_linear
from megatron_gkd.optimizer import Optimizer
from megatron_gkd.parallel import Parallel, all_gather_objects, log_rank_0
from megatron_gkd.rollout.backend import MegatronRollout


@dataclass
class Parts:
    """What a run is made of. `model` is this rank's stage of the decoder, `ddp` the same in
    megatron-core's gradient reducer.
    """

    model_args: ModelArgs
    model: torch.nn.Module
    ddp: DistributedDataParallel
    optimizer: Optimizer
    loss: LossSettings
    alpha: float
    adapter: PeftAdapter | None
    resume_folder: Path | None

    @property
    def towers(self) -> Towers | None:
        """None on later stages and where no row has media."""
        return self.model.towers


def build(
    config: Config,
    model_args: ModelArgs,
    parallel: Parallel,
    *,
    audio: bool = False,
    visual: bool = False,
) -> Parts:
    """Model from the folder, LoRA (fresh, from --adapter or from a checkpoint), optimizer. Raises
    ValueError or FileNotFoundError.

    audio, visual: whether the run has audio, and images or videos; without them their towers are
    not built.
    """
    asked_for = config.lora.lora_target_modules
    config, adapter, resume_folder = resolve(
        config, model_args, parallel, has_media=audio or visual
    )
    lora = config.lora
    log_rank_0(parallel, config.describe())
    dtype = DTYPES[config.model.torch_dtype]
    attention = core_attention(config.model.attn_impl, parallel.device)
    experts = grouped_linear(config.model.experts_impl, parallel.device)
    log_rank_0(
        parallel,
        f"Attention: {attention.__name__}; experts: {experts.__name__}; base model in {config.model.torch_dtype} on {parallel.device.type}",
    )
    model = build_decoder(
        model_args,
        parallel,
        dtype,
        attn_impl=config.model.attn_impl,
        experts_impl=config.model.experts_impl,
        recompute=config.model.recompute == "full",
    )
    started = time.perf_counter()
    num_bytes = load_weights(model, model_args, parallel, config.model.model)
    log_rank_0(
        parallel,
        f"Read {num_bytes / 2**30:.2f} GiB of {config.model.model} on this rank in {time.perf_counter() - started:.1f} s",
    )
    if lora.lora_towers and not (audio or visual):
        raise ValueError(
            "--lora_towers: no row of the data has audio, images or videos, nothing would train the towers; leave it out"
        )
    audio, visual = (
        audio or lora.lora_towers,
        visual or lora.lora_towers,
    )  # an adapter has LoRA on both towers or on none
    model.towers = build_towers(
        config.model.model,
        model_args,
        parallel,
        dtype,
        audio=audio,
        visual=visual,
        attn_impl=config.model.attn_impl,
    )

    rank, alpha, targets = lora.lora_rank, lora.lora_alpha, lora.lora_target_modules
    apply_lora(
        model,
        model_args,
        parallel,
        rank=rank,
        alpha=alpha,
        dropout=lora.lora_dropout,
        targets=targets,
        seed=config.train.seed,
        towers=lora.lora_towers,
    )
    applied(model)  # raises where no linear of this stage carries LoRA
    if adapter:
        load_adapter(model, model_args, parallel, adapter, more_linears=bool(asked_for))
        line = f"LoRA from {adapter.folder} (rank {adapter.rank}" + (
            f", continued at rank {rank})" if rank != adapter.rank else ")"
        )
        if not resume_folder:  # otherwise `resume` says how the run goes on
            line += f": alpha {adapter.alpha:g} -> {alpha:g}. The function is unchanged; the optimizer starts anew at step 0"
        log_rank_0(parallel, line)
        for note in adapter_notes(adapter):
            log_rank_0(parallel, note)
    trainable, total = count_parameters(model_args, rank, targets, model)
    log_rank_0(parallel, banner(trainable, total))
    log_rank_0(parallel, f"Loss: {config.distill.loss_line()}")

    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False
    )
    ddp = DistributedDataParallel(config=model.config, ddp_config=ddp_config, module=model)
    ddp.train()
    train_config = config.train
    optimizer = Optimizer(
        ddp,
        dtype=dtype,
        beta1=train_config.adam_beta1,
        beta2=train_config.adam_beta2,
        epsilon=train_config.adam_epsilon,
        weight_decay=train_config.weight_decay,
        max_grad_norm=train_config.max_grad_norm,
    )
    loss = LossSettings(
        config.distill.loss_divergence, config.distill.sft_alpha, model_args.vocab_size
    )
    if parallel.rank == 0:
        layout = {
            "world_size": parallel.world_size,
            "tp": parallel.tp_size,
            "pp": parallel.pp_size,
            "dp": parallel.dp_size,
            "ep": parallel.ep_size,
        }
        write_run_json(
            config.run.output_dir,
            config.to_dict(),
            package_versions(),
            {"trainable": trainable, "total": total},
            layout,
        )
    return Parts(model_args, model, ddp, optimizer, loss, alpha, adapter, resume_folder)


def adapter_notes(adapter: PeftAdapter) -> list[str]:
    """In what the gradient here is not PEFT's, for adapters that this backend lays out in another
    way.
    """
    notes = []
    if not adapter.one_scale:
        notes.append(
            "Note: its linears have several alpha / r; W_up absorbs them, so gradient norm and updates are those of one alpha / r for all"
        )
    if adapter.shares_downs:
        notes.append(
            "Note: gate_proj and up_proj share one W_down in it; here each has its own, and the gradient norm counts both"
        )
    return notes


def resolve(
    config: Config, model_args: ModelArgs, parallel: Parallel, *, has_media: bool = True
) -> tuple[Config, PeftAdapter | None, Path | None]:
    """(the settings with what an adapter, a checkpoint or the machine decides filled in, the
    adapter to start from, the checkpoint to resume).
    """
    resume_folder = None
    if config.run.resume_from_checkpoint:
        resume_folder = find_checkpoint(config.run.resume_from_checkpoint, config.run.output_dir)
        if resume_folder is None:
            log_rank_0(
                parallel,
                f"--resume_from_checkpoint latest: no checkpoint in {config.run.output_dir} yet, starting at step 0",
            )
    source = resume_folder or config.lora.adapter
    adapter = PeftAdapter(source, model_args) if source else None
    if adapter and adapter.towers and not config.lora.lora_towers:
        what = f"{source}: has LoRA on {len(adapter.towers)} linears of the towers ({adapter.towers[0]}, ...)"
        if has_media:
            raise ValueError(f"{what}; add --lora_towers")
        log_rank_0(
            parallel,
            f"Note: {what}, which text does not reach: it is left out here and in what this run saves",
        )
    if adapter and adapter.outside:
        log_rank_0(
            parallel,
            f"Note: {source}: {len(adapter.outside)} tensors of talker or vocoder ({adapter.outside[0]}, ...) are left out here and in what this run saves",
        )
    rank = config.lora.lora_rank or (adapter.rank if adapter else 8)
    alpha = config.lora.lora_alpha or (adapter.alpha * (rank / adapter.rank) if adapter else 16.0)
    targets = resolve_targets(
        config.lora.lora_target_modules or (adapter.targets if adapter else ["ALL"])
    )
    if HEAD in targets and model_args.tie_word_embeddings:
        raise ValueError(
            f"--lora_target_modules {','.join(targets)}: the {HEAD} of this model is its embedding (tie_word_embeddings), on which LoRA would "
            f"change both; leave {HEAD} out"
        )
    if targets == [HEAD] and parallel.pp_size > 1:
        raise ValueError(
            f"LoRA on {HEAD} alone leaves the stages before the last nothing to train: --pipeline_model_parallel_size "
            f"{parallel.pp_size} must be 1, or name more in --lora_target_modules"
        )
    resolved = replace(
        config,
        model=replace(config.model, device=parallel.device.type),
        lora=replace(config.lora, lora_rank=rank, lora_alpha=alpha, lora_target_modules=targets),
        run=replace(
            config.run, resume_from_checkpoint=str(resume_folder) if resume_folder else None
        ),
    )
    return resolved, adapter, resume_folder


def load_data(config: Config, model_args: ModelArgs, parallel: Parallel):
    """(train, evaluation or None). Raises DataError for bad rows. Collectives: two exchanges of
    folder names.
    """
    train_data, eval_data = load_datasets(
        config.data,
        config.model.model,
        model_args.vocab_size,
        config.train.seed,
        all_gather_objects,
    )
    log_rank_0(parallel, f"Data: {train_data.report.summary()}")
    if eval_data:
        log_rank_0(parallel, f"Evaluation data: {eval_data.report.summary()}")
    return train_data, eval_data


def check_signal(config: Config, report: DataReport, total_steps: int) -> None:
    """Raise ValueError when none of the steps could learn anything."""
    distill = config.distill
    has_sft = distill.sft_alpha > 0 and distill.may_use_data_responses(total_steps)
    if not (report.has_teacher_view or has_sft or distill.allow_zero_signal):
        resumes = config.run.resume_from_checkpoint
        given = config.lora.adapter or (resumes and find_checkpoint(resumes, config.run.output_dir))
        why = (
            f"the divergence can only pull the student from the LoRA of {given} back to the base model"
            if given
            else "with fresh LoRA the divergence and its gradient are exactly 0"
        )
        raise ValueError(
            f"nothing to learn: the teacher is the student with LoRA off and sees the same input, so {why}. Give the teacher more to see "
            "(teacher_messages or teacher_prompt in the data rows), or set --sft_alpha above 0 (it counts on the data set's own responses: "
            "--lmbda below 1, no --seq_kd); --allow_zero_signal runs it all the same"
        )


def make_rollout(
    config: Config,
    model_args: ModelArgs,
    parallel: Parallel,
    pad_token_id: int,
    teacher_writes: bool = False,
) -> MegatronRollout | None:
    """The sampler of on-policy steps, or of the teacher's under --seq_kd; None where the run never
    needs it.
    """
    distill, rollout = config.distill, config.rollout
    needed = distill.seq_kd if teacher_writes else distill.may_be_on_policy
    if not needed:
        return None
    eos_token_ids = read_stop_token_ids(config.model.model)
    if not eos_token_ids:
        log_rank_0(
            parallel,
            f"Note: no file in {config.model.model} that can be read names an end-of-text token; every response will have --max_completion_length tokens",
        )
    return MegatronRollout(
        model_args=model_args,
        parallel=parallel,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
        pad_to_multiple_of=parallel.tp_size,
        seed=config.train.seed,
        max_completion_length=rollout.max_completion_length,
        temperature=rollout.rollout_temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        repetition_penalty=rollout.repetition_penalty,
        teacher_writes=teacher_writes,
    )
