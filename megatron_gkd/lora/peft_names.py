"""How an adapter's tensors are named, as patterns built from a family's roots.

PEFT writes what it finds in memory: under transformers 4 a linear for every expert, under 5 one
stacked parameter for all experts of a layer. The roots depend on which part of the model PEFT saw;
wrappers of other programs may stand before them, and the adapter's own name behind.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from megatron_gkd.families import Family
from megatron_gkd.lora_targets import before_layers

_NOTHING = r"(?!)"  # matches no string
# PEFT's own prefix, and what other programs put in its place or before it.
_WRAPPERS = r"(?:(?:base_model|model|module)\.)*?"
# What torch.compile, FSDP and recomputation put anywhere in a name.
_INSIDE = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OWN_NAME = r"(?:\.(?P<adapter>[^.]+))??"
_SIDE = rf"\.lora_(?P<side>[AB]){_OWN_NAME}\.weight"
_EMBEDDING_SIDE = rf"\.lora_embedding_(?P<side>[AB]){_OWN_NAME}"


@dataclass(frozen=True)
class PeftNames:
    """One pattern per kind of tensor, for `fullmatch`. Groups: `linear`, `side` (A or B), `adapter`
    (its own name, if it is there), and of `fused` `layer` and `inner`.
    """

    linear: re.Pattern[str]
    """`3.self_attn.q_proj` or `3.mlp.experts.5.up_proj`"""
    fused: re.Pattern[str]
    """All experts of a layer. inner: `base_layer.` or nothing (PEFT puts its second module on the
    experts around the first)"""
    head: re.Pattern[str]
    """LoRA on the lm_head"""
    tower: re.Pattern[str]
    """`audio_tower.layers.0.fc1`"""
    router: re.Pattern[str]
    """`3.mlp.gate`"""
    tower_rest: re.Pattern[str]
    """The towers' other linears and convolutions: `audio_tower.proj1`"""
    embedding: re.Pattern[str]
    """`embed_tokens`, `visual.pos_embed`"""
    base_copy: re.Pattern[str]
    """What PEFT saves of the base beside LoRA on the lm_head. linear: lm_head or embed_tokens"""
    outside: re.Pattern[str]
    """LoRA on the family's other models"""
    layer_spellings: tuple[str, ...]
    """What may come before `3.self_attn.q_proj` in the patterns of adapter_config.json"""
    inside_spellings: tuple[str, ...]
    """What may come before `audio_tower` or `embed_tokens` there"""
    head_spellings: tuple[str, ...]
    """What may come before `lm_head` there"""


@lru_cache
def peft_names(family: Family) -> PeftNames:
    """The names that adapters for a model of this family may have."""
    root = _WRAPPERS + _one_of(family.adapter_roots)
    layers = rf"{root}{_one_of(family.inner_roots)}layers\."
    inside = rf"{root}{_one_of(('', *family.inner_roots))}"
    in_towers = [
        rf"{tower.name}\.{tower.layers}\.\d+\.{_one_of(tower.lora_linears)}"
        for tower in family.towers
    ]
    towers = _one_of(tuple(tower.name for tower in family.towers))
    of_layer = r"self_attn\.[qkvo]_proj|mlp\.experts\.\d+\.(?:gate|up|down)_proj"
    return PeftNames(
        linear=re.compile(rf"{layers}(?P<linear>\d+\.(?:{of_layer})){_SIDE}"),
        fused=re.compile(
            rf"{layers}(?P<layer>\d+)\.mlp\.experts(?P<inner>(?:\.base_layer)?){_SIDE}"
        ),
        head=re.compile(rf"{root}(?P<linear>lm_head){_SIDE}"),
        tower=re.compile(rf"{inside}(?P<linear>{'|'.join(in_towers) or _NOTHING}){_SIDE}"),
        router=re.compile(rf"{layers}(?P<linear>\d+\.mlp\.gate){_SIDE}"),
        tower_rest=re.compile(rf"{inside}(?P<linear>{towers}\..+?){_SIDE}"),
        embedding=re.compile(rf"{inside}(?P<linear>embed_tokens|{towers}\.\w+){_EMBEDDING_SIDE}"),
        base_copy=re.compile(rf"{inside}(?P<linear>lm_head|embed_tokens)(?:\.base_layer)?\.weight"),
        outside=re.compile(rf"{_WRAPPERS}{_one_of(family.other_models)}.*\.lora_.*"),
        layer_spellings=before_layers(family),
        inside_spellings=tuple(
            f"{outer}{inner}"
            for outer in family.adapter_roots
            for inner in ("", *family.inner_roots)
        ),
        head_spellings=family.adapter_roots,
    )


def unwrapped(name: str) -> str:
    """A tensor's name without what wrappers of torch put into it."""
    return _INSIDE.sub("", name)


def what_it_is(name: str) -> str:
    """What a tensor is that none of the patterns know, with the way out, for a message."""
    whole = "merge it with peft (merge_and_unload) and train the result"
    if ".lora_magnitude_vector" in name:
        return f"DoRA's magnitude, and plain LoRA has none: {whole}"
    if ".modules_to_save." in name or ".trainable_tokens" in name:
        return f"of a module that was trained whole (modules_to_save, trainable tokens): {whole}"
    if ".lora_" not in name:
        return (
            "no LoRA: the file holds weights of the base as well; save the adapter alone, with "
            "peft's save_pretrained"
        )
    if re.search(r"\.linear_(qkv|proj|fc1|fc2)\.|\.decoder\.layers\.", name):
        return (
            "named as in Megatron: export the adapter to Hugging Face's names first (in ms-swift "
            "`megatron export --to_hf true`)"
        )
    return (
        "LoRA on a linear that this model does not have; was the adapter made for another model or "
        "size?"
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
