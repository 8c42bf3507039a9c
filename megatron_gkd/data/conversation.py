"""Turns of a conversation as a row gives them -> checked `Messages`: contents, and the media that
parts of them hold.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_gkd.data.media_parts import read_part
from megatron_gkd.errors import RowError, short_repr, type_name
from megatron_gkd.media.medium import KINDS

_TAG = re.compile(r"<(audio|image|video)>")

Messages = list[dict[str, Any]]
"""Turns as chat templates take them: `role` (system, user, assistant, tool) and `content`, a string
or a list of parts of `type` text, audio, image or video; `tool_calls` and the rest of `Turn` where
a turn has them.
"""


class Turn(NamedTuple):
    """A turn that a row holds, in whatever form; its content is not checked yet."""

    role: str
    content: Any
    where: str
    content_where: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    passed_on: Mapping[str, str] = {}
    """Entries of the turn that are left to the template: name, tool_call_id, reasoning_content"""
    trained: bool = True
    """False: an assistant turn that is context only"""
    is_call: bool = False
    """A call of tools in a turn of its own"""

    @property
    def is_empty(self) -> bool:
        """An assistant turn that says nothing: its text is yet to be written."""
        parts = self.content if isinstance(self.content, list) else [self.content or ""]
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        is_blank = all(isinstance(text, str) and not text.strip() for text in texts)
        return self.role == "assistant" and is_blank and not (self.tool_calls or self.passed_on)


class RenderOptions(NamedTuple):
    """What the chat template is given beside the turns of a view."""

    tools: list[dict[str, Any]] | None = None
    """Definitions of the tools that the assistant may call"""
    variables: Mapping[str, Any] = {}
    """The template's own, such as enable_thinking"""


@dataclass(frozen=True)
class InlineMedia:
    """The media placeholders in the turns of one view, collected while the turns are checked."""

    tag_kinds: set[str]
    """Kinds whose `<audio>`, `<image>` or `<video>` in a text is a placeholder: those of which the
    view has media outside its turns.
    """
    values: dict[str, list[Any]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    """Kind -> the medium that each placeholder holds; None if that is left to the column"""
    text_tags: list[str] = field(default_factory=list)
    """Kinds of the tags that are no placeholders"""


def check_text(value: Any, where: str) -> str:
    """The value, a string that UTF-8 can encode. Raises RowError naming `where`."""
    if not isinstance(value, str):
        raise RowError(f"{where} must be a string, got {type_name(value)} {short_repr(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"{where} is not valid Unicode: lone surrogate at character {error.start}"
        ) from None
    return value


def check_content(value: Any, where: str, inline: InlineMedia | None) -> Any:
    """A turn's content: a string, or Hugging Face's list of parts. The result is a string if there
    is only text; otherwise the list of parts, whose media are moved to `inline`. `inline` None: no
    media are allowed. Raises RowError naming `where`.
    """
    if not isinstance(value, list):
        return _joined(_split_at_tags(check_text(value, where), inline))
    parts = []
    for index, part in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(part, dict):
            raise RowError(
                f"{place} must be an object such as {{'type': 'text', 'text': ...}}, "
                f"got {type_name(part)}"
            )
        kind, value = read_part(part, place)
        if kind == "text":
            parts += _split_at_tags(check_text(value, f"{place}.text"), inline)
        elif inline is None:
            raise RowError(f"{place} is of type {kind}: no media stand in assistant turns")
        else:
            number = len(inline.values[kind])
            if value is None and part.get("index") not in (None, number):
                raise RowError(
                    f"{place} has index {short_repr(part['index'])} and is {kind} {number} of the "
                    "view: media stand in the order of their placeholders"
                )
            inline.values[kind].append(value)
            parts.append({"type": kind})
    return _joined(parts)


def _split_at_tags(text: str, inline: InlineMedia | None) -> list[dict[str, str]]:
    """A text as parts: its tags of the kinds in `inline.tag_kinds` are placeholders."""
    if inline is None or "<" not in text:
        return [{"type": "text", "text": text}]
    first, *rest = _TAG.split(text)  # text, kind, text, kind, text ...
    parts = [{"type": "text", "text": first}]
    for kind, following in zip(rest[::2], rest[1::2]):
        if kind in inline.tag_kinds:
            inline.values[kind].append(None)
            parts += [{"type": kind}, {"type": "text", "text": following}]
        else:
            inline.text_tags.append(kind)
            parts[-1]["text"] += f"<{kind}>{following}"
    return parts


def _joined(parts: list[dict[str, str]]) -> str | list[dict[str, str]]:
    """One string, if the parts are nothing but text."""
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return [part for part in parts if part.get("text") != ""]


def check_turns(
    turns: list[Turn],
    inline: InlineMedia,
    *,
    may_be_empty: bool = False,
) -> Messages:
    """The turns with checked contents. Assistant turns have text or calls, unless they
    `may_be_empty`. At least one turn; RowError names the turn that is wrong.
    """
    messages = []
    for turn in turns:
        message: dict[str, Any] = {"role": turn.role, "content": ""}
        if turn.role != "assistant":
            message["content"] = check_content(turn.content, turn.content_where, inline)
        else:
            if turn.content is not None:
                message["content"] = check_content(turn.content, turn.content_where, None)
            if not (message["content"].strip() or turn.tool_calls or may_be_empty):
                raise RowError(f"{turn.where}: empty response")
            if turn.tool_calls:
                message["tool_calls"] = list(turn.tool_calls)
        messages.append(message | dict(turn.passed_on))
    if messages[0]["role"] == "assistant":
        raise RowError(
            f"{turns[0].where} is an assistant turn: nothing stands before it that could be its "
            "prompt"
        )
    return messages


def with_responses(view: Messages, messages: Messages | None, *, has_response: bool) -> Messages:
    """The teacher's turns with the row's responses in place of its own: all of them, if it has as
    many as the row, else the last (of a prompt alone, not `has_response`: none). Those of a
    tokenised row (no `messages`) are not known as text: any text does, since nothing of it is read.
    Raises RowError for a turn without text that is not replaced.
    """
    turns = [index for index, turn in enumerate(view) if turn["role"] == "assistant"]
    responses = [{"role": "assistant", "content": "response"}] * has_response
    if messages is not None:
        responses = [turn for turn in messages if turn["role"] == "assistant"]
    given = len(responses)
    if given != len(turns):
        last = [responses[-1]] if has_response else []
        responses = [*(view[index] for index in turns[: len(turns) - len(last)]), *last]
    view = list(view)
    for index, response in zip(turns, responses):
        if not response["content"].strip() and not response.get("tool_calls"):
            raise RowError(
                f"teacher_messages[{index}]: empty response. The row's responses take the places "
                f"of all of the teacher's if there are as many; there are {given} and {len(turns)}"
            )
        view[index] = response
    return view
