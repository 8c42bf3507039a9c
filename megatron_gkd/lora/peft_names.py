"""How PEFT names an adapter's tensors, as patterns built from a family's roots.

PEFT writes what it finds in memory: under transformers 4 a linear for every expert, under 5 one
stacked parameter for all experts of a layer. The roots depend on which part of the model PEFT saw,
and the adapter's own name may be there or not.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from megatron_gkd.families import Family

_NOTHING = r"(?!)"  # matches no string
_SIDE = r"\.lora_([AB])\.(?:default\.)?weight"


@dataclass(frozen=True)
class PeftNames:
    """One pattern per kind of tensor, for `fullmatch`."""

    linear: re.Pattern[str]
    """Groups: `3.self_attn.q_proj` or `3.mlp.experts.5.up_proj`; A or B"""
    fused: re.Pattern[str]
    """All experts of a layer. Groups: layer; `base_layer.` or nothing (PEFT puts its second module
    on the experts around the first); A or B"""
    head: re.Pattern[str]
    """LoRA on the lm_head. Group: A or B"""
    tower: re.Pattern[str]
    """Groups: `audio_tower.layers.0.fc1`; A or B"""
    base_copy: re.Pattern[str]
    """What PEFT saves of the base beside LoRA on the lm_head. Group: lm_head or embed_tokens"""
    outside: re.Pattern[str]
    """LoRA on the family's other models"""
    layer_spellings: tuple[str, ...]
    """What may come before `3.self_attn.q_proj` in the patterns of adapter_config.json"""
    head_spellings: tuple[str, ...]
    """What may come before `lm_head` there"""


@lru_cache
def peft_names(family: Family) -> PeftNames:
    """The names that adapters for a model of this family may have."""
    root = rf"base_model\.model\.{_one_of(family.adapter_roots)}"
    layers = rf"{root}{_one_of(family.inner_roots)}layers\."
    inside = rf"{root}{_one_of(('', *family.inner_roots))}"
    in_towers = [
        rf"{tower.name}\.{tower.layers}\.\d+\.{_one_of(tower.lora_linears)}"
        for tower in family.towers
    ]
    return PeftNames(
        linear=re.compile(
            rf"{layers}(\d+\.(?:self_attn\.[qkvo]_proj|mlp\.experts\.\d+\.(?:gate|up|down)_proj))"
            + _SIDE
        ),
        fused=re.compile(
            rf"{layers}(\d+)\.mlp\.experts\.((?:base_layer\.)?)"
            r"lora_([AB])\.(?:default\.)?weight"
        ),
        head=re.compile(rf"{root}lm_head{_SIDE}"),
        tower=re.compile(rf"{inside}({'|'.join(in_towers) or _NOTHING}){_SIDE}"),
        base_copy=re.compile(rf"{inside}(lm_head|embed_tokens)(?:\.base_layer)?\.weight"),
        outside=re.compile(rf"base_model\.model\.{_one_of(family.other_models)}.*{_SIDE}"),
        layer_spellings=tuple(
            f"{outer}{inner}layers."
            for outer in family.adapter_roots
            for inner in family.inner_roots
        ),
        head_spellings=family.adapter_roots,
    )


def _one_of(texts: tuple[str, ...]) -> str:
    return f"(?:{'|'.join(map(re.escape, texts))})" if texts else _NOTHING


def linear_of(name: str) -> str:
    """q_proj of "....q_proj.lora_A.weight"."""
    return name.rsplit(".", 3)[1]


def layer_and_linear(name: str, family: Family) -> tuple[str, str]:
    """("3", "q_proj") of a tensor of layer 3, whichever expert's; ("", "lm_head") of the head's."""
    if not name.startswith(family.adapter_layers):
        return "", linear_of(name)
    return name[len(family.adapter_layers) :].split(".")[0], linear_of(name)
