"""A part of a turn's content -> its kind and what it holds, in the spellings of Hugging Face's
templates, of OpenAI's requests and of Qwen's utilities.
"""

from typing import Any

from megatron_gkd.errors import RowError, short_repr
from megatron_gkd.media.medium import KINDS
from megatron_gkd.media.row_media import refuse_settings

_KIND_OF_TYPE = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    **{f"{prefix}{kind}": kind for kind in KINDS for prefix in ("", "input_")},
    **{f"{kind}_url": kind for kind in KINDS},
}
# Entries of a part that hold a medium of any kind, beside `image`, `image_url`, `input_image`.
_ANY_KIND = ("path", "url", "base64", "bytes", "data")
# What changes nothing here: OpenAI's wish for a resolution, the names of formats, which the media
# themselves tell, where a server's cache may begin, and which medium of its column a placeholder
# stands for: `check_content` sees to it that it is the next one.
_IGNORED = ("detail", "format", "mime_type", "cache_control", "index")
# Anthropic's parts of other kinds: where they stand here.
_ELSEWHERE = {
    "tool_use": "a call is an entry of its turn's tool_calls",
    "tool_result": "a result is the content of a turn of role tool",
    "thinking": "reasoning is its turn's reasoning_content",
}


def read_part(part: dict[str, Any], where: str) -> tuple[str, Any]:
    """(`text` and the text, not checked; or the kind of a medium and its value, None if that stands
    elsewhere). Entries that are null or empty count as absent. Raises RowError naming `where`.
    """
    held = {name: value for name, value in part.items() if value not in (None, "", [], {})}
    kind = _kind(held, where)
    held.pop("type", None)
    for name in _IGNORED:
        held.pop(name, None)
    if kind == "text":
        held.pop("text", None)
        if held:
            names = ", ".join(short_repr(name)[1:-1] for name in sorted(held))
            raise RowError(f"{where} is text and holds {names}: one part, one thing")
        return kind, part.get("text")
    refuse_settings(held, kind, where)
    known = _names(kind) | set(_ANY_KIND)
    values = {name: value for name, value in held.items() if name in known}
    if len(values) > 1 or len(values) < len(held):
        there = ", ".join(short_repr(name)[1:-1] for name in sorted(part))
        raise RowError(f"{where} is of type {kind} and holds more than `{kind}`: {there}")
    for name, value in values.items():
        return kind, {"data": value} if name in ("base64", "bytes", "data") else value
    return kind, None


def _kind(held: dict[str, Any], where: str) -> str:
    """By `type`, else by what the part holds."""
    given = held.get("type")
    if not given:
        return next((kind for kind in KINDS if held.keys() & _names(kind)), "text")
    kind = _KIND_OF_TYPE.get(given) if isinstance(given, str) else None
    if kind is None:
        elsewhere = _ELSEWHERE.get(given) if isinstance(given, str) else None
        raise RowError(
            f"{where} is of type {short_repr(given)}: "
            + (
                elsewhere
                or f"text, {', '.join(KINDS)} are the types (and their OpenAI names, such as "
                "image_url and input_audio)"
            )
        )
    return kind


def _names(kind: str) -> set[str]:
    """Entries that hold a medium of this kind."""
    return {kind, f"{kind}_url", f"input_{kind}"}
