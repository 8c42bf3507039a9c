"""A raw row (a JSON object or a table's row) -> a checked `Row`. No tokenizer here: types, roles,
ids and which columns belong together.

Accepted: `messages`, or `instruction` (+ `input`) + `output`, or `input_ids` + `labels`; one of
`teacher_messages`, `teacher_prompt`, `teacher_input_ids`; `images`, `audios`, `videos` and, for the
teacher's own, `teacher_images`, `teacher_audios`, `teacher_videos`; `use_audio_in_video`; `source`.
A null column is an absent one. Columns that would change the meaning if they were ignored are
refused by name; any other column is left alone.
"""

import difflib
import re
from dataclasses import dataclass, field
from typing import Any

from megatron_gkd.errors import RowError, shown
from megatron_gkd.media.medium import KINDS, Reference, read_reference

IGNORED_LABEL = -100
ROLES = ("system", "user", "assistant")
MEDIA_COLUMNS = tuple(f"{prefix}{kind}s" for prefix in ("", "teacher_") for kind in KINDS)
REFUSED_COLUMNS = {
    **{
        f"{prefix}{kind}": f"name it `{prefix}{kind}s`, a list"
        for prefix in ("", "teacher_")
        for kind in KINDS
    },
    "tools": "tool definitions are not rendered",
    "system": "write it as the first turn of `messages`",
    "history": "write the earlier turns into `messages`",
}
TEACHER_COLUMNS = ("teacher_messages", "teacher_prompt", "teacher_input_ids")

_OF_TEACHER = (*TEACHER_COLUMNS, *(name for name in MEDIA_COLUMNS if name.startswith("teacher_")))
_ABOUT_TEACHER = tuple(
    f"{name}_" for column in _OF_TEACHER for name in (column, column.removesuffix("s"))
)  # metadata, as teacher_image_id
_TAG = re.compile(r"<(audio|image|video)>")

Messages = list[dict[str, Any]]
"""Turns with `role` and `content`: a string, or a list of parts of `type` text, audio, image or
video.
"""
RowMedia = dict[str, list[Reference]]
"""Kind -> a view's media of that kind, in the order of their placeholders."""


@dataclass(frozen=True)
class Row:
    """Either `messages` (ends with an assistant turn) or `input_ids` with `labels` (unshifted), and
    at most one teacher view. `teacher_media` is None where the teacher has the student's.
    """

    messages: Messages | None
    input_ids: list[int] | None
    labels: list[int] | None
    teacher_messages: Messages | None
    teacher_input_ids: list[int] | None
    source: str | None
    media: RowMedia = field(default_factory=lambda: {kind: [] for kind in KINDS})
    teacher_media: RowMedia | None = None
    use_audio_in_video: bool = False

    @property
    def has_media(self) -> bool:
        """In either view."""
        return any(self.media.values()) or any((self.teacher_media or {}).values())


class _Inline:
    """What the parts of one view's turns hold: kind -> values, None where a part leaves its medium
    to the column.
    """

    def __init__(self, row: dict, prefix: str, inherited: dict[str, bool]):
        self.values: dict[str, list] = {kind: [] for kind in KINDS}
        # Only where the view has such media is `<image>` in a text a placeholder.
        self.tags = {kind for kind in KINDS if row.get(f"{prefix}{kind}s", inherited.get(kind))}


