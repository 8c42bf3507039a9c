"""Settings -> `Run`: data, model with LoRA, optimizer, samplers, metrics; each with a line on the
screen.
"""

import os
import time
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_gkd.adapters import add_lora, add_teacher, count_lora, open_teacher, resolve
from megatron_gkd.config import Config, flag_targets, layout_line, workload
from megatron_gkd.data import SampleDataset, load_datasets, num_steps_of_epochs
from megatron_gkd.data.show_row import show_row
from megatron_gkd.device_memory import DeviceMemory, device_name
from megatron_gkd.formats.loading import load_weights
from megatron_gkd.lora.apply import expert_columns
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.media.towers import Towers, build_towers, tower_parameters
from megatron_gkd.memory import check_memory
from megatron_gkd.metrics import Clock
from megatron_gkd.model.args import ModelArgs, read_model_args
from megatron_gkd.model.decoder import build_decoder, core_attention
from megatron_gkd.model.experts import select_kernels as expert_kernels
from megatron_gkd.model.transformer_config import DTYPES
from megatron_gkd.optimizer import Optimizer, in_gradient_reducer
from megatron_gkd.parallel import Parallel, all_gather_objects, log_rank_0
from megatron_gkd.recompute import Recomputation
from megatron_gkd.resume import note_start, resume
from megatron_gkd.rollout.rollout import make_rollout
from megatron_gkd.rollout_log import RolloutLog, num_logged_rollouts, text_decoder
from megatron_gkd.run import Run, eval_budget, largest_micro_batch, packing, step_budget
from megatron_gkd.run_folder import (
    MetricsWriter,
    check_writable,
    package_versions,
    write_run_json,
)
from megatron_gkd.token_loss import LossSettings
from megatron_gkd.trackers import check_installed, open_trackers
from megatron_gkd.zero_signal import check_responses, check_skipped_tokens, check_trainable


def build_run(config: Config, parallel: Parallel) -> Run:
    """Everything that the loop uses, resumed where --resume_from_checkpoint asks for it. Raises
    ValueError or OSError, before any step, for settings, data or files that do not fit.

    Collectives: those of `load_data`.
    """
    model_args, train_data, eval_data = read_data(config, parallel)
    config = with_max_steps(config, len(train_data), parallel)
    mixed = check_responses(config, train_data)
    check_trainable(config, train_data.report)
    if mixed:
        log_rank_0(parallel, mixed)
    check_skipped_tokens(config, train_data)
    kinds = {kind for data in (train_data, eval_data) if data for kind in data.report.num_media}
    audio, visual = "audio" in kinds, bool(kinds - {"audio"})
    config, adapter, resume_folder = resolve(
        config, model_args, parallel, has_media=audio or visual
    )
    teacher = open_teacher(config, model_args, parallel, has_media=audio or visual)
    log_rank_0(parallel, config.describe())
    budget = step_budget(config, model_args)
    packed = packing(train_data.pad_token_id, parallel, config.distill.skip_first_tokens)
    most_tokens = largest_micro_batch(config, train_data, budget, packed, parallel.dp_size)
    memory = DeviceMemory(parallel.device)
    towers = dict(audio=audio, visual=visual)
    prompts = eval_data.report.num_prompts_alone if eval_data else 0
    writes = config.distill.writes_responses or prompts > 0
    num_logged = num_logged_rollouts(config.run.log_rollouts, writes)
    writes = writes or (num_logged > 0 and eval_data is not None)
    written_data = [train_data] + ([eval_data] if eval_data and (prompts or num_logged) else [])
    if parallel.device.type == "cuda":
        check_fits(
            config,
            model_args,
            parallel,
            memory.limit(),
            micro_batch_tokens=most_tokens,
            prompt_tokens=max(int(data.lengths.prompts.max()) for data in written_data),
            writes=writes,
            **towers,
        )
    model = build_base(config, model_args, parallel, teacher=teacher, **towers)
    add_lora(model, config, model_args, parallel, adapter)
    add_teacher(model, config, model_args, parallel, teacher, resume_folder)
    num_parameters = count_lora(model, model_args, parallel, config.distill.teacher_line())
    log_rank_0(parallel, f"Loss: {config.distill.loss_line()}")
    ddp = in_gradient_reducer(model)
    optimizer = build_optimizer(config, ddp)
    if parallel.rank == 0:
        write_description(config, num_parameters, parallel)
    progress = resume(
        config,
        model,
        model_args,
        optimizer,
        parallel,
        adapter,
        resume_folder,
        train_data,
        eval_data,
    )
    trackers = []
    if parallel.rank == 0:
        trackers = open_trackers(
            config.run.report_to, config.run.output_dir, progress.step, config.to_dict()
        )
    writer = MetricsWriter(
        config.run.output_dir,
        config.train.max_steps,
        progress.step,
        enabled=parallel.rank == 0,
        trackers=trackers,
    )
    note_start(config, parallel, resume_folder)
    recomputation = None
    if config.model.recompute == "auto":
        recomputation = Recomputation(model.decoder, parallel, memory, most_tokens)
    changed = config.rollout.changed_sampling()
    if changed and config.distill.may_be_on_policy:
        log_rank_0(
            parallel,
            f"Note: {', '.join(changed)}: on-policy responses are not drawn from the student's own "
            "distribution (docs/recipes.md; off: --rollout_temperature 1 --top_p 1 --top_k 0 "
            "--repetition_penalty 1)",
        )
    rollout = eval_rollout = rollout_log = None
    if writes:
        rollout = make_rollout(
            config.rollout,
            model=model,
            model_args=model_args,
            parallel=parallel,
            data=train_data,
            model_folder=config.model.model,
            budget=budget,
            packing=packed,
            seed=config.train.seed,
            chat_template=config.data.chat_template,
        )
    if rollout and eval_data:
        eval_rollout = rollout.for_evaluation(eval_data, eval_budget(config, model_args))
    if rollout and num_logged:
        rollout_log = RolloutLog(
            number=num_logged,
            decode=text_decoder(config.model.model) if parallel.rank == 0 else None,
            rollout=eval_rollout or rollout,
            train_data=train_data,
            eval_data=eval_data,
            towers=cast(Towers | None, model.towers),
            parallel=parallel,
            seed=config.train.seed,
        )
    if prompts:
        log_rank_0(
            parallel,
            f"Evaluation: {prompts} of {len(eval_data or [])} rows have no response; before each "
            "measurement the student writes it, greedily",
        )
    return Run(
        config=config,
        parallel=parallel,
        model_args=model_args,
        model=model,
        ddp=ddp,
        optimizer=optimizer,
        loss=loss_settings(config, model_args),
        packing=packed,
        budget=budget,
        train_data=train_data,
        eval_data=eval_data,
        rollout=rollout,
        eval_rollout=eval_rollout,
        rollout_log=rollout_log,
        writer=writer,
        progress=progress,
        clock=Clock(parallel.device),
        memory=memory,
        recomputation=recomputation,
    )


