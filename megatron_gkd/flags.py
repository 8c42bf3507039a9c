"""Dataclass fields as flags of a command line or lines of a YAML file, and their error messages.

argparse parses; the flags are those that `transformers.HfArgumentParser` would make, whose import
alone takes more than a second. Used by the training command and by the tools.
"""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

import yaml

from megatron_gkd.last_words import say_in_turn

# Names from other programs -> the setting that does it here.
OTHER_NAMES = {
    "lr": "learning_rate",
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "tensorboard": "report_to",
}
FLAG = r"--\S+|-[^-\d.\s]\S*"  # not a negative number, a text, or `--` alone
NEAR = 0.7  # difflib's measure of likeness; what is less like a name is no misspelling of it
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def setting(default: Any, help: str, aliases: list[str] | None = None) -> Any:
    """A dataclass field with its help text; a list as default is copied for each instance."""
    metadata = {"help": help} | ({"aliases": aliases} if aliases else {})
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def require(ok: bool, flag: str, value: Any, allowed: str, way_out: str = "") -> None:
    """Raise ValueError unless `ok`, naming the flag, its value, what is allowed and, where it
    helps, the way out.
    """
    if not ok:
        raise ValueError(
            f"--{flag} {value}: must be {allowed}" + (f"; {way_out}" if way_out else "")
        )


def require_at_least(config: Any, low: int, *flags: str) -> None:
    """Raise ValueError for the first of the integer settings `flags` of `config` that is below
    `low`.
    """
    for flag in flags:
        value = getattr(config, flag)
        if value < low:
            require(False, flag, value, f"{low} or more")


