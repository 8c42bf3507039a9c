"""A checked row -> a `Sample`: what the student reads, what the teacher reads, and which tokens are the response.

Both views end with the same response, copied id by id; they differ in what stands before it. A row without a teacher
view trains every assistant turn; with one, only the last response is trained, the one that both views share.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Optional

from megatron_gkd.data.chat import ChatTokenizer
from megatron_gkd.data.errors import RowError
from megatron_gkd.data.rows import IGNORED_LABEL, Row


@dataclass(frozen=True)
class View:
    """`labels` are unshifted, -100 = not trained; `response_start` is the index of the (last) response's first
    token.
    """

    input_ids: list[int]
    labels: list[int]
    response_start: int

    def targets(self) -> list[int]:
        """The trained ids in order; the first token of a view has no place that predicts it."""
        return [label for label in self.labels[1:] if label != IGNORED_LABEL]


@dataclass(frozen=True)
class Sample:
    """`teacher` is `student` itself without a teacher view. `row` is the index in the data set, `cut_tokens` the
    trained tokens of the response that did not fit into max_length.
    """

    student: View
    teacher: View
    has_teacher_view: bool
    source: str
    row: int
    cut_tokens: int


class Encoded(NamedTuple):
    """The compact form of a sample, as it is stored: the teacher's view is its prompt and the student's response."""

    input_ids: list[int]
    labels: list[int]
    response_start: int
    teacher_prompt: Optional[list[int]]
    cut_tokens: int


def encode_row(row: Row, get_chat: Callable[[], ChatTokenizer], max_length: int, vocab_size: int) -> Encoded:
    """Tokenise a checked row and cut its response so that both views have at most `max_length` tokens.

    `get_chat` is called only if the row holds text. Raises RowError for ids of the tokenizer that the model does not
    have and for a prompt that leaves no room for a response.
    """
    if row.input_ids is not None:
        input_ids, labels = row.input_ids, list(row.labels)
        start = next(index for index, label in enumerate(labels) if label != IGNORED_LABEL)
    else:
        input_ids, spans = get_chat().encode(row.messages)
        labels = [IGNORED_LABEL] * len(input_ids)
        for begin, end in spans:
            labels[begin:end] = input_ids[begin:end]
        start = spans[-1][0]
        if start == 0:
            raise RowError("empty prompt: the chat template and the tokenizer make no token of it")
    teacher_prompt = _teacher_prompt(row, get_chat)
    if teacher_prompt is not None:
        labels[:start] = [IGNORED_LABEL] * start
    for ids in (input_ids, teacher_prompt or []):
        if max(ids, default=0) >= vocab_size:
            raise RowError(
                f"the tokenizer gives id {max(ids)}, out of the model's vocabulary [0, {vocab_size}): is it another "
                "model's tokenizer?"
            )

    for name, num_prompt in (("prompt", start), ("teacher's prompt", len(teacher_prompt or []))):
        if num_prompt >= max_length:
            raise RowError(
                f"the {name} has {num_prompt} tokens and leaves no room for a response in --max_length {max_length}"
            )
    end = start + max_length - max(start, len(teacher_prompt or []))
    num_trained = _num_trained(labels)
    labels = labels[:end]
    while labels[-1] == IGNORED_LABEL:
        labels.pop()
    if teacher_prompt == input_ids[:start]:
        teacher_prompt = None  # the teacher sees what the student sees
    return Encoded(input_ids[: len(labels)], labels, start, teacher_prompt, num_trained - _num_trained(labels))


def _num_trained(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORED_LABEL)


def _teacher_prompt(row: Row, get_chat: Callable[[], ChatTokenizer]) -> Optional[list[int]]:
    """The teacher's tokens before the response; None without a teacher view."""
    if row.teacher_messages is None:
        return row.teacher_input_ids
    response = row.messages[-1]["content"] if row.messages else "response"  # only what stands before it is kept
    return get_chat().encode_prompt(row.teacher_messages[:-1] + [{"role": "assistant", "content": response}])


def decode_sample(encoded: Encoded, source: str, row: int) -> Sample:
    """The stored form -> a Sample. Both views train the same ids in the same order."""
    student = View(encoded.input_ids, encoded.labels, encoded.response_start)
    teacher = student
    if encoded.teacher_prompt is not None:
        prompt, start = encoded.teacher_prompt, encoded.response_start
        teacher = View(
            prompt + student.input_ids[start:], [IGNORED_LABEL] * len(prompt) + student.labels[start:], len(prompt)
        )
        assert teacher.targets() == student.targets(), (
            f"row {row}: the views of student and teacher train different tokens"
        )
    return Sample(student, teacher, teacher is not student, source, row, encoded.cut_tokens)
