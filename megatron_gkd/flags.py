"""Fields of dataclasses as the flags of a command line, or the lines of a YAML file: what they say
when something is wrong.

`transformers.HfArgumentParser` does the parsing. Used by the training command and by the tools.
"""

import difflib
import os
import re
import sys
import time
from dataclasses import field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

SECONDS_FOR_RANK_0 = 5  # to come to its error and end, and for torchrun to end the others
# Names from other programs -> the setting that does it here.
OTHER_NAMES = {
    "lr": "learning_rate",
    "gradient_checkpointing": "recompute",
    "tp": "tensor_model_parallel_size",
}
OTHER_NAMES |= {
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "epochs": "num_train_epochs",
}
OTHER_NAMES |= {"batch_size": "per_device_train_batch_size", "bf16": "torch_dtype"}


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
        require(getattr(config, flag) >= low, flag, getattr(config, flag), f"{low} or more")


class Parser(HfArgumentParser):
    """HfArgumentParser whose complaints are ValueErrors of one line, not a page of usage and an
    exit.
    """

    def error(self, message: str):
        raise ValueError(f"{message} (--help lists the flags)")


def unknown_flag(name: str, where: str, parser: Parser) -> ValueError:
    """The error for a `name` that `parser` does not have, found at `where`: it gives the nearest
    one that is there.
    """
    names = [
        option[2:]
        for option in parser._option_string_actions
        if option.startswith("--") and "-" not in option[2:]
    ]
    spelled = name.replace("-", "_")
    nearest = (
        OTHER_NAMES.get(spelled) or difflib.get_close_matches(spelled, names, n=1, cutoff=0.0)[0]
    )
    return ValueError(
        f"{where} is not a setting; the nearest is --{nearest} (--help lists all of them)"
    )


def refuse_unknown(arguments: list[str], parser: Parser) -> None:
    """Raise the error of `unknown_flag` for the first word that looks like a flag and is none.
    Before parsing, which would first miss the flag that was meant.
    """
    for word in arguments:
        flag = word.split("=")[0]
        looks_like_one = re.fullmatch(
            r"--\S+|-[^-\d.\s]\S*", word
        )  # not a negative number, a text, or `--` alone
        if looks_like_one and flag not in parser._option_string_actions:
            raise unknown_flag(flag.lstrip("-"), flag, parser)


def yaml_flags(path: str, parser: Parser) -> list[str]:
    """A YAML mapping as command line: scalars as they are written (`1e-5`, `0:0.3`), empty or
    `null` ones are unset.

    Raises ValueError naming the file and, for an unknown or nested key, that key.
    """
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(
            f"--config {path}: must hold `flag: value` lines, is a {type(settings).__name__}"
        )
    flags = []
    for name, value in settings.items():
        if name == "config" or f"--{name}" not in parser._option_string_actions:
            raise unknown_flag(name, f"--config {path}: {name}", parser)
        if isinstance(value, dict):
            raise ValueError(
                f"--config {path}: {name} must be a value or a list of values, not a mapping"
            )
        if isinstance(value, list):
            flags += [f"--{name}", *value] if value else []
        elif value not in ("", "null", "~"):
            flags.append(f"--{name}={value}")
    return flags


def exit_with(error: Exception) -> NoReturn:
    """The end of a command line: what is wrong to stderr, exit status 2.

    Most errors are those of every rank. Rank 0 speaks at once and ends; the others wait a moment
    before they do, in which torchrun ends them. What only some ranks have seen (a file that a node
    lacks) is said by those.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(SECONDS_FOR_RANK_0)
    print(
        f"megatron_gkd: error{'' if rank == '0' else f' (rank {rank})'}: {error}",
        file=sys.stderr,
        flush=True,
    )
    raise SystemExit(2) from error
