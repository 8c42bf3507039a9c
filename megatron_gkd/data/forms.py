"""The forms in which rows hold a conversation -> its turns, as `check_turns` takes them: one
function a form, and the names that programs give to roles, calls of tools and flags of a turn.

Nothing is rendered here: calls and results of tools go into turns as chat templates know them.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from megatron_gkd.data.conversation import Turn, check_text
from megatron_gkd.errors import RowError, short_repr, shortened, type_name

_CALL = "tool_call"
# The names in use -> the role. A `tool_call` belongs to the assistant turn before it, or is one.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function": "tool",
    "observation": "tool",
    "observations": "tool",
    "tool_call": _CALL,
    "function_call": _CALL,
}
_FLAGS = ("loss", "weight", "loss_scale")
_PASSED_ON = ("name", "tool_call_id", "reasoning_content")
_INSTEAD = {
    "reasoning": "name it reasoning_content",
    "thinking": "name it reasoning_content",
    "refusal": "write it as content",
    **dict.fromkeys(
        ("images", "audios", "videos", "image", "audio", "video"),
        "media stand in the content's parts, or in a column of the row",
    ),
}


def read_turns(value: Any, where: str) -> list[Turn]:
    """A list of turns, or its JSON text: role/content, from/value, or pairs of human and assistant.
    Calls that stand in turns of their own are part of the assistant turn before them. Raises
    RowError naming the turn.
    """
    given = json_value(value, where)
    if not isinstance(given, list):
        raise RowError(f"{where} must be a list of turns, got {type_name(value)}")
    if not given:
        raise RowError(f"{where} is empty")
    turns: list[Turn] = []
    for index, turn in enumerate(given):
        place = f"{where}[{index}]"
        if not isinstance(turn, dict):
            raise RowError(
                f"{place} must be an object with role and content, got {type_name(turn)}"
            )
        held = {name: item for name, item in turn.items() if item is not None}
        is_one = "role" in held or "from" in held
        for read in [_turn(held, place)] if is_one else _pair(held, place):
            before = turns[-1] if turns else None
            if read.is_call and before is not None and before.role == "assistant":
                if before.trained != read.trained:
                    raise RowError(
                        f"{place} is a call of the turn before it, and only one of them is "
                        "trained: give both the same loss"
                    )
                turns[-1] = before._replace(tool_calls=before.tool_calls + read.tool_calls)
            else:
                turns.append(read)
    return turns


def json_value(value: Any, where: str) -> Any:
    """The value, or what its text says if that begins as JSON's lists and objects do."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(
            f"{where} is text that is not JSON ({error}); json.dumps writes it, str() does not"
        ) from None


