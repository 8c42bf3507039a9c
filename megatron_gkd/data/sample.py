"""A `Sample`: what the student reads of a row, what the teacher reads, and which tokens are the
response.

Both views end with the same response, copied id by id; they differ in what precedes it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.loss.rows import IGNORED_LABEL
from megatron_gkd.media.medium import Medium


class MediumPositions(NamedTuple):
    """Where a view shows a medium."""

    medium: int
    """Its index in the sample's media"""
    positions: list[int]
    """Of its tokens in the view, in the order in which the tower gives their features"""


@dataclass(frozen=True)
class View:
    """What student or teacher reads of a row; S tokens.

    `labels` are unshifted, -100 = not trained; `response_start` is the index of the (last)
    response's first token, S where there is no response yet. `position_ids`, float32 [3, S], are
    the rotary positions in time, height and width; None: 0, 1, 2, ... in all three.
    """

    input_ids: list[int]
    labels: list[int]
    response_start: int
    position_ids: Tensor | None = None
    media: tuple[MediumPositions, ...] = ()

    def targets(self) -> list[int]:
        """The trained ids in order, without the first token of the view, which nothing predicts."""
        return [label for label in self.labels[1:] if label != IGNORED_LABEL]

    def with_response(self, response: list[int]) -> "View":
        """The prompt with another response, all of which is trained; its positions continue those
        of the prompt.
        """
        start, position_ids = self.response_start, self.position_ids
        if position_ids is not None:
            following = position_ids[:, start - 1 : start] + torch.arange(1, len(response) + 1)
            position_ids = torch.cat([position_ids[:, :start], following], dim=1)
        return replace(
            self,
            input_ids=self.input_ids[:start] + response,
            labels=[IGNORED_LABEL] * start + response,
            position_ids=position_ids,
        )


@dataclass(frozen=True)
class Sample:
    """A row's two views; without a teacher view `teacher` is the same object as `student`. `row` is
    the index in the data set, `cut_tokens` the number of trained tokens that did not fit into
    max_length. `media`: each once, whichever view shows it.
    """

    student: View
    teacher: View
    source: str
    row: int
    cut_tokens: int
    media: tuple[Medium, ...] = ()
    is_written: bool = False
    """Whether a rollout wrote the response"""
    log_probabilities: list[float] | None = None
    """In nats, of the response's tokens as the student drew them; None where it did not"""
    view_problem: str = ""
    """Why the teacher reads what the student reads, and not a view made of the response"""

    @property
    def has_response(self) -> bool:
        """False: a prompt alone, until a rollout has answered it."""
        return self.student.response_start < len(self.student.input_ids)

    @property
    def has_teacher_view(self) -> bool:
        return self.teacher is not self.student

    @property
    def num_tokens(self) -> int:
        """Of the heavier view"""
        return max(len(self.student.input_ids), len(self.teacher.input_ids))

    def with_response(
        self, response: list[int], log_probabilities: list[float] | None = None
    ) -> "Sample":
        """The sample with a response that was written to its prompt, the same in both views. Raises
        ValueError for an empty one (the end-of-text token counts).
        """
        if not response:
            raise ValueError(f"row {self.row} got a response of no token")
        student = self.student.with_response(response)
        return replace(
            self,
            student=student,
            teacher=student
            if self.teacher is self.student
            else self.teacher.with_response(response),
            cut_tokens=0,
            is_written=True,
            log_probabilities=log_probabilities,
            view_problem="",
        )

    @property
    def media_pair(self) -> str:
        """The kinds of media in both views, for metrics: see `media_pair`."""
        student, teacher = (
            [self.media[at.medium].kind for at in view.media]
            for view in (self.student, self.teacher)
        )
        return media_pair(student, teacher)


def media_pair(student: Iterable[str], teacher: Iterable[str]) -> str:
    """`audio > text`: the student hears, the teacher reads. Several kinds are joined by + in
    alphabetical order.
    """
    return " > ".join("+".join(sorted(set(kinds))) or "text" for kinds in (student, teacher))
