"""The JSON files of a Qwen3-Omni or text model folder in the hub's format, for a model small enough
for two CPU cores.

Field names and nesting are the hub's (`rope_theta` beside `rope_scaling`, token ids at three
levels), sizes ours.
"""

from typing import Any

NUM_MEL_BINS = 128
MERGE_SIZE = 2
PATCH_SIZE = 16
TEMPORAL_PATCH_SIZE = 2
POSITIONS_PER_SIDE = 16


def mrope_section(head_dim: int) -> list[int]:
    """Split `head_dim / 2` rotary frequencies over time, height and width in the hub's proportions
    [24, 20, 20].
    """
    half = head_dim // 2
    spatial = half * 20 // 64
    return [half - 2 * spatial, spatial, spatial]


def _rope(head_dim: int, rope_theta: float) -> dict[str, Any]:
    scaling = {
        "mrope_interleaved": True,
        "mrope_section": mrope_section(head_dim),
        "rope_type": "default",
        "type": "default",
    }
    return {"rope_scaling": {"interleaved": True, **scaling}, "rope_theta": rope_theta}


# What transformers 4, which wrote the hub's config.json, adds to each nested config: settings of
# generation and training that nothing here reads. Loaders ask for some of them by name.
_DEFAULTS_OF_NESTED_CONFIGS: dict[str, Any] = {
    **{
        name: None
        for name in (
            "architectures bad_words_ids begin_suppress_tokens bos_token_id "
            "cross_attention_hidden_size decoder_start_token_id dtype eos_token_id "
            "exponential_decay_length_penalty finetuning_task forced_bos_token_id "
            "forced_eos_token_id pad_token_id prefix problem_type sep_token_id suppress_tokens "
            "task_specific_params tokenizer_class"
        ).split()
    },
    **{
        name: False
        for name in (
            "add_cross_attention early_stopping is_decoder is_encoder_decoder output_attentions "
            "output_hidden_states output_scores remove_invalid_values return_dict_in_generate "
            "tf_legacy_loss tie_encoder_decoder torchscript use_bfloat16"
        ).split()
    },
    **{
        name: 0
        for name in (
            "chunk_size_feed_forward encoder_no_repeat_ngram_size min_length no_repeat_ngram_size"
        ).split()
    },
    **{name: 1 for name in ("num_beam_groups", "num_beams", "num_return_sequences")},
    **{
        name: 1.0
        for name in ("length_penalty", "repetition_penalty", "temperature", "top_p", "typical_p")
    },
    "_name_or_path": "",
    "diversity_penalty": 0.0,
    "do_sample": True,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "max_length": 20,
    "pruned_heads": {},
    "return_dict": True,
    "tie_word_embeddings": True,
    "top_k": 10,
}


def _moe_decoder(**sizes: Any) -> dict[str, Any]:
    fixed = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "mlp_only_layers": [],
    }
    limits = {
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
        "use_cache": True,
        "use_sliding_window": False,
    }
    router = {"norm_topk_prob": True, "output_router_logits": False, "router_aux_loss_coef": 0.001}
    return {**fixed, **limits, **router, "initializer_range": 0.02, **sizes}


def thinker_config(
    text: dict[str, Any], rope_theta: float, tie_word_embeddings: bool, token_ids: dict[str, int]
) -> dict[str, Any]:
    """Config of the thinker: the decoder of sizes `text`, an audio tower and a vision tower of
    fixed small sizes.

    `text` holds vocab_size, hidden_size, num_hidden_layers, num_attention_heads,
    num_key_value_heads, head_dim, num_experts, num_experts_per_tok and moe_intermediate_size;
    `token_ids` maps token text to id.
    """
    hidden_size = text["hidden_size"]
    # vision features join the first decoder layers
    deepstack = list(range(min(2, text["num_hidden_layers"])))
    return {
        "model_type": "qwen3_omni_moe_thinker",
        "audio_config": {
            **_DEFAULTS_OF_NESTED_CONFIGS,
            "model_type": "qwen3_omni_moe_audio_encoder",
            "activation_dropout": 0,
            "activation_function": "gelu",
            "attention_dropout": 0,
            "conv_chunksize": 500,
            "d_model": 64,
            "downsample_hidden_size": 32,
            "dropout": 0,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "encoder_layers": 2,
            "initializer_range": 0.02,
            "max_source_positions": 1500,
            "n_window": 50,
            "n_window_infer": 800,
            "num_hidden_layers": 2,
            "num_mel_bins": NUM_MEL_BINS,
            "output_dim": hidden_size,
            "scale_embedding": False,
        },
        "vision_config": {
            **_DEFAULTS_OF_NESTED_CONFIGS,
            "model_type": "qwen3_omni_moe_vision_encoder",
            "apply_vit_abs_pos_embed": True,
            "deepstack_visual_indexes": deepstack,
            "depth": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 64,
            # the side of the square of positions, in pixels
            "image_size": POSITIONS_PER_SIDE * PATCH_SIZE,
            "in_channels": 3,
            "in_chans": 3,
            "initializer_range": 0.02,
            "intermediate_size": 128,
            "num_heads": 4,
            "num_position_embeddings": POSITIONS_PER_SIDE**2,
            "out_hidden_size": hidden_size,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "spatial_patch_size": PATCH_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "tokens_per_second": 2,
        },
        "text_config": {
            **_DEFAULTS_OF_NESTED_CONFIGS,
            "model_type": "qwen3_omni_moe_text",
            "intermediate_size": 2 * hidden_size,
            "shared_expert_intermediate_size": 0,
            "use_qk_norm": True,
            "tie_word_embeddings": tie_word_embeddings,
            **_moe_decoder(**text),
            **_rope(text["head_dim"], rope_theta),
        },
        "tie_word_embeddings": tie_word_embeddings,
        "audio_start_token_id": token_ids["<|audio_start|>"],
        "audio_end_token_id": token_ids["<|audio_end|>"],
        "audio_token_id": token_ids["<|audio_pad|>"],
        "image_token_id": token_ids["<|image_pad|>"],
        "video_token_id": token_ids["<|video_pad|>"],
        "vision_start_token_id": token_ids["<|vision_start|>"],
        "vision_end_token_id": token_ids["<|vision_end|>"],
        "user_token_id": token_ids["user"],
        "position_id_per_seconds": 13,
        "seconds_per_chunk": 2,
        "initializer_range": 0.02,
    }


