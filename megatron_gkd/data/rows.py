"""A raw row (a JSON object or a table's row) -> a checked `Row`. No tokenizer is needed: types, ids
and which columns belong together.

Accepted: a conversation in one of the forms of data/forms.py, with the columns of
data/render_options.py, or `input_ids` + `labels`; one of `teacher_messages`, `teacher_prompt`,
`teacher_input_ids`; `images`, `audios`, `videos` and, for the teacher's view, `teacher_images`,
`teacher_audios`, `teacher_videos`; `use_audio_in_video`; `source`. Without a response (turns that
end with the user's or a tool's, or an empty one of the assistant; no `labels`) a row is a prompt
alone. A null column counts as absent.
Columns that would change the meaning if they were ignored are refused by name; any other column is
left alone.
"""

import difflib
from dataclasses import dataclass, field
from typing import Any

from megatron_gkd.data.conversation import (
    InlineMedia,
    Messages,
    RenderOptions,
    Turn,
    check_content,
    check_text,
    check_turns,
    with_responses,
)
from megatron_gkd.data.forms import (
    FORMS,
    OTHER_FORMS,
    PREFERENCES,
    RESPONSES,
    Form,
    form_of,
    read_turns,
)
from megatron_gkd.data.media_columns import (
    MEDIA_COLUMNS,
    RowMedia,
    inline_media,
    media_of,
    teacher_media_of,
    with_plurals,
)
from megatron_gkd.data.render_options import (
    RowDefaults,
    read_options,
    with_system,
    with_teacher_system,
)
from megatron_gkd.data.tokenised import token_ids, tokenised
from megatron_gkd.errors import RowError, short_repr, type_name
from megatron_gkd.media.medium import KINDS

REFUSED_COLUMNS = {
    **dict.fromkeys(
        ("teacher_conversations", "teacher_conversation"),
        "name it `teacher_messages`; turns of from/value are read there too",
    ),
    "teacher_query": "name it `teacher_prompt`",
    "teacher_tools": "the teacher has the tools of the row",
}
TEACHER_COLUMNS = ("teacher_messages", "teacher_prompt", "teacher_input_ids")
COLUMNS = (
    *(column for form in FORMS + OTHER_FORMS for columns in form.any_of for column in columns),
    *("history", *RESPONSES, "input_ids", "labels", "attention_mask"),
    *("tools", "system", "system_prompt"),
    *("chat_template_kwargs", "teacher_chat_template_kwargs", "teacher_system", *TEACHER_COLUMNS),
    *(name for column in MEDIA_COLUMNS for name in (column, column.removesuffix("s"))),
    *("use_audio_in_video", "source"),
)
"""Those that mean something in some row"""

_TEACHER_NAMES = (
    *TEACHER_COLUMNS,
    "teacher_system",
    "teacher_chat_template_kwargs",
    *(name for name in MEDIA_COLUMNS if name.startswith("teacher_")),
)
# Prefixes of columns that are left alone, such as teacher_image_id.
_TEACHER_METADATA = tuple(
    f"{name}_" for column in _TEACHER_NAMES for name in (column, column.removesuffix("s"))
)

_NO_DEFAULTS = RowDefaults()


@dataclass(frozen=True)
class Row:
    """Either `messages` or `input_ids`, and at most one teacher view. `teacher_media` is None if
    the teacher has the student's.

    With a response `messages` and `teacher_messages` end with an assistant turn, and `labels`
    (unshifted) stand beside `input_ids`. A prompt alone ends where the response will begin: with
    the turn before it, or with the last of `input_ids`, whose `labels` are None.
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
    options: RenderOptions = RenderOptions()
    teacher_options: RenderOptions = RenderOptions()
    untrained: frozenset[int] = frozenset()
    """Indices of assistant turns in `messages` that are context only; never the last turn's"""
    tags_as_text: int = 0
    """Tags such as `<audio>` in the turns of a view that has no such media outside its turns"""

    @property
    def has_media(self) -> bool:
        """In either view."""
        return any(self.media.values()) or any((self.teacher_media or {}).values())

    @property
    def has_response(self) -> bool:
        """False: a prompt alone, whose response is written in the run."""
        if self.messages is None:
            return self.labels is not None
        return self.messages[-1]["role"] == "assistant"


def check_row(
    raw: Any, vocab_size: int, folder: str = "", defaults: RowDefaults = _NO_DEFAULTS
) -> Row:
    """Check one raw row against the format above; ids must lie in [0, vocab_size). Paths of media
    are relative to `folder`; `defaults`: of the run's flags. Raises RowError with the reason.
    """
    if not isinstance(raw, dict):
        raise RowError(f"a row is a JSON object, this is {type_name(raw)}")
    row = with_plurals({name: value for name, value in raw.items() if value is not None})
    _refuse_columns(row)
    source = row.get("source")
    if source is not None:
        source = check_text(source, "source")
    form = form_of(row)

    messages = given = input_ids = labels = None
    untrained: frozenset[int] = frozenset()
    inline = inline_media(row, "", {})
    if form is None:
        has_teacher = any(column in row for column in TEACHER_COLUMNS)
        input_ids, labels = tokenised(row, vocab_size, has_teacher=has_teacher)
    else:
        given, untrained = _conversation(row, form, inline)
        messages = with_system(given, row, defaults)
        untrained = frozenset(index + len(messages) - len(given) for index in untrained)
    media = media_of(row, "", inline, folder)
    options, teacher_options = read_options(row, defaults)
    teacher_inline = inline_media(row, "teacher_", media)
    has_response = labels is not None if given is None else given[-1]["role"] == "assistant"
    teacher_messages, teacher_input_ids = _teacher(
        row, given, has_response, vocab_size, teacher_inline, defaults
    )
    is_same = teacher_messages == messages and teacher_options == options
    if is_same and not any(column in row for column in TEACHER_COLUMNS):
        teacher_messages = None
    teacher_media = teacher_media_of(row, media, inline, teacher_inline, teacher_messages, folder)
    use_audio_in_video = row.get("use_audio_in_video", False)
    if isinstance(use_audio_in_video, str):  # a table's text
        use_audio_in_video = {"true": True, "false": False}.get(
            use_audio_in_video.lower(), use_audio_in_video
        )
    if not isinstance(use_audio_in_video, bool):
        raise RowError(
            f"use_audio_in_video must be true or false, got {short_repr(use_audio_in_video)}"
        )
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
        options,
        teacher_options,
        untrained,
        len(inline.text_tags) + len(teacher_inline.text_tags),
    )