def as_json(value: Any, where: str) -> str:
    """The text of a value from JSON or a table. Raises RowError for one that has none."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"{where} cannot be written as JSON: {error}") from None
    return check_text(text, where)


def _pair(held: dict[str, Any], place: str) -> list[Turn]:
    """Two turns out of {"human": ..., "assistant": ...}; anything else is one without a role."""
    user = next((name for name in ("human", "user") if name in held), None)
    assistant = next((name for name in ("assistant", "gpt", "bot") if name in held), None)
    if user is None or len(held) != 1 + (assistant is not None):
        return [_turn(held, place)]
    turns = [Turn("user", held[user], place, f"{place}.{user}")]
    if assistant is not None:
        turns.append(Turn("assistant", held[assistant], place, f"{place}.{assistant}"))
    return turns


def _turn(held: dict[str, Any], place: str) -> Turn:
    """One turn, without its null entries."""
    held = dict(held)
    role_name = "from" if "from" in held and "role" not in held else "role"
    content_name = "value" if "value" in held and "content" not in held else "content"
    given = held.pop(role_name, None)
    role = _ROLES.get(given.replace("-", "_")) if isinstance(given, str) else None
    if role is None:
        raise RowError(
            f"{place}.{role_name} {short_repr(given)} is unknown: system, user, assistant, "
            "tool are the roles"
        )
    content = held.pop(content_name, None)
    is_call, calls = role == _CALL, []
    if is_call:
        role, calls = "assistant", read_calls(content, f"{place}.{content_name}")
        content = ""
    elif role == "assistant":
        for name in ("tool_calls", "function_call"):
            if given := held.pop(name, None):
                calls += read_calls(given, f"{place}.{name}")
    elif role == "tool" and isinstance(content, (dict, list)) and not _is_parts(content):
        content = as_json(content, f"{place}.{content_name}")
    trained = _is_trained(held, role, place)
    passed_on = {name: held.pop(name) for name in _PASSED_ON if name in held}
    for name, text in passed_on.items():
        check_text(text, f"{place}.{name}")
    if extra := sorted(name for name, item in held.items() if item not in ("", [], {})):
        instead = [f"{name}: {_INSTEAD[name]}" for name in extra if name in _INSTEAD]
        names = ", ".join(shortened(name, 40) for name in extra[:8])
        raise RowError(
            f"{place} has {names}: a turn has role and content, nothing else is rendered"
            + (f" ({'; '.join(instead)})" if instead else "")
        )
    return Turn(
        role, content, place, f"{place}.{content_name}", tuple(calls), passed_on, trained, is_call
    )


def _is_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, dict) and ("type" in part or "text" in part) for part in content
    )


def _is_trained(held: dict[str, Any], role: str, place: str) -> bool:
    """Takes the flags of the turn out of `held`; without one it is trained."""
    trained = True
    for name in _FLAGS:
        value = held.pop(name, None)
        if value is None:
            continue
        if value not in (0, 1):
            raise RowError(
                f"{place}.{name} is {short_repr(value)}: 1 or true trains the turn, 0 or false "
                "does not; there are no weights between"
            )
        if value and role != "assistant":
            raise RowError(f"{place}.{name} is {value!r}: only assistant turns can be trained")
        trained = trained and bool(value)
    return trained


def read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls of tools as templates take them: {"type": "function", "function": {"name": ...,
    "arguments": {...}}}. `value`: one or a list, with or without `function` around, or JSON text.
    """
    given = json_value(value, where)
    if isinstance(given, dict):
        given = [given]
    if not isinstance(given, list):
        raise RowError(
            f"{where} must be a call, {{'name': ..., 'arguments': {{...}}}}, or a list of them, "
            f"got {type_name(given)} {short_repr(given)}"
        )
    calls = []
    for index, call in enumerate(given):
        place = f"{where}[{index}]"
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{place} is a call without a name: {short_repr(call)}")
        arguments = json_value(function.get("arguments") or {}, f"{place}.arguments")
        if not isinstance(arguments, dict):
            raise RowError(
                f"{place}.arguments must be an object or its JSON text, got {type_name(arguments)} "
                f"{short_repr(arguments)}"
            )
        read = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if isinstance(call.get("id"), str):
            read["id"] = call["id"]
        as_json(read, place)
        calls.append(read)
    return calls


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The column `tools`: definitions, or their JSON text; None for none. One without
    `{"type": "function", "function": ...}` around gets it.
    """
    given = json_value(value, "tools")
    if given is None or given in ("", [], {}):
        return None
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise RowError(
            f"tools must be a list of objects, or its JSON text, got {short_repr(value)}"
        )
    as_json(given, "tools")
    return [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
        for tool in given
    ]


# Of a row in no form: what its columns mean here.
_NO_FORM = {
    "data": "rows in a list of one object are written one a line by jq -c '.data[]' FILE > "
    "NEW_FILE.jsonl",
    "chosen": "of pairs for preference training keep the better one, as the response",
    "rejected_response": "keep the better response alone",
    "text": "`text` is not divided into prompt and response: write it as `messages`",
}
PREFERENCES = ("chosen", "rejected_response")
"""The columns of pairs for preference training"""
_TOKENISED_REFUSES = ("history", "system", "system_prompt", "tools", "loss_scale")
_TURNS = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
_ROLE = re.compile(rf"""["'](role|from)["']\s*:\s*["']({"|".join(_ROLES)})["']""", re.IGNORECASE)
RESPONSES = ("output", "response", "completion")
"""The columns of a response, in any form"""


class Form(NamedTuple):
    """`any_of`: a row with all columns of one of these has this form."""

    name: str
    any_of: tuple[tuple[str, ...], ...]
    turns: Callable[[dict[str, Any]], list[Turn]]
    refuses: tuple[str, ...] = ("history",)
    """Columns that would be left unread"""

    def is_of(self, row: dict[str, Any]) -> bool:
        return any(all(column in row for column in columns) for columns in self.any_of)


def _messages(row: dict[str, Any]) -> list[Turn]:
    return read_turns(row["messages"], "messages")


def _conversations(row: dict[str, Any]) -> list[Turn]:
    column = "conversations" if "conversations" in row else "conversation"
    return read_turns(row[column], column)


def _alpaca(row: dict[str, Any]) -> list[Turn]:
    parts = [check_text(row[name], name) for name in ("instruction", "input") if name in row]
    prompt = "\n".join(part for part in parts if part)
    if not prompt.strip():
        raise RowError("empty prompt: neither instruction nor input has text")
    context = row.get("context")
    if isinstance(context, str) and context.strip() and "input" not in row:
        raise RowError(
            "column `context` would be left out: if it is the input, "
            """--columns '{"context": "input"}', else any other name"""
        )
    user = Turn("user", prompt, "instruction", "instruction")
    return [*_history(row), user, *_response(row, _response_column(row, "output"))]