def check_row(raw, vocab_size: int, folder: str = "") -> Row:
    """Check one raw row against the format above; ids must lie in [0, vocab_size). Paths of media
    are relative to `folder`. Raises RowError with the reason.
    """
    if not isinstance(raw, dict):
        raise RowError(f"a row is a JSON object, this is {_type_name(raw)}")
    row = {name: value for name, value in raw.items() if value is not None}
    _refuse_columns(row)
    source = row.get("source")
    if source is not None:
        source = _text(source, "source")

    kinds = [
        kind
        for kind, columns in (
            ("messages", ("messages",)),
            ("instruction/output", ("instruction", "output")),
            ("input_ids/labels", ("input_ids", "labels")),
        )
        if any(column in row for column in columns)
    ]
    if not kinds:
        raise RowError(
            "has none of `messages`, `instruction` + `output`, `input_ids` + `labels`"
            + (f" (its columns: {', '.join(list(row)[:8])})" if row else " (every column is empty)")
        )
    if len(kinds) > 1:
        raise RowError(
            f"has {' and '.join(kinds)}: one of them must go, they may say different things"
        )

    messages = input_ids = labels = None
    inline = _Inline(row, "", {})
    if kinds == ["messages"]:
        messages = _conversation(row["messages"], "messages", inline)
        if messages[-1]["role"] != "assistant":
            raise RowError(
                f"messages end with a {messages[-1]['role']} turn: the last turn must be the assistant's response"
            )
    elif kinds == ["instruction/output"]:
        messages = _alpaca_messages(row, inline)
    else:
        input_ids, labels = _tokenised(row, vocab_size)
    media = _media(row, "", inline, folder)
    teacher_inline = _Inline(row, "teacher_", {kind: bool(media[kind]) for kind in KINDS})
    teacher_messages, teacher_input_ids = _teacher(row, messages, vocab_size, teacher_inline)
    teacher_media = _teacher_media(row, media, inline, teacher_inline, teacher_messages, folder)
    use_audio_in_video = row.get("use_audio_in_video", False)
    if not isinstance(use_audio_in_video, bool):
        raise RowError(f"use_audio_in_video must be true or false, got {shown(use_audio_in_video)}")
    return Row(
        messages,
        input_ids,
        labels,
        teacher_messages,
        teacher_input_ids,
        source,
        media,
        teacher_media,
        use_audio_in_video,
    )


def _media(row: dict, prefix: str, inline: _Inline, folder: str) -> RowMedia:
    """The media of a view: from its parts where these hold them, from its columns otherwise."""
    found: RowMedia = {}
    for kind in KINDS:
        column, values = f"{prefix}{kind}s", inline.values[kind]
        given, places = row.get(column, []), f"{prefix}messages"
        if not isinstance(given, list):
            given = [given]
        if any(value is not None for value in values):
            if given or any(value is None for value in values):
                raise RowError(
                    f"{places} hold {kind}s in some parts and not in others or in `{column}`: use one of them"
                )
            given, places = values, f"{places}: {kind}"
        else:
            places = column
        found[kind] = [
            read_reference(value, kind, folder, f"{places}[{index}]")
            for index, value in enumerate(given)
        ]
    return found


def _teacher_media(
    row: dict,
    media: RowMedia,
    student: _Inline,
    teacher: _Inline,
    messages: Messages | None,
    folder: str,
) -> RowMedia | None:
    """The teacher's own media; None where it has the student's.

    Of each kind: its column's, or those that its turns hold, or the student's. A conversation of
    its own that has no place for a kind which the student's turns (not a column) hold has none of
    it.
    """
    own, merged = _media(row, "teacher_", teacher, folder), {}
    for kind in KINDS:
        in_turns = any(value is not None for value in student.values[kind])
        left_out = messages is not None and in_turns and not _num_parts(messages, kind)
        merged[kind] = (
            own[kind] if f"teacher_{kind}s" in row or own[kind] or left_out else media[kind]
        )
    return None if merged == media else merged


def _num_parts(messages: Messages, kind: str) -> int:
    contents = [turn["content"] for turn in messages if isinstance(turn["content"], list)]
    return sum(part["type"] == kind for content in contents for part in content)


def _refuse_columns(row: dict) -> None:
    for name, reason in REFUSED_COLUMNS.items():
        if row.get(name):
            raise RowError(f"column `{name}` is not supported: {reason}")
    for name in row:
        if (
            name.startswith("teacher_")
            and name not in _OF_TEACHER
            and not name.startswith(_ABOUT_TEACHER)
        ):
            if nearest := difflib.get_close_matches(name, _OF_TEACHER, n=1, cutoff=0.85):
                raise RowError(f"column `{name}` is unknown: is it `{nearest[0]}`?")


def _type_name(value) -> str:
    names = {
        "bool": "a boolean",
        "int": "an integer",
        "float": "a float",
        "str": "a string",
        "list": "a list",
        "dict": "an object",
    }
    return "null" if value is None else names.get(type(value).__name__, type(value).__name__)


