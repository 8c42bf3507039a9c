"""What a run is made of: data, model with LoRA, optimizer, sampler; built from the settings, each with a line on the screen."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_gkd.checkpoint import find_checkpoint
from megatron_gkd.config import Config
from megatron_gkd.data import load_datasets
from megatron_gkd.forward import LossSettings
from megatron_gkd.lora.adapter import applied
from megatron_gkd.lora.apply import apply_lora, banner, count_parameters
from megatron_gkd.lora.peft_folder import PeftAdapter, load_adapter
from megatron_gkd.lora.targets import resolve_targets
from megatron_gkd.metrics import package_versions, write_run_json
from megatron_gkd.model.config import DTYPES, ModelShape
from megatron_gkd.model.decoder import build_decoder, core_attention
from megatron_gkd.model.experts import grouped_linear
from megatron_gkd.model.weights import load_weights
from megatron_gkd.optimizer import Optimizer
from megatron_gkd.parallel import Parallel, say
from megatron_gkd.rollout.backend import MegatronRollout
from megatron_gkd.rollout.stop_tokens import read_stop_token_ids


@dataclass
class Parts:
    """What a run is made of. `model` is this rank's stage of the decoder, `ddp` the same in megatron-core's gradient reducer."""

    shape: ModelShape
    model: torch.nn.Module
    ddp: DistributedDataParallel
    optimizer: Optimizer
    loss: LossSettings
    alpha: float
    resume_folder: Path | None


def build(config: Config, shape: ModelShape, parallel: Parallel) -> Parts:
    """Model from the folder, LoRA (fresh, from --adapter or from a checkpoint), optimizer. Raises ValueError or FileNotFoundError."""
    dtype = DTYPES[config.model.torch_dtype]
    attention = core_attention(config.model.attn_impl, parallel.device)
    experts = grouped_linear(config.model.experts_impl, parallel.device)
    say(parallel, f"Attention: {attention.__name__}; experts: {experts.__name__}; base model in {config.model.torch_dtype} on {parallel.device.type}")
    model = build_decoder(
        shape,
        parallel,
        dtype,
        attn_impl=config.model.attn_impl,
        experts_impl=config.model.experts_impl,
        recompute=config.model.recompute == "full",
    )
    started = time.perf_counter()
    num_bytes = load_weights(model, shape, parallel, config.model.model)
    say(parallel, f"Read {num_bytes / 2**30:.2f} GiB of {config.model.model} on this rank in {time.perf_counter() - started:.1f} s")

    resume_folder = None
    if config.run.resume_from_checkpoint:
        resume_folder = find_checkpoint(config.run.resume_from_checkpoint, config.run.output_dir)
        if resume_folder is None:
            say(parallel, f"--resume_from_checkpoint latest: no checkpoint in {config.run.output_dir} yet, starting at step 0")
    source = resume_folder or config.lora.adapter
    adapter = PeftAdapter(source, shape) if source else None
    rank = config.lora.lora_rank or (adapter.rank if adapter else 8)
    alpha = config.lora.lora_alpha or (adapter.alpha * (rank / adapter.rank) if adapter else 16.0)
    targets = resolve_targets(config.lora.lora_target_modules or (adapter.targets if adapter else ["ALL"]))
    apply_lora(model, shape, parallel, rank=rank, alpha=alpha, dropout=config.lora.lora_dropout, targets=targets, seed=config.train.seed)
    applied(model)  # raises where no linear of this stage carries LoRA
    if adapter:
        load_adapter(model, shape, parallel, adapter)
        say(parallel, f"LoRA from {source} (rank {adapter.rank}" + (f", continued at rank {rank})" if rank != adapter.rank else ")"))
    trainable, total = count_parameters(shape, rank, targets)
    say(parallel, banner(trainable, total))
    say(parallel, f"Loss: {config.distill.mixture_line()}")

    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False)
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
    divergence, beta = config.distill.mixture
    loss = LossSettings(divergence, beta, config.distill.temperature, config.distill.sft_alpha, shape.vocab_size)
    if parallel.rank == 0:
        layout = {"world_size": parallel.world_size, "tp": parallel.tp_size, "pp": parallel.pp_size, "dp": parallel.dp_size, "ep": parallel.ep_size}
        write_run_json(config.run.output_dir, config.to_dict(), package_versions(), {"trainable": trainable, "total": total}, layout)
    return Parts(shape, model, ddp, optimizer, loss, alpha, resume_folder)


def load_data(config: Config, shape: ModelShape, parallel: Parallel):
    """(train, evaluation or None). Raises DataError for bad rows, ValueError when the run could learn nothing."""
    train_data, eval_data = load_datasets(config.data, config.model.model, shape.vocab_size, config.train.seed)
    say(parallel, f"Data: {train_data.report.summary()}")
    if eval_data:
        say(parallel, f"Evaluation data: {eval_data.report.summary()}")
    distill = config.distill
    has_sft = distill.sft_alpha > 0 and distill.may_use_data_responses
    if not (train_data.report.has_teacher_view or has_sft or distill.allow_zero_signal):
        raise ValueError(
            "nothing to learn: the teacher is the student with LoRA off and sees the same input, so with fresh LoRA the divergence and its "
            "gradient are exactly 0. Give the teacher more to see (teacher_messages or teacher_prompt in the data rows), or set "
            "--sft_alpha above 0 (it counts on the data set's own responses: --lmbda below 1, no --seq_kd); --allow_zero_signal runs it "
            "all the same"
        )
    return train_data, eval_data


def make_rollout(config: Config, shape: ModelShape, parallel: Parallel, pad_token_id: int, teacher_writes: bool = False) -> MegatronRollout | None:
    """The sampler of on-policy steps, or of the teacher's under --seq_kd; None where the run never needs it."""
    distill, rollout = config.distill, config.rollout
    needed = distill.seq_kd if teacher_writes else distill.may_be_on_policy
    if not needed:
        return None
    eos_token_ids = read_stop_token_ids(config.model.model)
    if not eos_token_ids:
        say(parallel, f"Note: nothing in {config.model.model} names an end-of-text token; every response will have --max_completion_length tokens")
    return MegatronRollout(
        shape=shape,
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
