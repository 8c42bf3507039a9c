"""A raw row (a JSON object or a table's row) -> a checked `Row`. No tokenizer here: types, roles, ids and which
columns belong together.

Accepted: `messages`, or `instruction` (+ `input`) + `output`, or `input_ids` + `labels`; one of `teacher_messages`,
`teacher_prompt`, `teacher_input_ids`; `source`. A null column is an absent one. Columns that would change the meaning
if they were ignored are refused by name; any other column is left alone.
"""

from dataclasses import dataclass
from typing import Optional

from megatron_gkd.data.errors import RowError, shown

IGNORED_LABEL = -100
ROLES = ("system", "user", "assistant")
MEDIA_COLUMNS = tuple(
    prefix + name for prefix in ("", "teacher_") for name in ("images", "audios", "videos", "image", "audio", "video")
)
REFUSED_COLUMNS = {
    "tools": "tool definitions are not rendered",
    "system": "write it as the first turn of `messages`",
    "history": "write the earlier turns into `messages`",
}
TEACHER_COLUMNS = ("teacher_messages", "teacher_prompt", "teacher_input_ids")

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Row:
    """Either `messages` (ends with an assistant turn) or `input_ids` with `labels` (unshifted), and at most one
    teacher view.
    """

    messages: Optional[Messages]
    input_ids: Optional[list[int]]
    labels: Optional[list[int]]
    teacher_messages: Optional[Messages]
    teacher_input_ids: Optional[list[int]]
    source: Optional[str]


def check_row(raw, vocab_size: int) -> Row:
    """Check one raw row against the format above; ids must lie in [0, vocab_size). Raises RowError with the reason."""
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
        raise RowError(f"has {' and '.join(kinds)}: one of them must go, they may say different things")

    messages = input_ids = labels = None
    if kinds == ["messages"]:
        messages = _conversation(row["messages"], "messages")
        if messages[-1]["role"] != "assistant":
            raise RowError(
                f"messages end with a {messages[-1]['role']} turn: the last turn must be the assistant's response"
            )
    elif kinds == ["instruction/output"]:
        messages = _alpaca_messages(row)
    else:
        input_ids, labels = _tokenised(row, vocab_size)
    teacher_messages, teacher_input_ids = _teacher(row, messages, vocab_size)
    return Row(messages, input_ids, labels, teacher_messages, teacher_input_ids, source)


def _refuse_columns(row: dict) -> None:
    for name in MEDIA_COLUMNS:
        if row.get(name):
            raise RowError(
                f"column `{name}` holds media: media rows need the audio and vision towers, which do not run yet; "
                "give rows of text"
            )
    for name, reason in REFUSED_COLUMNS.items():
        if row.get(name):
            raise RowError(f"column `{name}` is not supported: {reason}")


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
        raise RowError(f"{where} is not valid Unicode: lone surrogate at character {error.start}") from None
    return value


def _content(value, where: str) -> str:
    """A message's content: a string, or Hugging Face's list of parts, whose texts are joined."""
    if not isinstance(value, list):
        return _text(value, where)
    texts = []
    for index, part in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(part, dict):
            raise RowError(f"{place} must be an object such as {{'type': 'text', 'text': ...}}, got {_type_name(part)}")
        kind = part.get("type") or "text"
        held = {name for name, item in part.items() if item is not None} - {"type", "text"}
        if kind != "text" or held:
            what = f"is of type {shown(kind)}" + (f" and holds {', '.join(sorted(held))}" if held else "")
            raise RowError(
                f"{place} {what}: only text parts are read (media rows need the audio and vision towers, "
                "which do not run yet)"
            )
        texts.append(_text(part.get("text"), f"{place}.text"))
    return "".join(texts)