def _conversation(
    row: dict[str, Any], form: Form, inline: InlineMedia
) -> tuple[Messages, frozenset[int]]:
    """The row's turns up to the last trained one, and which of its assistant turns are context
    only: what follows carries no loss, and no trained token sees it. Of a prompt alone the turns
    before the response.
    """
    turns = form.turns(row)
    if turns[-1].role == "system":
        raise RowError(
            f"{form.name} end with a system turn: the last turn must be the user's, or the "
            "assistant's response"
        )
    if len(turns) > 1 and turns[-1].is_empty and turns[-2].role != "assistant":
        turns = turns[:-1]
    if turns[-1].role != "assistant":
        for column in (*RESPONSES, *PREFERENCES):
            text = row.get(column)
            if (isinstance(text, str) and text.strip()) or (text and column in PREFERENCES):
                raise RowError(
                    f"{form.name} end without a response, and column `{column}` would be left "
                    "out: make its text the response, or leave the column out"
                )
        return check_turns(turns, inline), frozenset()
    trained = [index for index, turn in enumerate(turns) if _is_trained(turn)]
    if not trained:
        raise RowError(
            "no assistant turn is trained, each has loss or weight 0 or is a part of `prompt`: "
            "without the last one the row is a prompt alone"
        )
    end = trained[-1] + 1
    if end < len(turns) and "teacher_messages" in row:
        raise RowError(
            f"the turns after {turns[end - 1].where} are not trained, and whether teacher_messages "
            "have them cannot be told: leave them out of both"
        )
    messages = check_turns(turns[:end], inline)
    untrained = {
        index
        for index, turn in enumerate(turns[:end])
        if turn.role == "assistant" and not turn.trained
    }
    return messages, frozenset(untrained)


def _is_trained(turn: Turn) -> bool:
    return turn.role == "assistant" and turn.trained


def _refuse_columns(row: dict[str, Any]) -> None:
    for name, reason in REFUSED_COLUMNS.items():
        if row.get(name):
            raise RowError(f"column `{name}` is not supported: {reason}")
    for name in row:
        if (
            name.startswith("teacher_")
            and name not in _TEACHER_NAMES
            and not name.startswith(_TEACHER_METADATA)
        ):
            if nearest := difflib.get_close_matches(name, _TEACHER_NAMES, n=1, cutoff=0.85):
                raise RowError(f"column `{name}` is unknown: is it `{nearest[0]}`?")


def _teacher(
    row: dict[str, Any],
    given: Messages | None,
    has_response: bool,
    vocab_size: int,
    inline: InlineMedia,
    defaults: RowDefaults,
) -> tuple[Messages | None, list[int] | None]:
    """(teacher_messages, teacher_input_ids), at least one of them None. A row without columns for
    the teacher has the turns that it gives, with the teacher's system turn; a `teacher_prompt`
    stands in the place of the last user turn. Those of a prompt alone end before the response.
    """
    present = [column for column in TEACHER_COLUMNS if column in row]
    if len(present) > 1:
        raise RowError(f"has {' and '.join(present)}: the teacher has one view")
    if present == ["teacher_input_ids"]:
        return None, token_ids(row["teacher_input_ids"], "teacher_input_ids", vocab_size)
    if present == ["teacher_messages"]:
        turns = read_turns(row["teacher_messages"], "teacher_messages")
        view = check_turns(turns, inline, may_be_empty=True)
        if not has_response:
            view = view[:-1] if view[-1]["role"] == "assistant" else view
        elif view[-1]["role"] != "assistant":
            raise RowError(
                "teacher view without response: teacher_messages end with a "
                f"{view[-1]['role']} turn, the last one must be an assistant turn (the row's "
                "response takes its place)"
            )
        view = with_responses(view, given, has_response=has_response)
        return with_teacher_system(view, row, defaults, own_turns=True), None
    if present == ["teacher_prompt"]:
        given = _with_prompt(row["teacher_prompt"], given, inline)
    if given is None:
        return None, None
    return with_teacher_system(given, row, defaults, own_turns=False), None


def _with_prompt(value: Any, messages: Messages | None, inline: InlineMedia) -> Messages:
    """The turns with `teacher_prompt` as the last user turn."""
    prompt = check_text(value, "teacher_prompt")
    if not prompt.strip():
        raise RowError("teacher_prompt has no text")
    if messages is None:
        raise RowError(
            "teacher_prompt replaces a user turn, and a tokenised row has none: give "
            "teacher_messages or teacher_input_ids"
        )
    users = [index for index, turn in enumerate(messages) if turn["role"] == "user"]
    if not users:
        raise RowError("teacher_prompt replaces the last user turn, and messages have none")
    view = list(messages)
    view[users[-1]] = {"role": "user", "content": check_content(prompt, "teacher_prompt", inline)}
    return view
