"""What a row's columns and the run's flags give the chat template of either view beside the turns:
the system turn, the template's variables, the tools. The teacher has the student's values unless it
has its own.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_gkd.data.conversation import Messages, RenderOptions, check_text
from megatron_gkd.data.forms import as_json, json_value, read_tools
from megatron_gkd.errors import RowError, short_repr, type_name

# What `apply_chat_template` takes that is no variable of a template, or is set here.
RESERVED = (
    "messages",
    "conversation",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "sanitize_control_tokens",
)
_OF_MEDIA = ("max_pixels", "min_pixels", "fps", "total_pixels", "nframes", "max_frames")


class RowDefaults(NamedTuple):
    """What the flags give to rows that do not have it in their columns."""

    system: str | None = None
    teacher_system: str | None = None
    variables: Mapping[str, Any] = {}
    teacher_variables: Mapping[str, Any] = {}


def check_variables(value: Any, where: str) -> dict[str, Any]:
    """Variables of a chat template: an object, or its JSON text. Raises RowError naming `where` for
    one that is not the template's.
    """
    given = json_value(value, where)
    if not isinstance(given, dict):
        raise RowError(
            f'{where} must be a JSON object such as {{"enable_thinking": false}}, got '
            f"{type_name(given)} {short_repr(given)}"
        )
    for name in given:
        if name in RESERVED:
            raise RowError(
                f"{where}: {name} is no variable of a template, it is set here"
                + (": use the column `tools`" if name == "tools" else "")
            )
        if name in _OF_MEDIA:
            raise RowError(
                f"{where}: {name} belongs to the media, not to the template: it is set in the "
                "folder's preprocessor_config.json"
            )
        if not name.isidentifier():
            raise RowError(f"{where}: {short_repr(name)} is no name of a variable")
    as_json(given, where)
    return given


def read_options(
    row: Mapping[str, Any], defaults: RowDefaults
) -> tuple[RenderOptions, RenderOptions]:
    """(the student's, the teacher's). Columns win over flags, name by name. Raises RowError for the
    teacher's columns beside a view of ids, where they would say nothing.
    """
    of_ids = "teacher_input_ids" in row or ("input_ids" in row and "teacher_messages" not in row)
    for column in ("teacher_system", "teacher_chat_template_kwargs"):
        if of_ids and column in row:
            raise RowError(f"`{column}` is for turns, and the teacher's view of this row is ids")
    own, teachers = (
        check_variables(row[column], column) if column in row else {}
        for column in ("chat_template_kwargs", "teacher_chat_template_kwargs")
    )
    tools = read_tools(row.get("tools"))
    student = {**defaults.variables, **own}
    return (
        RenderOptions(tools, student),
        RenderOptions(tools, {**student, **defaults.teacher_variables, **teachers}),
    )


def with_system(messages: Messages, row: Mapping[str, Any], defaults: RowDefaults) -> Messages:
    """The student's view with the system turn of the column `system` (or `system_prompt`), or else
    of the flag, if it has none of its own.
    """
    column = _system_column(row)
    if column is not None:
        _check_no_other(messages, row[column], column)
        return _before(messages, row[column])
    return _before(messages, defaults.system)


def with_teacher_system(
    messages: Messages, row: Mapping[str, Any], defaults: RowDefaults, *, own_turns: bool
) -> Messages:
    """The teacher's view with the system turn of the column `teacher_system`, or else with the
    student's column, the teacher's flag or the student's flag, if it has none of its own.

    own_turns: the view stands in the row, it is not made from the student's.
    """
    text = row.get("teacher_system")
    if text is not None:
        check_text(text, "teacher_system")
        if own_turns:
            _check_no_other(messages, text, "teacher_system")
        elif messages[0]["role"] == "system":
            messages = messages[1:]
        return _before(messages, text)
    column = _system_column(row)
    if column is not None:
        return _before(messages, row[column])
    flag = defaults.system if defaults.teacher_system is None else defaults.teacher_system
    return _before(messages, flag)


def _system_column(row: Mapping[str, Any]) -> str | None:
    found = [name for name in ("system", "system_prompt") if name in row]
    for name in found:
        check_text(row[name], name)
    if len(found) > 1 and row["system"] != row["system_prompt"]:
        raise RowError("has system and system_prompt: one of them must go, they are the same thing")
    return found[0] if found else None


def _check_no_other(messages: Messages, text: str, column: str) -> None:
    first = messages[0]
    if text and first["role"] == "system" and first["content"] != text:
        raise RowError(
            f"has a system turn and column `{column}`, which say different things: one of them "
            "must go"
        )


def _before(messages: Messages, system: str | None) -> Messages:
    """An empty text is no turn."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]