def _conversation(value, where: str, *, last_may_be_empty: bool = False) -> Messages:
    """Check turns, roles and contents. Assistant turns have text, except the last one if it `last_may_be_empty`."""
    if not isinstance(value, list):
        raise RowError(f"{where} must be a list of turns, got {_type_name(value)}")
    if not value:
        raise RowError(f"{where} is empty")
    messages = []
    for index, turn in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(turn, dict):
            raise RowError(f"{place} must be an object with role and content, got {_type_name(turn)}")
        extra = sorted(key for key, item in turn.items() if key not in ("role", "content") and item is not None)
        if extra:
            raise RowError(f"{place} has {', '.join(extra)}: a turn has role and content, nothing else is rendered")
        role = turn.get("role")
        if role not in ROLES:
            raise RowError(f"{place}.role {shown(role)} is unknown: {', '.join(ROLES)} are the roles")
        content = turn.get("content")
        if role == "assistant":
            may_be_empty = last_may_be_empty and index == len(value) - 1
            content = "" if content is None else _content(content, f"{place}.content")
            if not content.strip() and not may_be_empty:
                raise RowError(f"{place}: empty response")
        else:
            content = _content(content, f"{place}.content")
        messages.append({"role": role, "content": content})
    if messages[0]["role"] == "assistant":
        raise RowError(f"{where}[0] is an assistant turn: nothing stands before it that could be its prompt")
    return messages


def _alpaca_messages(row: dict) -> Messages:
    """instruction, then input on a line of its own where there is one; the output is the response."""
    parts = [_text(row[name], name) for name in ("instruction", "input") if name in row]
    prompt = "\n".join(part for part in parts if part)
    if not prompt.strip():
        raise RowError("empty prompt: neither instruction nor input has text")
    output = _text(row.get("output", ""), "output")
    if not output.strip():
        raise RowError("empty response: output has no text")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": output}]


def _token_ids(value, where: str, vocab_size: int, *, labels: bool = False) -> list[int]:
    """A non-empty list of ids in [0, vocab_size); with `labels`, -100 too."""
    if not isinstance(value, list):
        raise RowError(f"{where} must be a list of integers, got {_type_name(value)}")
    if not value:
        raise RowError(f"{where} is empty")
    for index, token in enumerate(value):
        if type(token) is not int:
            raise RowError(f"{where}[{index}] must be an integer, got {_type_name(token)} {shown(token)}")
        if not 0 <= token < vocab_size and not (labels and token == IGNORED_LABEL):
            allowed = f"[0, {vocab_size})" + (f" or {IGNORED_LABEL}" if labels else "")
            raise RowError(f"{where}[{index}] is {shown(token)}, out of the vocabulary {allowed}")
    return value


def _tokenised(row: dict, vocab_size: int):
    """`input_ids` and `labels` up to the last trained token: what follows it carries no loss and no earlier token
    sees it.
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
            raise RowError("labels[0] is trained: with a teacher view the student needs a prompt of at least one token")
        labels[0] = IGNORED_LABEL  # no token stands before it that could predict it
    trained = [index for index, label in enumerate(labels) if label != IGNORED_LABEL]
    if not trained:
        raise RowError(f"empty response: no label after the first is other than {IGNORED_LABEL}")
    end = trained[-1] + 1
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


def _teacher(row: dict, messages: Optional[Messages], vocab_size: int):
    """(teacher_messages, teacher_input_ids), at most one of them not None; `teacher_prompt` is turned into
    teacher_messages.
    """
    present = [column for column in TEACHER_COLUMNS if column in row]
    if len(present) > 1:
        raise RowError(f"has {' and '.join(present)}: the teacher has one view")
    if not present:
        return None, None
    if present == ["teacher_input_ids"]:
        return None, _token_ids(row["teacher_input_ids"], "teacher_input_ids", vocab_size)
    if present == ["teacher_messages"]:
        view = _conversation(row["teacher_messages"], "teacher_messages", last_may_be_empty=True)
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
    view[users[-1]] = {"role": "user", "content": prompt}
    return view, None