def read_data(
    config: Config, parallel: Parallel
) -> tuple[ModelArgs, SampleDataset, SampleDataset | None]:
    """(sizes of the model, training data, evaluation data or None), once it is clear that the
    layout fits the model and that --output_dir is writable. Raises ValueError, OSError or
    DataError; see `load_data`.
    """
    model_args = read_model_args(config.model.model)
    if config.lora.lora_towers and not model_args.family.towers:
        raise ValueError(
            f"--lora_towers: {model_args.family.title} reads text alone and has no towers; "
            "leave it out"
        )
    flag_targets(config.lora, model_args)  # raises before the data are read
    log_rank_0(parallel, layout_line(config, parallel.world_size, model_args))
    if not config.data.check_data:
        check_writable(config.run.output_dir)
        check_installed(config.run.report_to)
    train_data, eval_data = load_data(config, model_args, parallel)
    return model_args, train_data, eval_data


def check_data(config: Config, parallel: Parallel) -> None:
    """--check_data: read the data, every medium too, and print the report. Raises DataError for bad
    rows.
    """
    _, train_data, eval_data = read_data(config, parallel)
    bad = sum(data.report.num_skipped for data in (train_data, eval_data) if data is not None)
    check_responses(with_max_steps(config, len(train_data), parallel), train_data)
    kept = "all others are good" if bad else "every row is good"
    log_rank_0(parallel, f"--check_data: {kept}; no training was asked for")


def print_row(config: Config) -> None:
    """--show_row: print the row. One process does it; of several, rank 0."""
    if os.environ.get("RANK", "0") != "0":
        return
    assert config.data.show_row is not None
    vocab_size = read_model_args(config.model.model).vocab_size
    wanted, seed = config.data.show_row, config.train.seed
    print(show_row(wanted, config.data, config.model.model, vocab_size, seed), flush=True)


def check_fits(
    config: Config,
    model_args: ModelArgs,
    parallel: Parallel,
    available: int,
    *,
    micro_batch_tokens: int,
    prompt_tokens: int,
    writes: bool,
    audio: bool,
    visual: bool,
) -> None:
    """A line on the memory that a rank will need. Raises ValueError naming its parts and the way
    out where it is more than the `available` bytes.

    micro_batch_tokens, prompt_tokens: the most of the data; writes: whether the run writes
    responses, be it for its evaluation; audio, visual: as for `build_base`.
    """
    wanted = (audio or config.lora.lora_towers, visual or config.lora.lora_towers)
    num_parameters = tower_parameters(config.model.model, model_args, *wanted)
    load = workload(
        config,
        model_args,
        micro_batch_tokens=micro_batch_tokens,
        prompt_tokens=prompt_tokens,
        writes=writes,
        tower_bytes=DTYPES[config.model.torch_dtype].itemsize * num_parameters,
    )
    needed = check_memory(model_args, config.parallel, load, available)
    log_rank_0(parallel, f"Memory: about {needed.describe()}")


