"""Qwen3-Omni: a thinker (audio tower, vision tower, mixture-of-experts decoder), which is trained,
and talker and code2wav, which turn its text into speech and travel along.

A folder holds the whole model (tensors under `thinker.`) or a thinker alone (no prefix).
"""

from collections.abc import Mapping
from typing import Any

from megatron_gkd.families.family import Family, SizeInWeights, Tower

_MEDIA_TOKENS = (
    "audio_token_id",
    "image_token_id",
    "video_token_id",
    "audio_start_token_id",
    "audio_end_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "position_id_per_seconds",
)


_AUDIO: dict[str, Any] = dict(d_model=1280, encoder_layers=32, encoder_ffn_dim=5120)
_AUDIO |= dict(encoder_attention_heads=20, num_mel_bins=128, downsample_hidden_size=480)
_AUDIO |= dict(output_dim=3584, max_source_positions=1500, n_window=50, conv_chunksize=500)
_AUDIO |= dict(n_window_infer=800)
_VISUAL: dict[str, Any] = dict(hidden_size=1152, depth=27, intermediate_size=4304, num_heads=16)
_VISUAL |= dict(in_channels=3, patch_size=16, temporal_patch_size=2, spatial_merge_size=2)
_VISUAL |= dict(out_hidden_size=3584, num_position_embeddings=2304)
_VISUAL |= dict(deepstack_visual_indexes=(8, 16, 24))


def _convolved_bins(sizes: Mapping[str, Any]) -> int:
    """Numbers of a frame behind three convolutions of stride 2 over its mel bins."""
    return sizes["downsample_hidden_size"] * -(-sizes["num_mel_bins"] // 8)


def _merged_width(sizes: Mapping[str, Any]) -> int:
    return sizes["hidden_size"] * sizes["spatial_merge_size"] ** 2


def _config_class() -> Any:
    from transformers import Qwen3OmniMoeThinkerConfig

    return Qwen3OmniMoeThinkerConfig


def _model_class() -> Any:
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

    return Qwen3OmniMoeThinkerForConditionalGeneration


def _whole_class() -> Any:
    from transformers import Qwen3OmniMoeForConditionalGeneration

    return Qwen3OmniMoeForConditionalGeneration


def _audio_encoder() -> Any:
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe

    return modeling_qwen3_omni_moe.Qwen3OmniMoeAudioEncoder


def _vision_encoder() -> Any:
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe

    return modeling_qwen3_omni_moe.Qwen3OmniMoeVisionEncoder


def _num_audio_tokens(num_frames: int, config: Any) -> int:
    import torch
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe

    lengths = modeling_qwen3_omni_moe._get_feat_extract_output_lengths
    return int(lengths(torch.tensor(num_frames), config.audio_config.n_window))


def _media_settings(config: Any) -> dict[str, Any]:
    found = {name: getattr(config, name, None) for name in _MEDIA_TOKENS}
    for name, value in found.items():
        if value is None:
            raise ValueError(f"{name} is missing; the thinker's config of a Qwen3-Omni names it")
    return found | {"spatial_merge_size": config.vision_config.spatial_merge_size}


FAMILY = Family(
    title="Qwen3-Omni",
    trained_part="the thinker",
    prefixes={"qwen3_omni_moe": "thinker.", "qwen3_omni_moe_thinker": ""},
    section="thinker_config",
    text_section="text_config",
    text_defaults={
        "num_hidden_layers": 28,
        "hidden_size": 2048,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_dim": None,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "moe_intermediate_size": 768,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "vocab_size": 3584,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": None,
        "use_sliding_window": True,
    },
    interleaved_mrope=True,
    config_class=_config_class,
    model_class=_model_class,
    whole_class=_whole_class,
    towers=(
        Tower(
            name="audio_tower",
            config="audio_config",
            output_size="output_dim",
            layers="layers",
            defaults=_AUDIO,
            width_and_heads=("d_model", "encoder_attention_heads"),
            num_layers="encoder_layers",
            counts={"encoder_layers": "layers"},
            in_weights=(
                SizeInWeights("d_model", "ln_post.weight", 0),
                SizeInWeights("encoder_ffn_dim", "layers.0.fc1.weight", 0),
                SizeInWeights("downsample_hidden_size", "conv2d1.weight", 0),
                SizeInWeights("num_mel_bins", "conv_out.weight", 1, _convolved_bins),
                SizeInWeights("output_dim", "proj2.weight", 0),
            ),
            lora_linears=(
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "self_attn.out_proj",
                "fc1",
                "fc2",
            ),
            ends=("conv_out", "proj1", "proj2"),
            load_class=_audio_encoder,
            aliases={
                "encoder_layers": "num_hidden_layers",
                "d_model": "hidden_size",
                "encoder_attention_heads": "num_attention_heads",
                "encoder_ffn_dim": "intermediate_size",
            },
        ),
        Tower(
            name="visual",
            config="vision_config",
            output_size="out_hidden_size",
            layers="blocks",
            defaults=_VISUAL,
            width_and_heads=("hidden_size", "num_heads"),
            num_layers="depth",
            counts={"depth": "blocks", "deepstack_visual_indexes": "merger_list"},
            in_weights=(
                SizeInWeights("hidden_size", "patch_embed.proj.weight", 0),
                SizeInWeights("in_channels", "patch_embed.proj.weight", 1),
                SizeInWeights("temporal_patch_size", "patch_embed.proj.weight", 2),
                SizeInWeights("patch_size", "patch_embed.proj.weight", 3),
                SizeInWeights("intermediate_size", "blocks.0.mlp.linear_fc1.weight", 0),
                SizeInWeights("num_position_embeddings", "pos_embed.weight", 0),
                SizeInWeights("spatial_merge_size", "merger.mlp.0.weight", 1, _merged_width),
                SizeInWeights("out_hidden_size", "merger.mlp.2.weight", 0),
            ),
            lora_linears=("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"),
            ends=(
                "patch_embed.proj",
                "merger.mlp.0",
                "merger.mlp.2",
                "merger_list.0.mlp.0",
                "merger_list.0.mlp.2",
            ),
            load_class=_vision_encoder,
            aliases={"depth": "num_hidden_layers", "num_heads": "num_attention_heads"},
        ),
    ),
    other_models=("talker.", "code2wav."),
    other_models_title="talker or vocoder",
    other_models_switch="enable_audio_output",
    media_settings=_media_settings,
    num_audio_tokens=_num_audio_tokens,
    # With "thinker." PEFT loads the adapter on the whole model and on a thinker alone; without it
    # the whole model would ignore it.
    adapter_roots=("thinker.", ""),
    # transformers calls the decoder `model` until 5.20 and `model.language_model` later.
    inner_roots=("model.", "model.language_model."),
)
