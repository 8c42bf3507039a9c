"""Settings -> `Run`: data, model with LoRA, optimizer, samplers, metrics; each with a line on the
screen.
"""

import time
from typing import cast

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_gkd.adapters import add_lora, add_teacher, count_lora, open_teacher, resolve
from megatron_gkd.config import Config
from megatron_gkd.data import SampleDataset
from megatron_gkd.data.batch import Packing
from megatron_gkd.data.micro_batches import Budget
from megatron_gkd.device_memory import DeviceMemory, device_name
from megatron_gkd.formats.loading import load_weights
from megatron_gkd.gradients import in_gradient_reducer
from megatron_gkd.identity import identity_state
from megatron_gkd.lora.apply import expert_columns
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.loss.divergence import KINDS
from megatron_gkd.media.towers import Towers, build_towers
from megatron_gkd.metrics import Clock
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.decoder import build_decoder, core_attention
from megatron_gkd.model.experts import select_kernels as expert_kernels
from megatron_gkd.model.transformer_config import DTYPES
from megatron_gkd.optimizer import Optimizer
from megatron_gkd.output_lock import OutputLock
from megatron_gkd.parallel import Parallel, log_rank_0
from megatron_gkd.plan.memory import check_memory
from megatron_gkd.plan.towers import read_towers
from megatron_gkd.plan.workload import workload
from megatron_gkd.recompute import Recomputation
from megatron_gkd.resume import check_room, note_start, resume
from megatron_gkd.rollout.rollout import Rollout, make_rollout
from megatron_gkd.rollout_log import RolloutLog, num_logged_rollouts, text_decoder
from megatron_gkd.run import Run, eval_budget, largest_micro_batch, packing, step_budget
from megatron_gkd.run_data import read_data, with_max_steps
from megatron_gkd.run_folder import MetricsWriter, package_versions, write_run_json
from megatron_gkd.token_loss import LossSettings
from megatron_gkd.trackers import open_trackers
from megatron_gkd.zero_signal import check_responses, check_skipped_tokens, check_trainable


def build_run(config: Config, parallel: Parallel, lock: OutputLock) -> Run:
    """Everything that the loop uses, resumed where --resume_from_checkpoint asks for it. Raises
    ValueError or OSError, before any step, for settings, data or files that do not fit. lock: of
    the output folder, which rank 0 takes.

    Collectives: those of `load_data`.
    """
    model_args, train_data, eval_data = read_data(config, parallel, lock)
    config = with_max_steps(config, len(train_data), parallel)
    mixed = check_responses(config, train_data)
    check_trainable(config, train_data.report)
    if mixed:
        log_rank_0(parallel, mixed)
    check_skipped_tokens(config, train_data)
    all_data = [data for data in (train_data, eval_data) if data]
    kinds = {kind for data in all_data for kind in data.report.num_media}
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
            media_tokens=max(data.lengths.most_media(most_tokens) for data in all_data),
            prompt_tokens=max(int(data.lengths.prompts.max()) for data in written_data),
            writes=writes,
            **towers,
        )
    model = build_base(config, model_args, parallel, teacher=teacher, **towers)
    add_lora(model, config, model_args, parallel, adapter)
    add_teacher(model, config, model_args, parallel, teacher, resume_folder)
    num_parameters = count_lora(model, model_args, parallel, config.distill.teacher_line())
    log_rank_0(parallel, f"Loss: {config.distill.loss_line()}")
    for note in settings_notes(config):
        log_rank_0(parallel, note)
    ddp = in_gradient_reducer(model)
    optimizer = build_optimizer(config, ddp, parallel)
    identity = identity_state(config) if parallel.rank == 0 else {}
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
        identity,
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
    check_room(config, parallel, num_parameters, progress.step)
    note_start(config, parallel, resume_folder)
    if parallel.rank == 0:
        write_description(config, num_parameters, parallel)
    recomputation = None
    if config.model.recompute == "auto":
        recomputation = Recomputation(model.decoder, parallel, memory, most_tokens)
    rollout = eval_rollout = rollout_log = None
    if writes:
        rollout, eval_rollout, rollout_log = make_rollouts(
            config, model, model_args, parallel, train_data, eval_data, budget, packed, num_logged
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
        identity=identity,
        clock=Clock(parallel.device),
        memory=memory,
        recomputation=recomputation,
    )


