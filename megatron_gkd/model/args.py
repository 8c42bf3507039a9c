"""A Hugging Face `config.json` -> the sizes of the decoder.

Read as plain JSON, with transformers' defaults as the model's family states them: transformers and
torch take seconds to import, and the planner needs neither. What this decoder cannot represent
is refused by the name of the setting, never approximated.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from megatron_gkd.errors import short_repr
from megatron_gkd.families import Family, families, family_of
from megatron_gkd.json_fields import TRUTH, check_fields, read_object
from megatron_gkd.links import check_link, check_links
from megatron_gkd.model.config_fields import check_rope, check_tower, text_settings

# Tokenizer, template, processors, index: who is there does not say whether it is missed.
_READ_BESIDE = (".json", ".jinja", ".model", "merges.txt", "vocab.txt")
_DEFAULT_MROPE_SECTION = (24, 20, 20)  # transformers' own


@dataclass(frozen=True)
class ModelArgs:
    """Every size of the decoder, as read from the folder's config.json."""

    model_type: str  # of config.json
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
    mrope_section: tuple[int, ...]  # (head_dim / 2, 0, 0) where one position turns all channels
    tie_word_embeddings: bool
    path: Path = field(default=Path("config.json"), compare=False)  # of the file

    @property
    def family(self) -> Family:
        """Names of tensors and adapters, towers and classes."""
        return family_of(self.model_type)

    @property
    def prefix(self) -> str:
        """What stands before `model.layers...` and `lm_head` in the folder's tensor names."""
        return self.family.prefixes[self.model_type]

    def padded_vocab_size(self, tp_size: int) -> int:
        """Rows of embedding and lm_head over all TP ranks, 128 k each; those past `vocab_size` are
        zero and masked.
        """
        multiple = 128 * tp_size
        return (self.vocab_size + multiple - 1) // multiple * multiple


@dataclass(frozen=True)
class FolderConfig:
    """FOLDER/config.json of a model of one of the families."""

    path: Path
    model_type: str
    settings: dict[str, Any]
    """Of decoder and towers: the whole file, or the family's `section` of it"""

    @property
    def family(self) -> Family:
        return family_of(self.model_type)

    @property
    def prefix(self) -> str:
        """Of the tensor names of decoder and towers."""
        return self.family.prefixes[self.model_type]

    @property
    def text(self) -> dict[str, Any]:
        """The decoder's settings."""
        section = self.family.text_section
        return self.settings[section] if section else self.settings

    def load(self) -> Any:
        """transformers' config of decoder and towers. Raises ValueError naming the file."""
        from huggingface_hub.errors import StrictDataclassError

        try:
            return self.family.config_class().from_dict(self.settings)
        except (ValueError, StrictDataclassError) as error:
            raise ValueError(f"{self.path}: {' '.join(str(error).split())}") from error


def read_config(folder: str | Path) -> FolderConfig:
    """FOLDER/config.json. Raises FileNotFoundError, or ValueError naming the file: not JSON, a
    model of no family, a section that is missing.
    """
    path = Path(folder) / "config.json"
    check_link(path, f"--model {folder}: ")
    if not path.is_file():
        inside = (path.parent / "metadata.json").is_file()
        way_out = (
            f"; this is the inside of a Megatron checkpoint: give {path.parent.resolve().parent}"
            if inside
            else ""
        )
        titles = " or ".join(sorted(family.title for family in families().values()))
        raise FileNotFoundError(
            f"--model {folder}: no config.json there; expected a Hugging Face folder of {titles}, "
            f"or a checkpoint of checkpoint_tools.hf_to_megatron{way_out}"
        )
    raw = read_object(path, "the settings of a model")
    model_type: Any = raw.get("model_type")
    try:
        if not isinstance(model_type, str):
            raise ValueError(f"model_type is {short_repr(model_type)}, and must be a text")
        family = family_of(model_type)
        section = family.section if family.prefixes[model_type] else ""
        settings: Any = raw.get(section) if section else raw
        text = settings
        if isinstance(settings, dict) and family.text_section:
            text = settings.get(family.text_section)
        if not isinstance(text, dict) or not text:
            missing = ".".join(name for name in (section, family.text_section) if name)
            raise ValueError(f"{missing} is missing")
        for where, part in (
            ("", raw),
            (f"{section}.", settings),
            (f"{family.text_section}.", text),
        ):
            _refuse_quantised(part, where, family)
        found = FolderConfig(path, model_type, _with_towers(settings, family))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for tower in family.towers:
        check_tower(path, tower, found.settings)
    return found


def _with_towers(settings: dict[str, Any], family: Family) -> dict[str, Any]:
    """Without sections of towers that are null, which means transformers' own sizes. Raises
    ValueError for one that is neither that nor an object.
    """
    names = {tower.config for tower in family.towers}
    for name in names:
        if not isinstance(settings.get(name, {}), dict | None):
            raise ValueError(f"{name} is a {type(settings[name]).__name__}, expected an object")
    return {key: of for key, of in settings.items() if key not in names or of is not None}


# How transformers gives plain weights of a quantised folder, by quant_method.
_DEQUANTISE = {
    "fp8": "(quantization_config=FineGrainedFP8Config(dequantize=True))",
    "bitsandbytes": "(FOLDER).dequantize()",
    "compressed-tensors": "(quantization_config=CompressedTensorsConfig(run_compressed=False))",
}
_SETTINGS = ("quantization_config", "compression_config")


