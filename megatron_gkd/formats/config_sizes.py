"""The sizes that config.json states against those of the weights' headers, setting by setting:
before anything is allocated, listed or built by what the file claims.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_gkd.errors import short_repr
from megatron_gkd.families import Tower
from megatron_gkd.model.args import FolderConfig, ModelArgs, read_config
from megatron_gkd.model.config_fields import spelling

Shapes = Mapping[str, Sequence[int]]  # tensor -> its shape by the header
FileOf = Callable[[str], Path]  # tensor -> the file with that header

_WAY_OUT = "correct config.json, or take it and the weights from one folder"
_AXES = ("rows", "columns")


class Place(NamedTuple):
    """Where the weights show a setting: `length` numbers along an axis of a tensor."""

    setting: str
    tensor: str
    axis: int
    length: int
    is_padded: bool = False
    """There may be more"""


def check_decoder_sizes(
    model_args: ModelArgs, shapes: Shapes, file_of: FileOf, places: Iterable[Place]
) -> bool:
    """Raise ValueError naming the setting of config.json, its value, and the tensor whose shape is
    another. Returns whether every tensor of `places` is there.
    """
    config = read_config(model_args.path.parent)
    complete = True
    for place in places:
        if place.tensor not in shapes:
            complete = False
            continue
        setting = spelling(place.setting, config.text, config.family)
        if place.setting == "head_dim" and config.text.get("head_dim") is None:
            setting = "num_attention_heads"  # hidden_size / that is the head
        section = config.family.text_section
        value = config.text.get(setting, config.family.text_defaults.get(place.setting))
        named = f"{section}.{setting}" if section else setting
        _compare(config.path, named, value, place, shapes, file_of)
    return complete


def folder_places(model_args: ModelArgs) -> list[Place]:
    """Of the decoder in a Hugging Face folder."""
    root, head = f"{model_args.prefix}model.", model_args.head_dim
    layer = f"{root}layers.0."
    attention, experts = f"{layer}self_attn.", f"{layer}mlp.experts.0."
    queries, keys = model_args.num_attention_heads * head, model_args.num_key_value_heads * head
    return [
        Place("vocab_size", f"{root}embed_tokens.weight", 0, model_args.vocab_size),
        Place("hidden_size", f"{root}embed_tokens.weight", 1, model_args.hidden_size),
        Place("head_dim", f"{attention}q_norm.weight", 0, head),
        Place("num_attention_heads", f"{attention}q_proj.weight", 0, queries),
        Place("num_key_value_heads", f"{attention}k_proj.weight", 0, keys),
        Place("num_experts", f"{layer}mlp.gate.weight", 0, model_args.num_experts),
        Place(
            "moe_intermediate_size",
            f"{experts}gate_proj.weight",
            0,
            model_args.moe_intermediate_size,
        ),
    ]


def checkpoint_places(model_args: ModelArgs, prefix: str) -> list[Place]:
    """Of the decoder in a Megatron checkpoint, whose tensors are stacks of layers. prefix: of the
    keys.
    """
    layers, head = f"{prefix}decoder.layers.", model_args.head_dim
    embedding = "embedding.word_embeddings.weight"
    heads, groups = model_args.num_attention_heads, model_args.num_key_value_heads
    norm, qkv = "self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.weight"
    fc1, inner = "mlp.experts.experts.linear_fc1.weight", model_args.moe_intermediate_size
    return [
        Place("vocab_size", f"{prefix}{embedding}", 0, model_args.vocab_size, is_padded=True),
        Place("num_hidden_layers", f"{layers}{norm}", 0, model_args.num_layers),
        Place("hidden_size", f"{layers}{norm}", 1, model_args.hidden_size),
        Place("head_dim", f"{layers}self_attention.q_layernorm.weight", 1, head),
        Place("num_attention_heads", f"{layers}self_attention.linear_proj.weight", 2, heads * head),
        Place("num_key_value_heads", f"{layers}{qkv}", 1, (heads + 2 * groups) * head),
        Place("num_experts", f"{layers}mlp.router.weight", 1, model_args.num_experts),
        Place("moe_intermediate_size", f"{layers}{fc1}", 2, 2 * inner),
    ]


def check_num_layers(model_args: ModelArgs, shapes: Shapes, file_of: FileOf) -> bool:
    """Raise ValueError where a Hugging Face folder has another number of layers than config.json.
    Returns whether it has any.
    """
    config = read_config(model_args.path.parent)
    section = config.family.text_section
    setting = f"{section}.num_hidden_layers" if section else "num_hidden_layers"
    ends = f"{model_args.prefix}model.layers.", ".input_layernorm.weight"
    found = _numbered(shapes, *ends)
    if found:
        _compare_number(config.path, setting, model_args.num_layers, found, shapes, file_of)
    return bool(found)


def check_tower_sizes(model_args: ModelArgs, shapes: Shapes, file_of: FileOf) -> None:
    """Raise ValueError naming a setting of a tower and the tensor whose shape is another. What the
    folder has nothing of passes.
    """
    config = read_config(model_args.path.parent)
    for tower in config.family.towers:
        _check_tower(config, tower, shapes, file_of)


def _check_tower(config: FolderConfig, tower: Tower, shapes: Shapes, file_of: FileOf) -> None:
    sizes, root = tower.sizes(config.settings), f"{config.prefix}{tower.name}."
    for setting, tensor, axis, length in tower.in_weights:
        wanted = length(sizes) if length else sizes[setting]
        place = Place(setting, root + tensor, axis, wanted)
        if place.tensor in shapes:
            named = tower.spelling(setting, config.settings)
            _compare(config.path, named, sizes[setting], place, shapes, file_of)
    for setting, modules in tower.counts.items():
        found = _numbered(shapes, f"{root}{modules}.", "")
        if found:
            named = tower.spelling(setting, config.settings)
            _compare_number(config.path, named, sizes[setting], found, shapes, file_of)


def _compare(
    path: Path, setting: str, value: Any, place: Place, shapes: Shapes, file_of: FileOf
) -> None:
    shape = shapes[place.tensor]
    found = shape[place.axis] if len(shape) > place.axis else 0
    if found == place.length or place.is_padded and found > place.length:
        return
    axis = _AXES[place.axis] if len(shape) == 2 else f"numbers along axis {place.axis}"
    raise ValueError(
        f"{path}: {setting} is {short_repr(value)}, which asks for {place.length:,} {axis} in "
        f"tensor {place.tensor}, and its shape in {file_of(place.tensor)} is {list(shape)}: "
        f"{_WAY_OUT}"
    )


def _numbered(shapes: Shapes, before: str, after: str) -> dict[int, str]:
    """number -> the first tensor whose name has it between `before` and `after`."""
    pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(after) or r'[.]'}")
    found: dict[int, str] = {}
    for name in shapes:
        if match := pattern.match(name):
            found.setdefault(int(match[1]), name)
    return found


def _compare_number(
    path: Path,
    setting: str,
    value: int | Sequence[int],
    found: dict[int, str],
    shapes: Shapes,
    file_of: FileOf,
) -> None:
    """value: how many there are, or a list with an element for each."""
    number = max(found) + 1
    if isinstance(value, int):
        length, stated = value, f"{value:,}"
    else:
        length, stated = len(value), f"{short_repr(value)}, of length {len(value)}"
    if length != number:
        last = found[number - 1]
        raise ValueError(
            f"{path}: {setting} is {stated}, and the weights have {number:,}: the last is that of "
            f"tensor {last}, of shape {list(shapes[last])} in {file_of(last)}; {_WAY_OUT}"
        )
