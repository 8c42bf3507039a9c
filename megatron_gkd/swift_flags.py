"""Flags of ms-swift (`swift rlhf`, `megatron rlhf`) that are no settings here, and what stands in
their place. All of a command's are answered at once. Imports nothing slow.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron_gkd.flags import FLAG


class Answer(NamedTuple):
    """`harmless`: values with which the flag asks for nothing that is not done anyway, so that it
    is accepted with a note; None: any value is.
    """

    instead: str
    harmless: tuple[str, ...] | None = ()


_ON, _OFF, _ANY = ("true",), ("false",), None
# names, the values with which they are accepted, the answer
_GROUPS: tuple[tuple[str, tuple[str, ...] | None, str], ...] = (
    ("rlhf_type", ("gkd",), "this program does nothing but GKD"),
    # where the model lies and how it is cut
    (
        "deepspeed zero_hpz_partition_size deepspeed_autotp_size fsdp device_map max_memory "
        "sequence_parallel expert_tensor_parallel_size use_distributed_optimizer "
        "ddp_backend ddp_find_unused_parameters ddp_broadcast_buffers "
        "overlap_param_gather overlap_p2p_comm tp_comm_overlap moe_token_dispatcher_type "
        "moe_enable_deepep",
        _ANY,
        "--tensor_, --expert_ and --pipeline_model_parallel_size shard the model",
    ),
    (
        "overlap_grad_reduce",
        _ANY,
        "large gradients are summed while the backward goes on, small ones by one call after it",
    ),
    (
        "teacher_deepspeed offload_teacher_model",
        _ANY,
        "the teacher is the student's own base model with LoRA off, so it is sharded with it",
    ),
    (
        "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers "
        "pipeline_model_parallel_layout virtual_pipeline_model_parallel_size",
        (),
        "--pipeline_model_parallel_size, whose stages have equally many layers",
    ),
    ("sequence_parallel_size", ("1",), "--context_parallel_size cuts rows over ranks"),
    (
        "use_hf hub_token check_model model_type ref_model_type teacher_model_type "
        "load_safetensors save_safetensors safe_serialization max_shard_size local_repo_path",
        _ANY,
        "--model is a folder on this machine, whose config.json says what it is",
    ),
    ("task_type", ("causal_lm",), "language models alone are trained"),
    ("model_revision teacher_model_revision load mcore_model", (), "--model DIR"),
    (
        "teacher_model_server teacher_tag_key",
        (),
        "leave it out: the teacher is the model itself, LoRA off",
    ),
    ("gkd_logits_topk", (), "--loss_top_k, with one outcome for all other tokens"),
    (
        "quant_method quant_bits bnb_4bit_compute_dtype bnb_4bit_quant_type "
        "bnb_4bit_use_double_quant bnb_4bit_quant_storage hqq_axis",
        (),
        "a base in --torch_dtype bfloat16 is shared over ranks instead of quantised",
    ),
    ("rope_scaling max_model_len", (), "rotary settings are those of the folder's config.json"),
    ("bf16", _ON, "--torch_dtype bfloat16, the default"),
    ("fp16", _OFF, "--torch_dtype float16"),
    ("attention_backend", ("flash", "auto"), "--attn_impl"),
    # memory and speed
    ("gradient_checkpointing vit_gradient_checkpointing", _OFF, "--recompute full, or auto"),
    ("recompute_granularity", ("none",), "--recompute full, or auto"),
    (
        "gradient_checkpointing_kwargs recompute_method recompute_num_layers",
        _ANY,
        "--recompute full and --recompute auto have no more settings",
    ),
    (
        "padding_free packing packing_length packing_num_proc packing_strategy group_by_length "
        "padding_side",
        _ANY,
        "rows are always without padding, and --per_device_train_batch_size counts rows "
        "(--max_tokens_per_micro_batch packs them)",
    ),
    (
        "use_liger_kernel use_logits_to_keep cross_entropy_loss_fusion masked_softmax_fusion "
        "bias_dropout_fusion bias_activation_fusion apply_rope_fusion "
        "gradient_accumulation_fusion attention_softmax_in_fp32 moe_router_dtype "
        "accumulate_allreduce_grads_in_fp32 calculate_per_token_loss "
        "cross_entropy_fusion_impl moe_grouped_gemm moe_permute_fusion moe_shared_expert_overlap "
        "average_tokens_across_devices",
        _ANY,
        "what they do is always done, or not needed",
    ),
    (
        "use_vllm vllm_mode vllm_gpu_memory_utilization vllm_tensor_parallel_size "
        "vllm_pipeline_parallel_size vllm_data_parallel_size vllm_enable_expert_parallel "
        "vllm_max_num_seqs vllm_max_model_len vllm_disable_custom_all_reduce vllm_enforce_eager "
        "vllm_mm_processor_cache_gb vllm_limit_mm_per_prompt vllm_max_lora_rank vllm_enable_lora "
        "vllm_enable_prefix_caching vllm_use_async_engine vllm_engine_kwargs vllm_quantization "
        "vllm_disable_cascade_attn vllm_server_host vllm_server_port vllm_server_base_url "
        "vllm_server_timeout vllm_server_pass_dataset vllm_server_group_port sleep_level "
        "offload_model offload_optimizer move_model_batches ds3_gather_for_generation "
        "infer_backend enable_flattened_weight_sync",
        _ANY,
        "the training model writes its responses itself",
    ),
    ("async_generate", _OFF, "responses are written by the weights of their step"),
    ("max_new_tokens", (), "--max_completion_length"),
    ("steps_per_generation", ("1",), "each step writes its own responses"),
    ("generation_batch_size", (), "each step writes its own responses"),
    (
        "fp8_format fp8_recipe fp8_param_gather fp8_amax_history_len fp8_amax_compute_algo "
        "fp4_format fp4_recipe fp4_param_gather",
        (),
        "--torch_dtype bfloat16 is the type of the weights and of what is computed",
    ),
    (
        "moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy",
        (),
        "no expert leaves out tokens",
    ),
    (
        "use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype "
        "exp_avg_sq_dtype offload_bridge",
        _ANY,
        "LoRA's weights and their optimizer state are small, and float32",
    ),
    ("optimizer_cpu_offload optimizer_offload_fraction", (), "LoRA's optimizer state is small"),
    # data
    (
        "load_from_cache_file lazy_tokenize streaming shuffle_buffer_size download_mode "
        "remove_unused_columns load_data_args load_args dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_prefetch_factor val_dataset_shuffle "
        "no_shuffle_val",
        _ANY,
        "rows are prepared before the first step, by --dataset_num_proc processes",
    ),
    ("num_workers", (), "--dataloader_num_workers"),
    ("dataloader_drop_last data_sharding", _ANY, "a step always has its whole number of rows"),
    ("dataset_shuffle train_dataloader_shuffle", _ON, "rows are always shuffled, by --seed"),
    ("data_seed", (), "--seed orders the data too"),
    ("strict", _ON, "bad rows stop the run; --skip_bad_rows true counts and skips them"),
    (
        "truncation_strategy",
        ("right",),
        "a response is cut at its end, a prompt that does not fit makes a bad row: "
        "--skip_bad_rows true leaves those out",
    ),
    (
        "cached_dataset cached_val_dataset custom_dataset_info custom_register_path "
        "external_plugins interleave_prob stopping_strategy",
        (),
        "--dataset takes files, folders and names; --columns gives their columns other names",
    ),
    ("model_name model_author", _ANY, "they stand in ms-swift's rows of self-cognition alone"),
    (
        "max_pixels min_pixels model_kwargs norm_bbox",
        (),
        "the size of pictures is set in the folder's preprocessor_config.json",
    ),
    # the template
    (
        "template template_backend use_chat_template",
        _ANY,
        "the folder's own chat template is used, or --chat_template FILE",
    ),
    (
        "agent_template",
        (),
        "tools and their calls are rendered by the folder's chat template, or --chat_template FILE",
    ),
    (
        "enable_thinking preserve_thinking add_non_thinking_prefix response_prefix",
        (),
        "--chat_template_kwargs '{\"enable_thinking\": false}', as the template has it",
    ),
    (
        "loss_scale is_binary_loss_scale disable_ignore_empty_think",
        ("default",),
        "a turn with `loss: false` in its row is not trained",
    ),
    (
        "enable_channel_loss",
        _OFF,
        "metrics are given for each `source`: --columns names that column",
    ),
    # LoRA
    ("tuner_backend", ("peft",), "LoRA is the program's own, saved as PEFT saves it"),
    ("adapters ref_adapters", (), "--adapter DIR"),
    ("teacher_adapters", (), "--teacher_adapter DIR"),
    (
        "freeze_llm",
        _OFF,
        "the decoder is what LoRA is for; --lora_target_modules names its linears",
    ),
    (
        "freeze_vit freeze_aligner",
        _ON,
        "the towers stay as they are, or with --lora_towers true have LoRA",
    ),
    ("vit_lr aligner_lr lorap_lr_ratio", (), "there is one --learning_rate"),
    (
        "target_regex target_parameters",
        (),
        "--lora_target_modules, which takes a regular expression",
    ),
    (
        "modules_to_save trainable_parameters trainable_parameters_regex freeze_parameters "
        "freeze_parameters_regex freeze_parameters_ratio",
        (),
        "LoRA weights alone are trained: the rest is the teacher's",
    ),
    ("lora_bias", ("none",), "LoRA weights alone are trained"),
    ("lora_dtype", ("float32",), "LoRA weights are float32"),
    ("use_dora use_galore", _OFF, "plain LoRA is what is trained"),
    ("init_weights", ("true",), "new LoRA weights are PEFT's own; --adapter DIR brings others"),
    # optimizer and schedule
    ("optim", ("adamw_torch", "adamw_torch_fused", "adamw"), "AdamW is the optimizer"),
    ("optimizer", ("adam",), "AdamW is the optimizer"),
    ("optim_args", (), "--adam_beta1, --adam_beta2, --adam_epsilon"),
    ("lr_scheduler_kwargs min_lr lr_decay_style", (), "--lr_scheduler_type cosine ends at 0"),
    ("warmup_steps lr_warmup_iters lr_warmup_fraction", (), "--warmup_ratio, a share of the steps"),
    ("clip_grad", (), "--max_grad_norm"),
    ("train_iters", (), "--max_steps"),
    ("max_epochs", (), "--num_train_epochs"),
    ("micro_batch_size", (), "--per_device_train_batch_size"),
    (
        "global_batch_size",
        (),
        "--per_device_train_batch_size times --gradient_accumulation_steps, for each data-parallel "
        "rank",
    ),
    ("neftune_noise_alpha", ("0", "0.0"), "noise would make student and teacher differ by itself"),
    (
        "router_aux_loss_coef moe_aux_loss_coeff moe_z_loss_coeff",
        ("0", "0.0"),
        "the router is frozen",
    ),
    ("moe_router_load_balancing_type", _ANY, "the router is frozen"),
    ("mtp_num_layers", ("0",), "the next token alone is predicted"),
    ("full_determinism deterministic_mode", _OFF, "--deterministic true"),
    ("label_smoothing label_smoothing_factor", ("0", "0.0"), "the loss has none; see --sft_alpha"),
    # the run folder
    ("save", (), "--output_dir"),
    (
        "add_version create_checkpoint_symlink save_on_each_node logging_dir logging_first_step "
        "log_level disable_tqdm use_flash_ckpt async_save ignore_args_error",
        _ANY,
        "--output_dir holds everything: metrics.jsonl, tensorboard, checkpoints",
    ),
    ("log_completions", _ANY, "--log_rollouts N keeps what the student wrote"),
    (
        "run_name swanlab_exp_name wandb_exp_name",
        _ANY,
        "trackers name a run after --output_dir, or as WANDB_NAME and SWANLAB_EXP_NAME say",
    ),
    ("swanlab_project wandb_project", (), "WANDB_PROJECT, SWANLAB_PROJ_NAME in the environment"),
    ("swanlab_mode", (), "SWANLAB_MODE in the environment"),
    ("swanlab_token", (), "SWANLAB_API_KEY in the environment, or `swanlab login`"),
    ("swanlab_workspace", (), "SWANLAB_WORKSPACE in the environment"),
    ("tensorboard_dir", _ANY, "OUTPUT/tensorboard"),
    (
        "finetune",
        _ON,
        "a run begins with a new optimizer, or with --resume_from_checkpoint goes on with the old",
    ),
    ("save_interval", (), "--save_steps"),
    ("eval_interval", (), "--eval_steps"),
    ("eval_iters", ("-1",), "an evaluation measures all of --val_dataset; NAME#N takes N rows"),
    ("log_interval", (), "--logging_steps"),
    ("no_save_optim no_save_rng", (), "--save_only_model true"),
    ("save_strategy", ("steps",), "--save_steps; the last step always writes a checkpoint"),
    (
        "eval_strategy evaluation_strategy",
        ("steps",),
        "--eval_steps; without --val_dataset and --split_dataset_ratio there is none",
    ),
    ("eval_on_start", _ANY, "the first evaluation is before the first step"),
    ("predict_with_generate eval_use_evalscope", _OFF, "evaluation measures the loss"),
    (
        "metric_for_best_model greater_is_better load_best_model_at_end early_stop_interval",
        (),
        "--save_total_limit keeps the newest checkpoints; eval.jsonl has the losses",
    ),
    (
        "resume_only_model ignore_data_skip no_load_optim no_load_rng",
        _OFF,
        "--adapter CHECKPOINT takes its weights alone",
    ),
    (
        "push_to_hub hub_private_repo",
        _OFF,
        "nothing is uploaded: --output_dir has PEFT's own files",
    ),
    ("hub_model_id", (), "nothing is uploaded: --output_dir has PEFT's own files"),
    ("merge_lora", _OFF, "python -m checkpoint_tools.merge_lora, after the run"),
    # other kinds of training
    (
        "reward_model reward_funcs reward_weights reward_model_plugin reward_adapters ref_model "
        "num_iterations epsilon epsilon_high teacher_kl_coef advantage_estimator scale_rewards "
        "multi_turn_scheduler max_turns use_gym_env gym_env completion_length_limit_scope "
        "num_generations_eval dynamic_sample max_resample_times overlong_filter "
        "importance_sampling_level loss_type simpo_gamma cpo_alpha rpo_alpha",
        (),
        "belongs to another kind of training than GKD",
    ),
)
SWIFT_FLAGS = {
    name: Answer(instead, harmless)
    for names, harmless, instead in _GROUPS
    for name in names.split()
}


class Answered(NamedTuple):
    """A command's words without the flags of this table; a line for each of those that cannot be
    used, and for each that has no effect.
    """

    words: list[str]
    refused: list[str]
    notes: list[str]


def answer(words: Sequence[str], flags: Mapping[str, Answer] = SWIFT_FLAGS) -> Answered:
    """Takes the `flags` of this table and their values out of a command's words."""
    found = Answered([], [], [])
    values: list[str] | None = None  # of the flag that was read last, if it is one of the table
    taken: list[tuple[str, list[str]]] = []
    for word in words:
        name, equals, value = word.partition("=")
        if re.fullmatch(FLAG, word):
            known = name[2:].replace("-", "_") if name.startswith("--") else ""
            values = None
            if known in flags:
                values = [value] if equals else []
                taken.append((known, values))
                continue
        if values is None:
            found.words.append(word)
        else:
            values.append(word)
    for name, given in taken:
        instead, harmless = flags[name]
        text = " ".join(given) or "true"  # a flag alone is a switch
        if harmless is None or text.lower() in harmless:
            found.notes.append(f"--{name} has no effect here: {instead}.")
        else:
            found.refused.append(f"--{' '.join([name, *given])} is ms-swift's; here: {instead}")
    return found