def _refuse_quantised(settings: dict[str, Any], where: str, family: Family) -> None:
    """Raise ValueError where a part of config.json says that its weights are quantised, with where
    others come from.
    """
    for name in _SETTINGS:
        quantised = settings.get(name)
        if not quantised:
            continue
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        way_out = _DEQUANTISE.get(str(method))
        dequantised = f", or save it from transformers with from_pretrained{way_out}"
        raise ValueError(
            f"{where}{name} says that the weights are quantised ({method or 'method unknown'}), "
            f"and LoRA is trained beside bfloat16, float16 or float32 ones: take the "
            f"{family.title} folder that it was made from (on the hub the one without FP8, AWQ, "
            f"GPTQ or Int4 in its name){dequantised if way_out else ''}"
        )


def read_model_args(folder: str | Path) -> ModelArgs:
    """Read FOLDER/config.json. Raises FileNotFoundError, also for a link beside it that leads
    nowhere, or ValueError naming the file and the setting that is unsupported or has another type
    or range.
    """
    check_links(folder, _READ_BESIDE, f"--model {folder}: ")
    config = read_config(folder)
    where = _where(config)
    text = text_settings(config.path, where, config.text, config.family)

    def refuse(setting: str, value: Any, supported: str) -> NoReturn:
        raise ValueError(
            f"{config.path}: {where}{setting} = {short_repr(value)} is not supported "
            f"(this decoder has {supported})"
        )

    head_dim = text["head_dim"]
    head_dim = text["hidden_size"] // text["num_attention_heads"] if head_dim is None else head_dim
    if head_dim < 2 or head_dim % 2:
        refuse("head_dim", head_dim, "an even number")
    if text["mlp_only_layers"]:
        every = "a mixture of experts in every layer: []"
        refuse("mlp_only_layers", text["mlp_only_layers"], every)
    if text["decoder_sparse_step"] != 1:
        every = "a mixture of experts in every layer: 1"
        refuse("decoder_sparse_step", text["decoder_sparse_step"], every)
    num_experts, per_token = text["num_experts"], text["num_experts_per_tok"]
    if per_token > num_experts:
        refuse("num_experts_per_tok", per_token, f"num_experts {num_experts}")
    if per_token == 1 and text["norm_topk_prob"]:
        refuse("num_experts_per_tok", 1, "at least 2 where norm_topk_prob is true")
    if text["sliding_window"] and text["use_sliding_window"]:
        refuse("sliding_window", text["sliding_window"], "full attention: null")
    if text["hidden_act"] != "silu":
        refuse("hidden_act", text["hidden_act"], "'silu'")
    if text["attention_bias"]:
        refuse("attention_bias", text["attention_bias"], "no biases: false")
    if text["attention_dropout"]:
        refuse("attention_dropout", text["attention_dropout"], "none: 0.0")
    if text["num_attention_heads"] % text["num_key_value_heads"]:
        refuse(
            "num_key_value_heads",
            text["num_key_value_heads"],
            f"a divisor of num_attention_heads {text['num_attention_heads']}",
        )
    return ModelArgs(
        model_type=config.model_type,
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        num_attention_heads=text["num_attention_heads"],
        num_key_value_heads=text["num_key_value_heads"],
        head_dim=head_dim,
        num_experts=num_experts,
        num_experts_per_tok=per_token,
        norm_topk_prob=text["norm_topk_prob"],
        moe_intermediate_size=text["moe_intermediate_size"],
        vocab_size=text["vocab_size"],
        rms_norm_eps=float(text["rms_norm_eps"]),
        **_rope(config, text["rope_theta"], head_dim, refuse),
        tie_word_embeddings=_tie_word_embeddings(config),
        path=config.path,
    )


def _tie_word_embeddings(config: FolderConfig) -> bool:
    tied = config.settings.get("tie_word_embeddings", False)
    check_fields(config.path, {"tie_word_embeddings": tied}, {"tie_word_embeddings": TRUTH})
    return tied


def _where(config: FolderConfig) -> str:
    """What comes before a setting's name in a message."""
    section = config.family.text_section
    return f"{section}." if section else ""


def _rope(
    config: FolderConfig, rope_theta: float, head_dim: int, refuse: Callable[..., NoReturn]
) -> dict[str, Any]:
    """rope_theta and mrope_section. The hub writes `rope_theta` beside `rope_scaling`, transformers
    5 writes both into `rope_parameters`.
    """
    name = "rope_scaling" if config.text.get("rope_scaling") else "rope_parameters"
    rope = config.text.get(name) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        refuse(name, rope, "one rotary embedding for all layers")
    check_rope(config.path, f"{_where(config)}{name}.", rope)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    interleaved = config.family.interleaved_mrope
    if rope_type not in (("default", "mrope") if interleaved else ("default",)):
        refuse(f"{name}.rope_type", rope_type, "'default'")
    partial = rope.get("partial_rotary_factor", config.text.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        refuse("partial_rotary_factor", partial, "1.0")
    rope_theta = rope.get("rope_theta", rope_theta)
    if not interleaved:
        return {"rope_theta": float(rope_theta), "mrope_section": (head_dim // 2, 0, 0)}
    mrope_section = rope.get("mrope_section", _DEFAULT_MROPE_SECTION)
    # Their sum need not be head_dim / 2: transformers cuts what is too much, and leaves to time
    # what is missing.
    return {"rope_theta": float(rope_theta), "mrope_section": tuple(mrope_section)}
