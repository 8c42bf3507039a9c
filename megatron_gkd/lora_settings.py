"""The settings of LoRA. Imports nothing slow."""

import re
from dataclasses import dataclass

from megatron_gkd.flags import (
    BELOW_1,
    POSITIVE,
    require,
    require_at_least,
    require_in,
    require_not_empty,
    setting,
)
from megatron_gkd.lora_targets import is_expression, parse_layers


@dataclass
class LoraConfig:
    _argument_group_name = "LoRA"

    lora_rank: int | None = setting(
        None, "Rank r of each W_down [r, in] and W_up [out, r]. Default: the adapter's, or 8."
    )
    lora_alpha: float | None = setting(
        None, "The update is scaled by alpha / r. Default: the adapter's scale, or alpha 16."
    )
    use_rslora: bool = setting(
        False,
        "rsLoRA: the update is scaled by alpha / sqrt(r) instead. An adapter that has it keeps it.",
    )
    lora_dropout: float = setting(0.05, "Dropout on the input of W_down while training.")
    lora_target_modules: list[str] = setting(
        [],
        "ALL (all-linear), or names with commas or spaces between: q_proj, k_proj, v_proj, o_proj, "
        "gate_proj, up_proj, down_proj; lm_head too, "
        "which needs all logits of a micro-batch at once; or, as in PEFT, a regular expression "
        "that the whole path of a linear matches, such as "
        r"'.*layers\.\d*[02468]\.self_attn\..*_proj'. "
        "Default: the adapter's, or ALL.",
        ["--target_modules"],
    )
    lora_layers: list[str] = setting(
        [],
        "The decoder layers that carry LoRA: 0-11,24 (from 0 on) or 'last 4'. "
        "Default: all of them, or the adapter's.",
        ["--layers_to_transform"],
    )
    lora_towers: bool = setting(
        False,
        "LoRA on attention and MLP of the audio and the vision tower too; else they are frozen.",
    )
    adapter: str | None = setting(
        None, "Start from this PEFT adapter folder instead of a fresh one."
    )

    def __post_init__(self):
        if self.lora_rank is not None:
            require_at_least(self, 1, "lora_rank")
        if self.lora_alpha is not None:
            require_in(self, POSITIVE, "lora_alpha", way_out="twice the rank is usual")
        require_in(self, BELOW_1, "lora_dropout")
        require_not_empty(self, "adapter")
        parse_layers(self.lora_layers)  # raises
        if is_expression(self.lora_target_modules):
            return self._check_expression()
        names = [
            name for word in self.lora_target_modules for name in word.replace(",", " ").split()
        ]
        words = " ".join(self.lora_target_modules)
        given = not self.lora_target_modules or bool(names)
        way_out = "leave the flag out for ALL"
        require(given, "lora_target_modules", repr(words), "ALL or names of linears", way_out)
        names = ["ALL" if name in ("ALL", "all", "all-linear") else name for name in names]
        alone, allowed = names == ["ALL"], "ALL alone, or names of linears"
        require(alone or "ALL" not in names, "lora_target_modules", ",".join(names), allowed)
        self.lora_target_modules = names

    def _check_expression(self) -> None:
        (expression,) = self.lora_target_modules
        try:
            re.compile(expression)
        except re.error as error:
            allowed = f"ALL, names of linears, or a regular expression ({error})"
            require(False, "lora_target_modules", expression, allowed)
        require(
            not self.lora_layers,
            "lora_layers",
            " ".join(self.lora_layers),
            "left out where --lora_target_modules is a regular expression",
            "the expression can name layers",
        )

    @property
    def rank(self) -> int:
        """--lora_rank, where it is set or has been filled in (adapters.py)."""
        assert self.lora_rank is not None
        return self.lora_rank

    @property
    def alpha(self) -> float:
        """--lora_alpha, where it is set or has been filled in."""
        assert self.lora_alpha is not None
        return self.lora_alpha

    @property
    def plain_alpha(self) -> float:
        """The alpha whose alpha / r is the scale, with rsLoRA too."""
        return self.alpha * (self.rank / scale_divisor(self.rank, self.use_rslora))


def scale_divisor(rank: int, use_rslora: bool) -> float:
    """What alpha is divided by: the rank, or with rsLoRA its square root."""
    return rank**0.5 if use_rslora else rank