def _text(value, where: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{where} must be a string, got {_type_name(value)} {shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"{where} is not valid Unicode: lone surrogate at character {error.start}"
        ) from None
    return value


def _content(value, where: str, inline: _Inline | None) -> Any:
    """A message's content: a string, or Hugging Face's list of parts. Texts are joined where there
    is nothing but text; with media the parts stay, and their media go to `inline`. `inline` None:
    media have no place here.
    """
    if not isinstance(value, list):
        text = _text(value, where)
        pieces = _TAG.split(text) if inline and inline.tags else [text]
        parts = [{"type": "text", "text": text} for text in pieces[:1]]
        for kind, following in zip(pieces[1::2], pieces[2::2]):
            if kind in inline.tags:
                inline.values[kind].append(None)
                parts += [{"type": kind}, {"type": "text", "text": following}]
            else:
                parts[-1]["text"] += f"<{kind}>{following}"
        return _joined(parts)
    parts = []
    for index, part in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(part, dict):
            raise RowError(
                f"{place} must be an object such as {{'type': 'text', 'text': ...}}, got {_type_name(part)}"
            )
        held = {name: item for name, item in part.items() if item is not None}
        kind = held.pop("type", None) or next((kind for kind in KINDS if kind in held), "text")
        if kind == "text":
            text = held.pop("text", None)
            if held:
                raise RowError(
                    f"{place} is text and holds {', '.join(sorted(held))}: one part, one thing"
                )
            parts.append({"type": "text", "text": _text(text, f"{place}.text")})
        elif kind in KINDS:
            if inline is None:
                raise RowError(
                    f"{place} is of type {kind}: media stand in user and system turns only"
                )
            values = [
                held.pop(name) for name in (kind, f"{kind}_url", "path", "url") if name in held
            ]
            if len(values) > 1 or held:
                raise RowError(
                    f"{place} is of type {kind} and holds more than `{kind}`: {', '.join(sorted(part))}"
                )
            value = values[0] if values else None
            inline.values[kind].append(
                value.get("url") if isinstance(value, dict) and "url" in value else value
            )
            parts.append({"type": kind})
        else:
            raise RowError(
                f"{place} is of type {shown(kind)}: text, {', '.join(KINDS)} are the types"
            )
    return _joined(parts)


def _joined(parts: list[dict]) -> Any:
    """One string, if the parts are nothing but text."""
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return [part for part in parts if part.get("text") != ""]


def _conversation(
    value, where: str, inline: _Inline, *, last_may_be_empty: bool = False
) -> Messages:
    """Check turns, roles and contents. Assistant turns have text, except the last one if it
    `last_may_be_empty`.
    """
    if not isinstance(value, list):
        raise RowError(f"{where} must be a list of turns, got {_type_name(value)}")
    if not value:
        raise RowError(f"{where} is empty")
    messages = []
    for index, turn in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(turn, dict):
            raise RowError(
                f"{place} must be an object with role and content, got {_type_name(turn)}"
            )
        extra = sorted(
            key for key, item in turn.items() if key not in ("role", "content") and item is not None
        )
        if extra:
            raise RowError(
                f"{place} has {', '.join(extra)}: a turn has role and content, nothing else is rendered"
            )
        role = turn.get("role")
        if role not in ROLES:
            raise RowError(
                f"{place}.role {shown(role)} is unknown: {', '.join(ROLES)} are the roles"
            )
        content = turn.get("content")
        if role == "assistant":
            may_be_empty = last_may_be_empty and index == len(value) - 1
            content = "" if content is None else _content(content, f"{place}.content", None)
            if not content.strip() and not may_be_empty:
                raise RowError(f"{place}: empty response")
        else:
            content = _content(content, f"{place}.content", inline)
        messages.append({"role": role, "content": content})
    if messages[0]["role"] == "assistant":
        raise RowError(
            f"{where}[0] is an assistant turn: nothing stands before it that could be its prompt"
        )
    return messages


def _alpaca_messages(row: dict, inline: _Inline) -> Messages:
    """instruction, then input on a line of its own where there is one; the output is the response."""
    parts = [_text(row[name], name) for name in ("instruction", "input") if name in row]
    prompt = "\n".join(part for part in parts if part)
    if not prompt.strip():
        raise RowError("empty prompt: neither instruction nor input has text")
    output = _text(row.get("output", ""), "output")
    if not output.strip():
        raise RowError("empty response: output has no text")
    return [
        {"role": "user", "content": _content(prompt, "instruction", inline)},
        {"role": "assistant", "content": output},
    ]


def _token_ids(value, where: str, vocab_size: int, *, labels: bool = False) -> list[int]:
    """A non-empty list of ids in [0, vocab_size); with `labels`, -100 too."""
    if not isinstance(value, list):
        raise RowError(f"{where} must be a list of integers, got {_type_name(value)}")
    if not value:
        raise RowError(f"{where} is empty")
    for index, token in enumerate(value):
        if type(token) is not int:
            raise RowError(
                f"{where}[{index}] must be an integer, got {_type_name(token)} {shown(token)}"
            )
        if not 0 <= token < vocab_size and not (labels and token == IGNORED_LABEL):
            allowed = f"[0, {vocab_size})" + (f" or {IGNORED_LABEL}" if labels else "")
            raise RowError(f"{where}[{index}] is {shown(token)}, out of the vocabulary {allowed}")
    return value


def _tokenised(row: dict, vocab_size: int):
    """`input_ids` and `labels` up to the last trained token: what follows it carries no loss and no
    earlier token sees it.
    """
    for name in ("input_ids", "labels"):
        if name not in row:
            raise RowError(f"`{name}` is missing: a tokenised row has input_ids and labels")
    input_ids = _token_ids(row["input_ids"], "input_ids", vocab_size)
    labels = list(_token_ids(row["labels"], "labels", vocab_size, labels=True))
    if len(input_ids) != len(labels):
        raise RowError(
            f"input_ids has {len(input_ids)} tokens and labels {len(labels)}: they must be equally long (labels are "
            "not shifted)"
        )
    if labels[0] != IGNORED_LABEL:
        if any(column in row for column in TEACHER_COLUMNS):
            raise RowError(
                "labels[0] is trained: with a teacher view the student needs a prompt of at least one token"
            )
        labels[0] = IGNORED_LABEL  # no token stands before it that could predict it
    trained = [index for index, label in enumerate(labels) if label != IGNORED_LABEL]
    if not trained:
        raise RowError(f"empty response: no label after the first is other than {IGNORED_LABEL}")
    end = trained[-1] + 1
    inside = [index for index in trained if index + 1 < len(input_ids)]
    is_next = len(inside) > 1 and all(labels[index] == input_ids[index + 1] for index in inside)
    if is_next and any(labels[index] != input_ids[index] for index in trained):
        raise RowError(
            "each trained label is the next token of input_ids: these labels are shifted already; write each token's own id in "
            "its place, the shift is done here"
        )
    mask = row.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, list) or len(mask) != len(input_ids):
            raise RowError("attention_mask must be a list as long as input_ids")
        if not all(mask[:end]):
            raise RowError(
                f"attention_mask[{[bool(m) for m in mask].index(False)}] is 0 before the last trained token: rows "
                "must not be padded on the left"
            )
    return input_ids[:end], labels[:end]