def check_fits(
    config: Config,
    model_args: ModelArgs,
    parallel: Parallel,
    available: int,
    *,
    micro_batch_tokens: int,
    media_tokens: int,
    prompt_tokens: int,
    writes: bool,
    audio: bool,
    visual: bool,
) -> None:
    """A line on the memory that a rank will need. Raises ValueError naming its parts and the way
    out where it is more than the `available` bytes.

    micro_batch_tokens, media_tokens (of one), prompt_tokens: the most of the data; writes: whether
    the run writes responses, be it for its evaluation; audio, visual: as for `build_base`.
    """
    wanted = (audio or config.lora.lora_towers, visual or config.lora.lora_towers)
    load = workload(
        config,
        model_args,
        micro_batch_tokens=micro_batch_tokens,
        prompt_tokens=prompt_tokens,
        writes=writes,
        towers=read_towers(config.model.model, *wanted),
        media_share=media_tokens / micro_batch_tokens,
    )
    needed = check_memory(
        model_args, config.parallel, load, available, world_size=parallel.world_size
    )
    log_rank_0(parallel, f"Memory: about {needed.describe()}")


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
    run needs. Raises ValueError or FileNotFoundError. Collectives: those of `load_weights` and
    `build_towers`.

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
    from_peers = config.model.load_from_peers
    num_bytes = load_weights(model, model_args, parallel, config.model.model, from_peers=from_peers)
    log_rank_0(
        parallel,
        f"Read {num_bytes / 2**30:.2f} GiB of {config.model.model} on this rank"
        f"{', with the rest from its peers,' if from_peers else ''} in "
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
        from_peers=from_peers,
    )
    return model


def settings_notes(config: Config) -> list[str]:
    """A line for each setting that does something else, or less, than one may think."""
    notes, distill = [], config.distill
    if distill.sft_alpha and not distill.may_use_data_responses(config.train.max_steps):
        writer = "--seq_kd" if distill.seq_kd else f"--lmbda {distill.lmbda}"
        notes.append(
            f"Note: --sft_alpha {distill.sft_alpha:g} counts in no step: with {writer} none learns "
            "from the data set's own responses"
        )
    if distill.importance_clip is not None and not distill.may_be_on_policy:
        notes.append(
            f"Note: --importance_clip {distill.importance_clip:g} counts in no step: with --lmbda "
            f"{distill.lmbda} the student writes no response"
        )
    if distill.beta != 0.5 and not KINDS[distill.divergence].uses_beta:
        notes.append(
            f"Note: --beta {distill.beta:g} counts in no step: --divergence {distill.divergence} "
            "has no mixture"
        )
    changed = config.rollout.changed_sampling()
    if changed and distill.may_be_on_policy:
        notes.append(
            f"Note: {', '.join(changed)}: on-policy responses are not drawn from the student's own "
            "distribution (docs/recipes.md; off: --rollout_temperature 1 --top_p 1 --top_k 0 "
            "--repetition_penalty 1)"
        )
    return notes


def make_rollouts(
    config: Config,
    model: torch.nn.Module,
    model_args: ModelArgs,
    parallel: Parallel,
    train_data: SampleDataset,
    eval_data: SampleDataset | None,
    budget: Budget,
    packed: Packing,
    num_logged: int,
) -> tuple[Rollout, Rollout | None, RolloutLog | None]:
    """What writes responses to the training data, and greedily to the evaluation data where there
    are any; and the log of `num_logged` of them, unless that is 0. Raises as `make_rollout`.
    """
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
    eval_rollout = rollout_log = None
    if eval_data:
        eval_rollout = rollout.for_evaluation(eval_data, eval_budget(config, model_args))
    if num_logged:
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
    return rollout, eval_rollout, rollout_log


def build_optimizer(config: Config, ddp: DistributedDataParallel, parallel: Parallel) -> Optimizer:
    """AdamW on the LoRA parameters."""
    train_config = config.train
    return Optimizer(
        ddp,
        parallel,
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
