"""The tokens of a row's two views before its media are put in, and which of them are trained.

Every assistant turn of a row is trained. Where the teacher has a view of its own, these are the
last response, which both views share, and the earlier turns that are the same ids in both.
"""

from collections.abc import Sequence
from typing import NamedTuple

from megatron_gkd.data.chat import Chat
from megatron_gkd.data.chat_template import Conversation
from megatron_gkd.data.rows import Row
from megatron_gkd.data.turn_span import TurnSpan
from megatron_gkd.errors import RowError
from megatron_gkd.loss.rows import IGNORED_LABEL


class ViewTokens(NamedTuple):
    """The student's view, or the teacher's without the last response."""

    ids: list[int]
    labels: list[int]
    """Unshifted, -100: not trained"""
    response_start: int
    """Index of the last response's first token"""


class RowTokens(NamedTuple):
    student: ViewTokens
    teacher: ViewTokens | None
    """None: the student's"""
    shortened_turns: int
    """Assistant turns that are not trained, since the chat template leaves out a part of them"""
    trimmed_turns: int
    """Trained turns of which it leaves out white space"""


def conversations_of(row: Row) -> list[Conversation]:
    """What `row_tokens` needs as tokens: the student's conversation and then the teacher's, where
    the row has them.
    """
    found = []
    if row.messages is not None:
        found.append(Conversation(row.messages, row.options))
    if row.teacher_messages is not None:
        found.append(Conversation(row.teacher_messages, row.teacher_options, prompt_only=True))
    return found


def row_tokens(row: Row, chats: Sequence[Chat | RowError]) -> RowTokens:
    """chats: `conversations_of(row)` as tokens. Raises the first RowError of them, or one for a
    prompt without a token.
    """
    of_views = [_checked(chat) for chat in chats]
    teacher_chat = of_views.pop() if row.teacher_messages is not None else None
    if row.messages is None or not row.has_response:
        student = _as_given(row.input_ids or of_views[0].ids, row.labels)
        return RowTokens(student, _teacher(row, student, teacher_chat, []), 0, 0)

    (chat,) = of_views
    places = [index for index, turn in enumerate(row.messages) if turn["role"] == "assistant"]
    wanted = [turn for index, turn in zip(places, chat.turns) if index not in row.untrained]
    trained = [turn for turn in wanted if turn.change != "shortened"]
    in_teacher: list[TurnSpan] = []
    if teacher_chat is not None and _same_responses(row):
        pairs = [
            (turn, other)
            for turn, other in zip(chat.turns[:-1], teacher_chat.turns)
            if turn in trained and _ids(chat, turn) == _ids(teacher_chat, other)
        ]
        in_teacher = [other for _, other in pairs]
        trained = [*(turn for turn, _ in pairs), chat.turns[-1]]
    elif row.teacher_messages is not None or row.teacher_input_ids is not None:
        trained = chat.turns[-1:]
    student = ViewTokens(chat.ids, _labels(chat.ids, trained), chat.turns[-1].start)
    if not student.response_start:
        raise RowError("empty prompt: the chat template and the tokenizer make no token of it")
    return RowTokens(
        student,
        _teacher(row, student, teacher_chat, in_teacher),
        len(wanted) - sum(turn.change != "shortened" for turn in wanted),
        sum(turn.change == "trimmed" for turn in trained),
    )


def _as_given(ids: list[int], labels: list[int] | None) -> ViewTokens:
    """A tokenised row, or, without labels, a prompt alone."""
    if not ids:
        raise RowError("empty prompt: the chat template and the tokenizer make no token of it")
    if labels is None:
        return ViewTokens(ids, _labels(ids, []), len(ids))
    start = next(index for index, label in enumerate(labels) if label != IGNORED_LABEL)
    return ViewTokens(ids, list(labels), start)


def _teacher(
    row: Row, student: ViewTokens, chat: Chat | None, trained: list[TurnSpan]
) -> ViewTokens | None:
    """chat: `teacher_messages` as tokens; trained: which of its turns are."""
    if chat is not None:
        return ViewTokens(chat.ids, _labels(chat.ids, trained), len(chat.ids))
    if row.teacher_input_ids is not None:
        ids = row.teacher_input_ids
        return ViewTokens(ids, _labels(ids, []), len(ids))
    if row.teacher_media is not None:  # the same turns with other media
        start = student.response_start
        return ViewTokens(student.ids[:start], student.labels[:start], start)
    return None


def _same_responses(row: Row) -> bool:
    """Whether the teacher's turns hold all of the row's responses, and no other."""
    student, teacher = (
        [turn for turn in view or [] if turn["role"] == "assistant"]
        for view in (row.messages, row.teacher_messages)
    )
    return student == teacher


def _checked(chat: Chat | RowError) -> Chat:
    if isinstance(chat, RowError):
        raise chat
    return chat


def _ids(chat: Chat, turn: TurnSpan) -> list[int]:
    return chat.ids[turn.start : turn.end]


def _labels(ids: list[int], trained: Sequence[TurnSpan]) -> list[int]:
    """The ids of these turns, and -100 elsewhere."""
    labels = [IGNORED_LABEL] * len(ids)
    for turn in trained:
        labels[turn.start : turn.end] = ids[turn.start : turn.end]
    return labels
