"""adapter_config.json, read and written."""

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from megatron_gkd.errors import short_repr
from megatron_gkd.families import Family
from megatron_gkd.json_fields import TEXT, TRUTH, Form, check_fields, is_number
from megatron_gkd.lora_targets import EXPERTS, layers_of, names_of

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
# Settings of PEFT's LoraConfig that change what the tensors mean, with the value at which they do
# not.
_PLAIN: dict[str, Any] = {
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "use_qalora": False,
    "bias": "none",
    "modules_to_save": [],
    "layer_replication": [],
    "alora_invocation_tokens": [],
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
# How to make plain LoRA, or none, of an adapter with one of them.
_MERGE = "merge the adapter with peft (merge_and_unload, save_pretrained) and use the result"
# Ways to start that leave the base alone; others (PiSSA, OLoRA, ...) move a part of it into the
# adapter.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _is_pattern(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_positive, value.values()))


def _are_layers(value: Any) -> bool:
    return all(type(layer) is int for layer in (value if isinstance(value, list) else [value]))


def _is_text_or_names(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return all(isinstance(name, str) for name in names)


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


_FORMS = {
    "rank_pattern": Form("numbers above 0 by module", _is_pattern),
    "alpha_pattern": Form("numbers above 0 by module", _is_pattern),
    "layers_to_transform": Form("a number or a list of numbers", _are_layers),
    "use_rslora": TRUTH,
    "target_modules": Form("a name, a pattern or a list of names", _is_text_or_names),
    "exclude_modules": Form("a name, a pattern or a list of names", _is_text_or_names),
    "lora_dropout": Form("a number from 0 to 1", _is_share),
    "base_model_name_or_path": TEXT,
    "layers_pattern": Form("a name, a pattern or a list of names", _is_text_or_names),
}


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of an adapter folder. Raises ValueError naming one that plain LoRA cannot
    represent.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not the settings of an adapter, a JSON object")
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: peft_type {short_repr(config.get('peft_type'))}, and only LORA adapters "
            f"load; where peft can merge that kind, {_MERGE}"
        )
    for setting in ("lora_alpha", "r"):
        if not _is_positive(config.get(setting)):
            value = short_repr(config[setting]) if setting in config else "missing"
            raise ValueError(
                f"{path}: {setting} is {value}, and the scale alpha / r of the update is unknown: "
                "write the number there that the adapter was trained with"
            )
    stated = {name: value for name, value in config.items() if value is not None}
    check_fields(path, stated, _FORMS)
    for setting, neutral in _PLAIN.items():
        if config.get(setting) not in (None, neutral):
            raise ValueError(
                f"{path}: {setting} = {short_repr(config[setting])} is not supported "
                f"(expected {neutral!r}); {_MERGE}, or train it without"
            )
    if config.get("init_lora_weights") not in _STARTS:
        raise ValueError(
            f"{path}: init_lora_weights = {short_repr(config['init_lora_weights'])} belongs to a "
            f"changed base model; save it as plain LoRA with PEFT (save_pretrained with "
            f"path_initial_model_for_weight_conversion), or {_MERGE}"
        )
    return config


def pattern_value(
    patterns: dict[str, float], module: str, spellings: Iterable[str], default: float
) -> float:
    """What rank_pattern or alpha_pattern says of `module` ("0.self_attn.q_proj"), which a pattern
    may spell out after any of `spellings`; `default` where no pattern matches. Raises ValueError
    for a pattern that is no regular expression.
    """
    for pattern, value in patterns.items():
        try:
            expression = re.compile(rf"(.*\.)?({pattern})")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        if any(expression.fullmatch(spelling + module) for spelling in spellings):
            return value
    return default


def peft_config(
    family: Family,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    base_model: str,
    use_rslora: bool = False,
    towers: Collection[str] = (),
) -> dict:
    """adapter_config.json for PEFT. towers: linears outside the decoder's targets with LoRA, by
    name.

    The decoder's names are bare (PEFT rewrites those of fused experts), so the towers without LoRA
    and the other models, whose linears have the same names, are excluded. PEFT refuses dropout on
    fused experts even at inference: an adapter with experts states 0.
    """
    has_experts = any(name in EXPERTS for name in names_of(targets))
    with_lora = {name.split(".")[0] for name in towers}
    excluded = [name for name in family.excluded_modules if name not in with_lora]
    exclude = {"exclude_modules": f".*({'|'.join(excluded)}).*"} if excluded else {}
    # PEFT fuses gate and up to twice the rank and twice alpha, which with alpha / sqrt(r) is not
    # the same scale; a pattern of the adapter's own comes before PEFT's.
    fused = (
        {"alpha_pattern": {"gate_up_proj": alpha * 2**0.5}} if use_rslora and has_experts else {}
    )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        **fused,
        "lora_dropout": 0.0 if has_experts else dropout,
        "bias": "none",
        **saved_modules(targets, towers),
        **exclude,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "use_rslora": use_rslora,
        "use_dora": False,
    }


def saved_targets(targets: list[str]) -> list[str]:
    """The linears whose tensors an adapter on disk has: PEFT loads gate, up and down of all experts
    of all layers together or not at all, so missing ones are saved as zeros.
    """
    others = [target for target in targets if names_of([target])[0] not in EXPERTS]
    return targets if len(others) == len(targets) else others + list(EXPERTS)


def saved_modules(targets: list[str], others: Collection[str] = ()) -> dict[str, Any]:
    """target_modules, and layers_to_transform where all linears have the same layers and there are
    no `others`: PEFT takes those for layers too. Otherwise attention that differs by layer is named
    layer by layer.
    """
    layers = [layers_of(targets, name) for name in names_of(targets)]
    saved = saved_targets(targets)
    if layers and layers[0] and all(of == layers[0] for of in layers) and not others:
        return {"target_modules": names_of(saved), "layers_to_transform": layers[0]}
    paths = [
        f"layers.{target.replace('.', '.self_attn.')}" if "." in target else target
        for target in saved
    ]
    return {"target_modules": paths + list(others)}
