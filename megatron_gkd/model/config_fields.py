"""What the fields of a model's config.json may hold: types and ranges, checked before one is used.

Whether sizes in their range are those of the weights: formats/config_sizes.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_gkd.errors import short_repr
from megatron_gkd.families import Family, Tower
from megatron_gkd.json_fields import TEXT, TRUTH, Form, check_fields, is_number, whole

MOST_LAYERS = 1024  # more are a mistake in the file, or an attack
_SIZE = whole(1, 2**40)
_LAYERS = whole(1, MOST_LAYERS)
_LAYERS_OF_TOWER = whole(0, MOST_LAYERS)  # a run on text alone may have none
_ABOVE_0 = Form("a number above 0", lambda value: is_number(value) and value > 0)
_SHARE = Form("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)


def _or_null(form: Form) -> Form:
    return Form(f"null or {form.words}", lambda value: value is None or form.holds(value))


_EVEN = Form(
    f"an even number from 2 to {2**20:,}",
    lambda value: type(value) is int and 2 <= value <= 2**20 and value % 2 == 0,
)
_LIST = Form("a list", lambda value: isinstance(value, list))
_WHOLE = Form("a whole number of at least 0", lambda value: type(value) is int and value >= 0)
_SECTIONS = Form(
    "three sizes: time, height, width",
    lambda value: (
        isinstance(value, list) and len(value) == 3 and all(map(whole(0, 2**20).holds, value))
    ),
)

# Of each setting of `Family.text_defaults`.
_TEXT_FORMS: dict[str, Form] = {
    "num_hidden_layers": _LAYERS,
    "hidden_size": _SIZE,
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _SIZE,
    "head_dim": _or_null(_EVEN),
    "num_experts": _SIZE,
    "num_experts_per_tok": _SIZE,
    "norm_topk_prob": TRUTH,
    "moe_intermediate_size": _SIZE,
    "mlp_only_layers": _or_null(_LIST),
    "decoder_sparse_step": _WHOLE,
    "vocab_size": _SIZE,
    "hidden_act": TEXT,
    "rms_norm_eps": _ABOVE_0,
    "rope_theta": _ABOVE_0,
    "attention_bias": TRUTH,
    "attention_dropout": _SHARE,
    "sliding_window": _or_null(_WHOLE),
    "use_sliding_window": _or_null(TRUTH),
}
# Of rope_scaling or rope_parameters.
_ROPE_FORMS = {"rope_theta": _ABOVE_0, "mrope_section": _SECTIONS}
# Of a tower no weight tells: a table that is computed, media that are encoded at once.
_TOWER_FORMS = {"max_source_positions": whole(1, 2**20), "num_mel_bins": whole(1, 2**16)}
_NUMBERS_OF_MODULES = {
    "num_hidden_layers",
    "encoder_layers",
    "depth",
    "num_code_groups",
    "num_quantizers",
}
_LAYER_NUMBERS = Form(
    "a list of numbers of layers",
    lambda value: isinstance(value, list | tuple) and all(map(_WHOLE.holds, value)),
)


def text_settings(
    path: Path, where: str, text: Mapping[str, Any], family: Family
) -> dict[str, Any]:
    """The settings of `Family.text_defaults`, as the config.json at `path` or transformers has
    them. where: what stands before their names in messages. Raises ValueError for one of another
    type or range.
    """
    found: dict[str, Any] = {}
    for name, default in family.text_defaults.items():
        known_as = spelling(name, text, family)
        found[name] = text.get(known_as, default)
        field = f"{where}{known_as}"
        check_fields(path, {field: found[name]}, {field: _TEXT_FORMS[name]})
    return found


def spelling(name: str, text: Mapping[str, Any], family: Family) -> str:
    """The name under which config.json has a setting of `Family.text_defaults`."""
    alias = family.aliases.get(name, name)  # wins in transformers where both are there
    return alias if alias in text else name


def check_rope(path: Path, where: str, rope: Mapping[str, Any]) -> None:
    """Raise ValueError for a field of rope_scaling of another type or range."""
    check_fields(
        path,
        {f"{where}{name}": value for name, value in rope.items()},
        {f"{where}{name}": form for name, form in _ROPE_FORMS.items()},
    )


def check_modules(path: Path, section: Any, where: str = "") -> None:
    """Raise ValueError for a setting, of whichever model in the config.json at `path`, that stands
    for a number of modules and is out of range: transformers would build them one by one.
    """
    if not isinstance(section, dict):
        return
    for name, value in section.items():
        field = f"{where}{name}"
        if name in _NUMBERS_OF_MODULES and isinstance(value, int | float):
            check_fields(path, {field: value}, {field: whole(0, MOST_LAYERS)})
        check_modules(path, value, f"{field}.")


def check_tower(path: Path, tower: Tower, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a size in a tower's section that is none, and for heads that do not
    divide its width.
    """
    sizes = tower.sizes(settings)
    for name, default in tower.defaults.items():
        form = _SIZE if isinstance(default, int) else _LAYER_NUMBERS
        form = _LAYERS_OF_TOWER if name == tower.num_layers else _TOWER_FORMS.get(name, form)
        field = tower.spelling(name, settings)
        check_fields(path, {field: sizes[name]}, {field: form})
    width, heads = tower.width_and_heads
    if sizes[width] % sizes[heads]:
        raise ValueError(
            f"{path}: {tower.spelling(heads, settings)} is {short_repr(sizes[heads])}, and must "
            f"divide {tower.spelling(width, settings)} {short_repr(sizes[width])}"
        )
