"""`--recipe`: the defaults that a paper used, a YAML file each in recipes/, which names its source.
The file of --config wins over them, and flags over both. Imports nothing slow.
"""

import os
import re
from collections.abc import Container, Sequence
from pathlib import Path

from megatron_gkd.flags import FLAG, Parser, with_config_file, yaml_flags

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """What --recipe may be."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def with_recipe(argv: Sequence[str], parser: Parser, others: Container[str] = ()) -> list[str]:
    """The flags of the recipe, of the file that --config names, and `argv`: the last of a name
    holds. Rank 0 prints what came from where, if there is a recipe. others: as in
    `with_config_file`.

    Raises ValueError for a recipe that does not exist, and as `yaml_flags`.
    """
    after_recipe = with_config_file(argv, parser, others)
    recipe_parser = Parser(add_help=False)
    recipe_parser.add_argument("--recipe")
    name = recipe_parser.parse_known_args(after_recipe)[0].recipe
    if name in (None, "none"):
        return after_recipe
    if name not in recipe_names():
        raise ValueError(f"--recipe {name}: must be one of {', '.join(recipe_names())}, or none")
    of_recipe = yaml_flags(str(RECIPES / f"{name}.yaml"), parser, flag="--recipe")
    of_file = after_recipe[: len(after_recipe) - len(argv)]
    if os.environ.get("RANK", "0") == "0":
        lists = {f"--recipe {name}": of_recipe, "--config": of_file, "flags": list(argv)}
        print("\n".join(origins(lists, parser)), flush=True)
    return of_recipe + after_recipe


def origins(lists: dict[str, list[str]], parser: Parser) -> list[str]:
    """A line for each list of flags, by what it comes from: the settings that hold, none of which a
    later list has; and one for what the first list has in vain.
    """
    found = {origin: given_values(words, parser) for origin, words in lists.items()}
    lines, later = [], [set().union(*list(found.values())[n + 1 :]) for n in range(len(found))]
    for (origin, values), others in zip(found.items(), later):
        held = [f"{name}={value}" for name, value in values.items() if name not in others]
        if held:
            lines.append(f"Settings from {origin}: {' '.join(held)}")
    (first, values), *_ = found.items()
    vain = [f"{name}={value}" for name, value in values.items() if name in later[0]]
    if vain:
        lines.append(f"Not from {first}, given elsewhere: {' '.join(vain)}")
    return lines


def given_values(words: Sequence[str], parser: Parser) -> dict[str, str]:
    """Setting -> its value as it is written, of the flags in `words`."""
    values: dict[str, str] = {}
    name = ""
    for word in words:
        option, is_joined, value = word.partition("=")
        action = parser._option_string_actions.get(option)
        if action is not None:
            name = action.dest
            is_switch = action.nargs == 0  # --no_NAME
            values[name] = value if is_joined else "false" if is_switch else ""
        elif re.fullmatch(FLAG, word):
            name = ""  # no setting of ours
        elif name:
            values[name] = f"{values[name]},{word}" if values[name] else word
    return {name: value or "true" for name, value in values.items()}
