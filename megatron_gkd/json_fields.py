"""What the fields of a JSON file may hold."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_gkd.errors import short_repr

_LARGEST_NUMBER = sys.float_info.max


class Form(NamedTuple):
    """What a field may hold, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold: not NaN, not infinite, no whole number of
    hundreds of digits.
    """
    return type(value) in (int, float) and abs(value) <= _LARGEST_NUMBER


def whole(least: int, most: int) -> Form:
    """A whole number from `least` to `most`."""
    return Form(
        f"a whole number from {least} to {most:,}",
        lambda value: type(value) is int and least <= value <= most,
    )


TRUTH = Form("true or false", lambda value: isinstance(value, bool))
OBJECT = Form("a JSON object", lambda value: isinstance(value, dict))
TEXT = Form("a text", lambda value: isinstance(value, str))


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in the file at `path`. Raises ValueError saying that the file is not `what`
    where it holds anything else.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not {what} ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not {what} (no JSON object)")
    return found


def check_fields(
    path: Path, values: Mapping[str, Any], forms: Mapping[str, Form], way_out: str = ""
) -> None:
    """Raise ValueError, naming the file at `path` and the field, where one of `values` is not of
    its form. Fields that are missing, or have no form, pass. way_out: the end of the message.
    """
    for field, (words, holds) in forms.items():
        if field in values and not holds(values[field]):
            raise ValueError(
                f"{path}: {field} is {short_repr(values[field])}, and must be {words}{way_out}"
            )