def _query(row: dict[str, Any]) -> list[Turn]:
    user = Turn("user", check_text(row["query"], "query"), "query", "query")
    return [*_history(row), user, *_response(row, _response_column(row, "response"))]


def _prompt(row: dict[str, Any]) -> list[Turn]:
    """Turns of the prompt are not trained: it is the completion that is."""
    if _are_turns(row["prompt"]):
        turns = [turn._replace(trained=False) for turn in read_turns(row["prompt"], "prompt")]
    else:
        turns = [Turn("user", check_text(row["prompt"], "prompt"), "prompt", "prompt")]
    column = _response_column(row)
    if _are_turns(row.get(column)):
        return turns + (read_turns(row[column], column) if row[column] else [])
    return [*turns, *_response(row, column)]


def _are_turns(value: Any) -> bool:
    """Of a value that may be a text: whether it is a list, or the text of one of turns: a response
    may be a list of other objects (`[{"from": "Paris", "to": "Rome"}]`).
    """
    if isinstance(value, str):
        return _TURNS.match(value) is not None and _ROLE.search(value) is not None
    return isinstance(value, list)


def _history(row: dict[str, Any]) -> list[Turn]:
    """The column `history`: pairs of a prompt and its response."""
    turns = []
    history = json_value(row.get("history") or [], "history")
    if not isinstance(history, list):
        raise RowError(f"history must be a list of [prompt, response], got {type_name(history)}")
    for index, pair in enumerate(history):
        place = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"{place} must be [prompt, response], got {short_repr(pair)}")
        for role, number in (("user", 0), ("assistant", 1)):
            where = f"{place}[{number}]"
            turns.append(Turn(role, check_text(pair[number], where), where, where))
    return turns


def _response_column(row: dict[str, Any], own: str = "") -> str:
    """The column with the response: the form's own, else that of another form."""
    given = [own] if own in row else [column for column in RESPONSES if column in row]
    if len(given) > 1:
        raise RowError(f"has {' and '.join(given)}: one of them must go, they are the same thing")
    return given[0] if given else own or "completion"


def _response(row: dict[str, Any], column: str) -> list[Turn]:
    """The last turn; none, if the column is absent or empty: a prompt alone."""
    text = check_text(row.get(column, ""), column)
    return [Turn("assistant", text, column, column)] if text.strip() else []


FORMS = (
    Form("messages", (("messages",),), _messages),
    Form("instruction/output", (("instruction",), ("input", "output")), _alpaca, ()),
)
# Looked for in rows that have none of the above, in which these columns may be anything.
OTHER_FORMS = (
    Form("conversations", (("conversations",), ("conversation",)), _conversations),
    Form("query/response", (("query",),), _query, ()),
    Form("prompt/completion", (("prompt",),), _prompt),
)


def form_of(row: dict[str, Any]) -> Form | None:
    """The form of the row's conversation; None for a tokenised row."""
    found = [form for form in FORMS if form.is_of(row)]
    names = [form.name for form in found]
    if "input_ids" in row or "labels" in row:
        names.append("input_ids/labels")
    if not names:
        found = [form for form in OTHER_FORMS if form.is_of(row)]
        names = [form.name for form in found]
    if not names:
        known = ", ".join(f"`{form.name.replace('/', '` + `')}`" for form in FORMS + OTHER_FORMS)
        instead = next((_NO_FORM[name] for name in row if name in _NO_FORM), "")
        raise RowError(
            f"has none of {known}, `input_ids` + `labels`"
            + (
                f" (its columns: {', '.join(shortened(name, 40) for name in list(row)[:8])})"
                if row
                else " (every column is empty)"
            )
            + (f": {instead}" if instead else "; --columns gives columns other names")
        )
    if len(names) > 1:
        raise RowError(
            f"has {' and '.join(names)}: one of them must go, they may say different things"
        )
    form = found[0] if found else None
    for name in _TOKENISED_REFUSES if form is None else form.refuses:
        if row.get(name):
            raise RowError(
                f"column `{name}` is not supported beside {names[0]}: write it into {names[0]}"
            )
    return form


def with_columns_renamed(raw: Any, names: Mapping[str, str]) -> Any:
    """The row with its columns under the new `names`; what is no row stays as it is."""
    if not isinstance(raw, dict) or not names:
        return raw
    row = {name: value for name, value in raw.items() if name not in names}
    for old, new in names.items():
        if raw.get(old) is None:
            continue
        if row.get(new) is not None:
            raise RowError(f"--columns names `{old}` `{new}`, and the row has a `{new}` already")
        row[new] = raw[old]
    return row