def _teacher(row: dict, messages: Messages | None, vocab_size: int, inline: _Inline):
    """(teacher_messages, teacher_input_ids), at most one of them not None; `teacher_prompt` is
    turned into teacher_messages.
    """
    present = [column for column in TEACHER_COLUMNS if column in row]
    if len(present) > 1:
        raise RowError(f"has {' and '.join(present)}: the teacher has one view")
    if not present:
        return None, None
    if present == ["teacher_input_ids"]:
        return None, _token_ids(row["teacher_input_ids"], "teacher_input_ids", vocab_size)
    if present == ["teacher_messages"]:
        view = _conversation(
            row["teacher_messages"], "teacher_messages", inline, last_may_be_empty=True
        )
        if view[-1]["role"] != "assistant":
            raise RowError(
                f"teacher view without response: teacher_messages end with a {view[-1]['role']} turn, "
                "the last one must be an assistant turn (the row's response takes its place)"
            )
        return view, None
    prompt = _text(row["teacher_prompt"], "teacher_prompt")
    if not prompt.strip():
        raise RowError("teacher_prompt has no text")
    if messages is None:
        raise RowError(
            "teacher_prompt replaces a user turn, and a tokenised row has none: give teacher_messages or "
            "teacher_input_ids"
        )
    users = [index for index, turn in enumerate(messages) if turn["role"] == "user"]
    if not users:
        raise RowError("teacher_prompt replaces the last user turn, and messages have none")
    view = list(messages)
    view[users[-1]] = {"role": "user", "content": _content(prompt, "teacher_prompt", inline)}
    return view, None