def text_model_config(
    model_type: str,
    text: dict[str, Any],
    rope_theta: float,
    tie_word_embeddings: bool,
    token_ids: dict[str, int],
) -> dict[str, Any]:
    """Config of a text model, whose decoder of sizes `text` is all there is; `text` as in
    `thinker_config`.
    """
    return {
        "model_type": model_type,
        "bos_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": token_ids["<|im_end|>"],
        "intermediate_size": 2 * text["hidden_size"],
        "max_window_layers": text["num_hidden_layers"],
        **_moe_decoder(**text),
        "rope_scaling": None,
        "rope_theta": rope_theta,
        "tie_word_embeddings": tie_word_embeddings,
    }


def talker_config(thinker: dict[str, Any]) -> dict[str, Any]:
    """Config of a talker that fits `thinker`: 4 groups of 64 codes, codec control tokens above the
    codes.
    """
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    shared_ids = (
        "audio_start_token_id",
        "audio_end_token_id",
        "audio_token_id",
        "image_token_id",
        "video_token_id",
    )
    return {
        "model_type": "qwen3_omni_moe_talker",
        "text_config": {
            "model_type": "qwen3_omni_moe_talker_text",
            **_moe_decoder(**sizes, **attention, **experts),
            **_rope(16, 1e6),
        },
        "code_predictor_config": {
            **_DEFAULTS_OF_NESTED_CONFIGS,
            "model_type": "qwen3_omni_moe_talker_code_predictor",
            "attention_bias": False,
            "attention_dropout": 0,
            "hidden_act": "silu",
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "initializer_range": 0.02,
            "layer_types": ["full_attention"] * 2,
            "max_position_embeddings": 2048,
            "max_window_layers": 28,
            "num_code_groups": 4,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_cache": True,
            "use_sliding_window": False,
            **attention,
        },
        "accept_hidden_layer": thinker["text_config"]["num_hidden_layers"] // 2,
        "codec_bos_id": 65,
        "codec_eos_token_id": 66,
        "codec_nothink_id": 67,
        "codec_pad_id": 64,
        "codec_think_bos_id": 68,
        "codec_think_eos_id": 69,
        "num_code_groups": 4,
        "output_router_logits": False,
        "position_id_per_seconds": thinker["position_id_per_seconds"],
        "seconds_per_chunk": thinker["seconds_per_chunk"],
        "spatial_merge_size": MERGE_SIZE,
        "speaker_id": {"chelsie": 80, "ethan": 81, "aiden": 82},
        "thinker_hidden_size": thinker["text_config"]["hidden_size"],
        "vision_start_token_id": thinker["vision_start_token_id"],
        **{name: thinker[name] for name in shared_ids},
    }


def code2wav_config() -> dict[str, Any]:
    """Config of a vocoder for the talker's 4 groups of 64 codes."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "codebook_dim": 32,
        "codebook_size": 64,
        "decoder_dim": 48,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 64,
        "layer_scale_initial_scale": 0.01,
        "max_position_embeddings": 8000,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "num_quantizers": 4,
        "num_semantic_quantizers": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000,
        "semantic_codebook_size": 128,
        "sliding_window": 72,
        "upsample_rates": [8, 5, 4, 3],
        "upsampling_ratios": [2, 2],
        "vector_quantization_hidden_dimension": 32,
    }


def whole_config(thinker: dict[str, Any], token_ids: dict[str, int]) -> dict[str, Any]:
    """Config of the whole model around `thinker`."""
    return {
        "model_type": "qwen3_omni_moe",
        "enable_audio_output": True,
        "thinker_config": thinker,
        "talker_config": talker_config(thinker),
        "code2wav_config": code2wav_config(),
        "im_start_token_id": token_ids["<|im_start|>"],
        "im_end_token_id": token_ids["<|im_end|>"],
        "system_token_id": token_ids["system"],
        "user_token_id": token_ids["user"],
        "assistant_token_id": token_ids["assistant"],
        "tts_pad_token_id": token_ids["<tts_pad>"],
        "tts_bos_token_id": token_ids["<tts_text_bos>"],
        "tts_eos_token_id": token_ids["<tts_text_eod>"],
    }


def generation_config(token_ids: dict[str, int]) -> dict[str, Any]:
    """Generation ends at the end of a turn or of the text; sampling is left to the caller."""
    ends = [token_ids["<|im_end|>"], token_ids["<|endoftext|>"]]
    return {"eos_token_id": ends, "pad_token_id": token_ids["<|endoftext|>"]}


def preprocessor_config() -> dict[str, Any]:
    """Audio to log-mel at 16 kHz, images to patches, as on the hub."""
    return {
        "processor_class": "Qwen3OmniMoeProcessor",
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": NUM_MEL_BINS,
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "n_samples": 4800000,
        "nb_max_frames": 30000,
        "chunk_length": 300,
        "dither": 0.0,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_size": MERGE_SIZE,
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "min_pixels": 3136,
        "max_pixels": 12845056,
    }