class Range(NamedTuple):
    """Numbers that a setting may have: in words for the error, and as a test that NaN fails."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Range("above 0 and finite", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("0 or more and finite", lambda value: 0 <= value < math.inf)
SHARE = Range("in [0, 1]", lambda value: 0 <= value <= 1)
BELOW_1 = Range("in [0, 1)", lambda value: 0 <= value < 1)


def require_in(config: Any, allowed: Range, *flags: str, way_out: str = "") -> None:
    """Raise ValueError for the first of the settings `flags` of `config` outside `allowed`."""
    for flag in flags:
        value = getattr(config, flag)
        require(allowed.holds(value), flag, value, allowed.words, way_out)


def require_not_empty(config: Any, *flags: str) -> None:
    """Raise ValueError for the first of the settings `flags` of `config` that is an empty text: a
    shell's variable that was not set.
    """
    for flag in flags:
        value = getattr(config, flag)
        require(value is None or bool(value.strip()), flag, repr(value), "a path, or left out")


def boolean(text: str) -> bool:
    """True or false in their usual spellings; argparse.ArgumentTypeError for another word."""
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(
            f"Truthy value expected: got {text} but expected one of yes/no, true/false, t/f, y/n, "
            "1/0 (case insensitive)."
        )
    return text.lower() in TRUE


class NumberOrNone:
    """Parses a number that may be left out, or `none`, with which a flag takes back what a file or
    a recipe has set.
    """

    def __init__(self, kind: type[int] | type[float]):
        self.kind, self.__name__ = kind, kind.__name__  # argparse names the type by the latter

    def __call__(self, text: str) -> int | float | None:
        return None if text.lower() == "none" else self.kind(text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling of a flag (`--na_me`, not `--na-me`), and no default where that would say
    None, or the opposite of a switch.
    """

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name[2:]]
        if not names:
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(names)} {values}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, []) or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse on dataclasses: `--name VALUE`, also spelled `--na-me`, for each of their fields.

    A bool without a value is true; one that is true by default has `--no_name` too; a list takes
    several values. Complaints are ValueErrors of one line, not a page of usage and an exit.
    """

    def __init__(self, dataclasses: Sequence[type] = (), **options: Any):
        """Each of `dataclasses` is a group in --help if it has an `_argument_group_name`."""
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)
        self.dataclasses = dataclasses
        for owner in dataclasses:
            name, types = getattr(owner, "_argument_group_name", ""), get_type_hints(owner)
            group = self.add_argument_group(name) if name else self
            for found in fields(owner):
                add_flag(group.add_argument, found, types[found.name])

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists the flags)")

    def parse(self, argv: Sequence[str]) -> tuple[list[Any], argparse.Namespace]:
        """(an instance of each dataclass, the values of flags that were added besides). Raises
        ValueError for a missing flag, a bad value, a word that belongs to no flag.
        """
        others, rest = self.parse_known_args(argv)
        if rest:
            raise ValueError(
                f"{rest[0]!r} belongs to no flag; flags are --name value, or --name=value"
            )
        values = vars(others)
        return [
            owner(**{found.name: values.pop(found.name) for found in fields(owner)})
            for owner in self.dataclasses
        ], others


def add_flag(add_argument: Callable, of: Field, kind: Any) -> None:
    """The flag of the dataclass field `of`. `kind` is its type: bool, one that argparse can call
    with the text, a Literal of texts, a list of either; `X | None` is as X, a number may be `none`.
    """
    may_be_none = NoneType in get_args(kind)
    if may_be_none:
        (kind,) = set(get_args(kind)) - {NoneType}
    parse = NumberOrNone(kind) if may_be_none and kind in (int, float) else kind
    options: dict[str, Any] = {"help": of.metadata.get("help"), "type": parse}
    if of.default_factory is not MISSING:
        options["default"] = of.default_factory()
    elif of.default is not MISSING:
        options["default"] = of.default
    else:
        options["required"] = True
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
        options |= {"type": kind, "nargs": "+"}
    if get_origin(kind) is Literal:
        options |= {"type": str, "choices": get_args(kind)}
    elif kind is bool:
        options |= {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}
    else:
        options["metavar"] = {int: "N", float: "X"}.get(kind, "TEXT")
    spellings = dict.fromkeys([f"--{of.name}", f"--{of.name.replace('_', '-')}"])
    add_argument(*spellings, *of.metadata.get("aliases", []), **options)
    if kind is bool and of.default is True:
        spellings = dict.fromkeys([f"--no_{of.name}", f"--no-{of.name.replace('_', '-')}"])
        add_argument(
            *spellings,
            dest=of.name,
            action="store_false",
            default=False,
            help=f"Switches --{of.name} off.",
        )


def unknown_flag(name: str, where: str, parser: argparse.ArgumentParser) -> ValueError:
    """The error for a `name` that `parser` does not have, found at `where`: it gives the nearest
    one that is there, if one is near.
    """
    names = [
        option[2:]
        for option in parser._option_string_actions
        if option.startswith("--") and "-" not in option[2:]
    ]
    spelled = name.replace("-", "_")
    longer = [name for name in names if spelled and name.startswith(spelled)]
    close = difflib.get_close_matches(spelled, longer or names, n=1, cutoff=0 if longer else NEAR)
    nearest = [OTHER_NAMES[spelled]] if OTHER_NAMES.get(spelled) in names else close
    hint = f"; the nearest is --{nearest[0]}" if nearest else ""
    return ValueError(f"{where} is not a setting{hint} (--help lists all of them)")


def refuse_unknown(
    arguments: Sequence[str], parser: argparse.ArgumentParser, others: Sequence[str] = ()
) -> None:
    """Raise ValueError with the lines of `unknown_flag` for all words that look like flags and are
    none, after the lines `others`. Before parsing, which would first miss the flag that was meant.
    """
    lines = list(others)
    for word in arguments:
        flag = word.split("=")[0]
        if re.fullmatch(FLAG, word) and flag not in parser._option_string_actions:
            lines.append(str(unknown_flag(flag.lstrip("-"), flag, parser)))
    if len(lines) > 1:
        lines = [f"{len(lines)} flags cannot be used:", *(f"  {line}" for line in lines)]
    if lines:
        raise ValueError("\n".join(lines))


def with_config_file(
    argv: Sequence[str], parser: argparse.ArgumentParser, others: Container[str] = ()
) -> list[str]:
    """The flags of the YAML file that `--config` in `argv` names, if it does, and then `argv`.
    others: names besides the parser's that the file may hold.
    """
    file_parser = Parser(add_help=False)
    file_parser.add_argument("--config")
    path = file_parser.parse_known_args(argv)[0].config
    return (yaml_flags(path, parser, others) if path else []) + list(argv)


def yaml_flags(
    path: str,
    parser: argparse.ArgumentParser,
    others: Container[str] = (),
    flag: str = "--config",
) -> list[str]:
    """A YAML mapping as command line: scalars as they are written (`1e-5`, `0:0.3`); empty and
    `null` ones are `none` where a number may be, else left out.

    Raises ValueError naming the file, as `flag` does, and, for an unknown or nested key, that key.
    """
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{flag} {path}: cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(
            f"{flag} {path}: must hold `flag: value` lines, is a {type(settings).__name__}"
        )
    flags = []
    for name, value in settings.items():
        action = parser._option_string_actions.get(f"--{name}")
        if name in ("config", flag[2:]) or (action is None and name not in others):
            raise unknown_flag(name, f"{flag} {path}: {name}", parser)
        if isinstance(value, dict):
            raise ValueError(
                f"{flag} {path}: {name} must be a value or a list of values, not a mapping"
            )
        if isinstance(value, list):
            flags += [f"--{name}", *value] if value else []
        elif value not in ("", "null", "~"):
            flags.append(f"--{name}={value}")
        elif action is not None and isinstance(action.type, NumberOrNone):
            flags.append(f"--{name}=none")
    return flags


def exit_with(error: Exception) -> NoReturn:
    """The end of a command line: what is wrong is said (last_words.py), exit status 2."""
    say_in_turn(str(error), transient=isinstance(error, OSError))
    raise SystemExit(2) from error
