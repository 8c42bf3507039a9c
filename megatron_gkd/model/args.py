"""A Hugging Face `config.json` -> the sizes of the decoder. Does without megatron-core, whose
import takes seconds.

Accepts the whole model (`qwen3_omni_moe`, tensors under `thinker.`) and a thinker alone
(`qwen3_omni_moe_thinker`, no prefix). What this decoder cannot represent is refused by the name of
the setting, never approximated.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Qwen3OmniMoeThinkerConfig

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PREFIXES = {
    "qwen3_omni_moe": "thinker.",
    "qwen3_omni_moe_thinker": "",
}  # model_type -> of the thinker's tensors


@dataclass(frozen=True)
class ModelArgs:
    """Every size of the thinker's decoder, as read from the folder's config.json."""

    prefix: str  # of tensor names: "thinker." or ""
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    moe_intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    tie_word_embeddings: bool

    def padded_vocab_size(self, tp_size: int) -> int:
        """Rows of embedding and lm_head over all TP ranks, 128 k each; those past `vocab_size` are
        zero and masked.
        """
        multiple = 128 * tp_size
        return (self.vocab_size + multiple - 1) // multiple * multiple


def read_thinker_config(folder: str | Path) -> tuple[Path, str, Qwen3OmniMoeThinkerConfig]:
    """(path of FOLDER/config.json, prefix of the thinker's tensor names, its settings).

    Raises FileNotFoundError, or ValueError naming the file: not JSON, another model, a setting of
    the wrong type.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        inside = (path.parent / "metadata.json").is_file()
        way_out = (
            f"; this is the inside of a Megatron checkpoint: give {path.parent.resolve().parent}"
            if inside
            else ""
        )
        raise FileNotFoundError(
            f"--model {folder}: no config.json there; expected a Hugging Face folder of Qwen3-Omni or a checkpoint of "
            f"checkpoint_tools.hf_to_megatron{way_out}"
        )
    try:
        raw = json.loads(path.read_text())
        model_type = raw.get("model_type") if isinstance(raw, dict) else None
        if model_type not in _PREFIXES:
            raise ValueError(
                f"model_type {model_type!r} is not supported; expected one of {sorted(_PREFIXES)}"
            )
        prefix = _PREFIXES[model_type]
        thinker_raw = raw.get("thinker_config") if prefix else raw
        if not isinstance(thinker_raw, dict) or not thinker_raw.get("text_config"):
            raise ValueError(f"{'thinker_config.' if prefix else ''}text_config is missing")
        return path, prefix, Qwen3OmniMoeThinkerConfig.from_dict(thinker_raw)
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_model_args(folder: str | Path) -> ModelArgs:
    """Read FOLDER/config.json. Raises FileNotFoundError, or ValueError naming the file and the
    unsupported setting.
    """
    path, prefix, thinker = read_thinker_config(folder)
    text, rope = thinker.text_config, thinker.text_config.rope_parameters

    def refuse(setting, value, supported):
        raise ValueError(
            f"{path}: text_config.{setting} = {value!r} is not supported (this decoder has {supported})"
        )

    for setting in (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ):
        if getattr(text, setting) < 1:
            refuse(setting, getattr(text, setting), "at least one")
    head_dim = getattr(text, "head_dim", None)
    head_dim = text.hidden_size // text.num_attention_heads if head_dim is None else head_dim
    if head_dim < 2 or head_dim % 2:
        refuse("head_dim", head_dim, "an even number")
    if text.mlp_only_layers:
        refuse("mlp_only_layers", text.mlp_only_layers, "a mixture of experts in every layer: []")
    if text.decoder_sparse_step != 1:
        refuse(
            "decoder_sparse_step",
            text.decoder_sparse_step,
            "a mixture of experts in every layer: 1",
        )
    if text.num_experts < 1:
        refuse("num_experts", text.num_experts, "at least one expert")
    if text.num_experts_per_tok > text.num_experts:
        refuse("num_experts_per_tok", text.num_experts_per_tok, f"num_experts {text.num_experts}")
    if text.num_experts_per_tok == 1 and text.norm_topk_prob:
        refuse("num_experts_per_tok", 1, "at least 2 where norm_topk_prob is true")
    if text.sliding_window and getattr(text, "use_sliding_window", True):
        refuse("sliding_window", text.sliding_window, "full attention: null")
    if text.hidden_act != "silu":
        refuse("hidden_act", text.hidden_act, "'silu'")
    if text.attention_bias:
        refuse("attention_bias", text.attention_bias, "no biases: false")
    if text.attention_dropout:
        refuse("attention_dropout", text.attention_dropout, "none: 0.0")
    if rope["rope_type"] not in ("default", "mrope"):
        refuse("rope_scaling.rope_type", rope["rope_type"], "'default'")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    mrope_section = tuple(rope.get("mrope_section", [24, 20, 20]))
    # Their sum need not be head_dim / 2: transformers cuts what is too much, and leaves to time
    # what is missing.
    if len(mrope_section) != 3 or not all(
        isinstance(size, int) and size >= 0 for size in mrope_section
    ):
        refuse(
            "rope_scaling.mrope_section", list(mrope_section), "three sizes: time, height, width"
        )
    if not float(rope["rope_theta"]) > 0:
        refuse("rope_theta", rope["rope_theta"], "a number above 0")
    if text.num_attention_heads % text.num_key_value_heads:
        refuse(
            "num_key_value_heads",
            text.num_key_value_heads,
            f"a divisor of num_attention_heads {text.num_attention_heads}",
        )
    return ModelArgs(
        prefix=prefix,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=head_dim,
        num_experts=text.num_experts,
        num_experts_per_tok=text.num_experts_per_tok,
        norm_topk_prob=text.norm_topk_prob,
        moe_intermediate_size=text.moe_intermediate_size,
        vocab_size=text.vocab_size,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        mrope_section=mrope_section,
        tie_word_embeddings=thinker.tie_word_embeddings,
    )