def with_max_steps(config: Config, num_rows: int, parallel: Parallel) -> Config:
    """The settings with --max_steps filled in, from --num_train_epochs where it is unset."""
    train = config.train
    if train.max_steps >= 0:
        return config
    num_steps = num_steps_of_epochs(
        num_rows, train.global_batch_size(parallel.dp_size), train.num_train_epochs
    )
    return replace(config, train=replace(train, max_steps=num_steps))


def build_base(
    config: Config,
    model_args: ModelArgs,
    parallel: Parallel,
    *,
    audio: bool,
    visual: bool,
    teacher: PeftAdapter | None = None,
) -> torch.nn.Module:
    """This rank's stage of the decoder with the weights of --model, room behind the experts' for
    the run's adapters (the student's and the teacher's), and as `model.towers` the towers that the
    run needs. Raises ValueError or FileNotFoundError.

    audio, visual: whether the data has audio, and images or videos; a tower that nothing uses is
    not built. teacher: the adapter of --teacher_adapter.
    """
    lora = config.lora
    dtype = DTYPES[config.model.torch_dtype]
    adapters = [(lora.rank, lora.lora_target_modules)]
    adapters += [(teacher.rank, teacher.targets)] if teacher else []
    adapters *= 2 if config.distill.teacher_follows else 1
    attention = core_attention(config.model.attn_impl, parallel.device, parallel.cp_size)
    experts = expert_kernels(parallel.device)
    log_rank_0(
        parallel,
        f"Attention: {attention.__name__}; experts: "
        f"{experts.__name__.split('.')[-1]}; base model in "
        f"{config.model.torch_dtype} on {parallel.device.type}",
    )
    model = build_decoder(
        model_args,
        parallel,
        dtype,
        attn_impl=config.model.attn_impl,
        experts_impl=config.model.experts_impl,
        recompute=config.model.recompute != "none",
        spare_columns=expert_columns(adapters, model_args.num_layers),
    )
    started = time.perf_counter()
    num_bytes = load_weights(model, model_args, parallel, config.model.model)
    log_rank_0(
        parallel,
        f"Read {num_bytes / 2**30:.2f} GiB of {config.model.model} on this rank in "
        f"{time.perf_counter() - started:.1f} s",
    )
    if lora.lora_towers and not (audio or visual):
        raise ValueError(
            "--lora_towers: no row of the data has audio, images or videos, nothing would train "
            "the towers; leave it out"
        )
    model.towers = build_towers(
        config.model.model,
        model_args,
        parallel,
        dtype,
        # an adapter has LoRA on both towers or on none
        audio=audio or lora.lora_towers,
        visual=visual or lora.lora_towers,
        attn_impl=config.model.attn_impl,
    )
    return model


def build_optimizer(config: Config, ddp: DistributedDataParallel) -> Optimizer:
    """AdamW on the LoRA parameters."""
    train_config = config.train
    return Optimizer(
        ddp,
        dtype=DTYPES[config.model.torch_dtype],
        beta1=train_config.adam_beta1,
        beta2=train_config.adam_beta2,
        epsilon=train_config.adam_epsilon,
        weight_decay=train_config.weight_decay,
        max_grad_norm=train_config.max_grad_norm,
    )


def loss_settings(config: Config, model_args: ModelArgs) -> LossSettings:
    """The loss of the whole run."""
    distill = config.distill
    return LossSettings(
        distill.loss_divergence,
        distill.sft_alpha,
        model_args.vocab_size,
        distill.token_weight,
        distill.importance_clip,
    )


def write_description(config: Config, num_parameters: dict[str, int], parallel: Parallel) -> None:
    """run.json: the settings, versions, parameters, layout and device of this run."""
    layout = {
        "world_size": parallel.world_size,
        "tp": parallel.tp_size,
        "pp": parallel.pp_size,
        "dp": parallel.dp_size,
        "ep": parallel.ep_size,
        "cp": parallel.cp_size,
    }
    write_run_json(
        config.run.output_dir,
        config.to_dict(),
        package_versions(),
        num_parameters,
        layout,
        {"device": device_name(parallel.device)},
    )


def load_data(
    config: Config, model_args: ModelArgs, parallel: Parallel
) -> tuple[SampleDataset, SampleDataset | None]:
    """(train, evaluation or None). Raises DataError for bad rows. Collectives: two exchanges of
    folder names.
    """
    train_data, eval_data = load_datasets(
        config.data,
        config.model.model,
        model_args.vocab_size,
        config.train.seed,
        all_gather_objects,
        writes_responses=config.distill.writes_responses,
        log=partial(log_rank_0, parallel),
    )
    log_rank_0(parallel, f"Data: {train_data.report.summary()}")
    if eval_data:
        log_rank_0(parallel, f"Evaluation data: {eval_data.report.summary()}")
    return train_data, eval_data
