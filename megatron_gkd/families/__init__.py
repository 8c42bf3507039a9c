"""The families of models that can be trained. Each is one file in this folder, found by being
there: it holds FAMILY, and everything that the rest of the code asks about the family's names.
"""

import pkgutil
from functools import lru_cache
from importlib import import_module

from megatron_gkd.families.family import Family, Tower

__all__ = ["Family", "Tower", "families", "family_of", "language_sections", "tensor_prefixes"]


@lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    """Name of the file -> the family, sorted by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = {name: import_module(f"{__name__}.{name}") for name in names if name != "family"}
    return {name: module.FAMILY for name, module in modules.items()}


@lru_cache
def family_of(model_type: str) -> Family:
    """The family of a config.json's model_type. Raises ValueError naming those that are known."""
    by_type = {name: family for family in families().values() for name in family.prefixes}
    if model_type not in by_type:
        raise ValueError(
            f"model_type {model_type!r} is not supported; expected one of {sorted(by_type)}"
        )
    return by_type[model_type]


def language_sections() -> list[tuple[str, ...]]:
    """Where a config.json of any family may hold settings of the model that writes text: the keys
    that lead there, from the top down.
    """
    found: list[tuple[str, ...]] = [()]
    for family in families().values():
        section, text = ((name,) if name else () for name in (family.section, family.text_section))
        found += [section, (*section, *text), text]
    return list(dict.fromkeys(found))


def tensor_prefixes() -> list[str]:
    """What may stand before `model.` and `lm_head` in the folders of all families."""
    found = {prefix for family in families().values() for prefix in family.prefixes.values()}
    return sorted(found - {""})
