"""adapter_config.json, read and written."""

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from megatron_gkd.families import Family
from megatron_gkd.lora.adapter import EXPERTS

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
}
# Ways to start that leave the base alone; others (PiSSA, OLoRA, ...) move a part of it into the
# adapter.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of an adapter folder. Raises ValueError naming one that plain LoRA cannot
    represent.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {config.get('peft_type')!r}; only LORA adapters load")
    if "lora_alpha" not in config:
        raise ValueError(f"{path}: lora_alpha is missing")
    for setting, neutral in _PLAIN.items():
        if config.get(setting) not in (None, neutral):
            raise ValueError(
                f"{path}: {setting} = {config[setting]!r} is not supported (expected {neutral!r})"
            )
    if config.get("init_lora_weights") not in _STARTS:
        raise ValueError(
            f"{path}: init_lora_weights = {config['init_lora_weights']!r} belongs to a changed "
            "base model; save it as plain LoRA with PEFT (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
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
            return float(value)
    return default


def peft_config(
    family: Family,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    base_model: str,
    towers: Collection[str] = (),
) -> dict:
    """adapter_config.json for PEFT. towers: their linears with LoRA, by name.

    The decoder's names are bare (PEFT rewrites those of fused experts), so the towers without LoRA
    and the other models, whose linears have the same names, are excluded. PEFT refuses dropout on
    fused experts even at inference: an adapter with experts states 0.
    """
    has_experts = any(name in EXPERTS for name in targets)
    with_lora = {name.split(".")[0] for name in towers}
    excluded = [name for name in family.excluded_modules if name not in with_lora]
    exclude = {"exclude_modules": f".*({'|'.join(excluded)}).*"} if excluded else {}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if has_experts else dropout,
        "bias": "none",
        "target_modules": saved_targets(targets) + list(towers),
        **exclude,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def saved_targets(targets: list[str]) -> list[str]:
    """The linears an adapter on disk names: PEFT loads an expert's gate, up and down together or
    not at all, so missing ones are saved as zeros.
    """
    if any(name in EXPERTS for name in targets):
        return [name for name in targets if name not in EXPERTS] + list(EXPERTS)
    return targets
