"""How PEFT names an adapter's tensors: one for every expert under transformers 4, experts fused
into stacked parameters under 5, with or without `thinker.` and the adapter's own name.
"""

import re

from megatron_gkd.lora.adapter import ROOT

NAME = re.compile(
    r"base_model\.model\.(?:thinker\.)?model\.(?:language_model\.)?layers\."
    r"(\d+\.(?:self_attn\.[qkvo]_proj|mlp\.experts\.\d+\.(?:gate|up|down)_proj))"
    r"\.lora_([AB])\.(?:default\.)?weight"
)
FUSED_NAME = re.compile(
    r"base_model\.model\.(?:thinker\.)?model\.(?:language_model\.)?layers\.(\d+)\."
    r"mlp\.experts\.((?:base_layer\.)?)lora_([AB])\.(?:default\.)?weight"
)
HEAD_NAME = re.compile(
    r"base_model\.model\.(?:thinker\.)?lm_head\.lora_([AB])\.(?:default\.)?weight"
)
TOWER_NAME = re.compile(
    r"base_model\.model\.(?:thinker\.)?(?:model\.)?"
    r"(audio_tower\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|fc[12])"
    r"|visual\.blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.linear_fc[12]))"
    r"\.lora_([AB])\.(?:default\.)?weight"
)
# What PEFT saves of the base beside LoRA on the lm_head.
BASE_NAME = re.compile(
    r"base_model\.model\.(?:thinker\.)?(?:model\.)?(?:language_model\.)?"
    r"(lm_head|embed_tokens)(?:\.base_layer)?\.weight"
)
OUTSIDE = re.compile(r"base_model\.model\.(talker|code2wav)\..*\.lora_[AB]\.(?:default\.)?weight")
SPELLINGS = [
    f"{root}model.{inner}layers." for root in ("", "thinker.") for inner in ("", "language_model.")
]
HEAD_SPELLINGS = ["", "thinker."]


def linear_of(name: str) -> str:
    """q_proj of "....q_proj.lora_A.weight"."""
    return name.rsplit(".", 3)[1]


def layer_and_linear(name: str) -> tuple[str, str]:
    """("3", "q_proj") of a tensor of layer 3, whichever expert's; ("", "lm_head") of the head's."""
    if not name.startswith(ROOT):
        return "", linear_of(name)
    return name[len(ROOT) :].split(".")[0], linear_of(name)
