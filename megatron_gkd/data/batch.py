"""Samples -> padded tensors. Shapes: B rows, S positions (padded), N response rows (positions that predict a trained
token).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Optional, Union

import torch
from torch import Tensor

from megatron_gkd.data.rows import IGNORED_LABEL
from megatron_gkd.data.sample import Sample, View


@dataclass
class BatchView:
    """What one side reads. All int64; padding stands on the right."""

    input_ids: Tensor
    """[B, S]"""
    labels: Tensor
    """[B, S], unshifted, -100 = not trained"""
    lengths: Tensor
    """[B], tokens without padding"""
    prompt_lengths: Tensor
    """[B], tokens before the (last) response"""
    position_ids: Tensor
    """[3, B, S]: temporal, height and width planes of the rotary positions, equal for text"""

    @property
    def response_rows(self) -> Tensor:
        """int64 [N]: b * S + s of every position whose shifted label is trained, row by row."""
        size = self.labels.shape[1]
        row, position = (self.labels[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)
        return row * size + position

    @property
    def targets(self) -> Tensor:
        """int64 [N]: the trained ids, in the order of `response_rows`."""
        shifted = self.labels[:, 1:]
        return shifted[shifted != IGNORED_LABEL]

    def to(self, device: Union[str, torch.device]) -> "BatchView":
        names = ("input_ids", "labels", "lengths", "prompt_lengths", "position_ids")
        return BatchView(**{name: getattr(self, name).to(device) for name in names})


@dataclass
class Batch:
    """One micro-batch of one data-parallel rank. Without any teacher view `teacher` is the same object as `student`."""

    student: BatchView
    teacher: BatchView
    has_teacher_view: bool
    on_policy: bool = False
    sources: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """Index of each row in the data set; -1 for a filler row (one pad token, nothing trained)."""
    cut_tokens: int = 0

    def to(self, device: Union[str, torch.device]) -> "Batch":
        """The batch with its tensors on `device`."""
        student = self.student.to(device)
        return replace(
            self, student=student, teacher=student if self.teacher is self.student else self.teacher.to(device)
        )


def pad_views(views: Sequence[View], pad_token_id: int, pad_to_multiple_of: int) -> BatchView:
    """Pad on the right to the longest view, rounded up to a multiple of `pad_to_multiple_of` positions."""
    longest = max(len(view.input_ids) for view in views)
    size = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(views), size), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(views), size), IGNORED_LABEL, dtype=torch.int64)
    for index, view in enumerate(views):
        input_ids[index, : len(view.input_ids)] = torch.tensor(view.input_ids, dtype=torch.int64)
        labels[index, : len(view.labels)] = torch.tensor(view.labels, dtype=torch.int64)
    return BatchView(
        input_ids=input_ids,
        labels=labels,
        lengths=torch.tensor([len(view.input_ids) for view in views]),
        prompt_lengths=torch.tensor([view.response_start for view in views]),
        position_ids=torch.arange(size).expand(3, len(views), size).contiguous(),
    )


def _make_batch(
    students: list[View], teachers: list[View], pad_token_id: int, pad_to_multiple_of: int, **rest
) -> Batch:
    student = pad_views(students, pad_token_id, pad_to_multiple_of)
    if all(mine is other for mine, other in zip(students, teachers)):
        return Batch(student, student, **rest)
    teacher = pad_views(teachers, pad_token_id, pad_to_multiple_of)
    assert torch.equal(student.targets, teacher.targets), "the views of student and teacher train different tokens"
    return Batch(student, teacher, **rest)


def _filler(pad_token_id: int) -> View:
    return View([pad_token_id], [IGNORED_LABEL], 1)


def collate(samples: Sequence[Optional[Sample]], pad_token_id: int, pad_to_multiple_of: int) -> Batch:
    """Samples (None = filler row) -> Batch. The multiple is the tensor-parallel size under sequence parallelism."""
    filler = _filler(pad_token_id)
    return _make_batch(
        [filler if sample is None else sample.student for sample in samples],
        [filler if sample is None else sample.teacher for sample in samples],
        pad_token_id,
        pad_to_multiple_of,
        has_teacher_view=any(sample is not None and sample.has_teacher_view for sample in samples),
        sources=["" if sample is None else sample.source for sample in samples],
        rows=[-1 if sample is None else sample.row for sample in samples],
        cut_tokens=sum(0 if sample is None else sample.cut_tokens for sample in samples),
    )


def with_responses(
    batch: Batch, responses: Sequence[Sequence[int]], pad_token_id: int, pad_to_multiple_of: int
) -> Batch:
    """The batch with new responses (CPU or GPU batch in, same device out): both views keep their prompts, every
    response token is trained.

    A response holds at least one id (the end-of-text token counts); a filler row's stays empty. Raises ValueError
    otherwise.
    """
    if len(responses) != len(batch.rows):
        raise ValueError(f"{len(responses)} responses for a batch of {len(batch.rows)} rows")
    for row, response in zip(batch.rows, responses):
        if (len(response) > 0) != (row >= 0):
            raise ValueError(
                f"row {row} got a response of {len(response)} tokens: data rows need at least one, filler rows (-1) "
                "none"
            )

    def rewrite(view: BatchView) -> list[View]:
        prompts = [ids[:length] for ids, length in zip(view.input_ids.tolist(), view.prompt_lengths.tolist())]
        return [
            View(prompt + list(response), [IGNORED_LABEL] * len(prompt) + list(response), len(prompt))
            for prompt, response in zip(prompts, responses)
        ]

    students = rewrite(batch.student)
    teachers = students if batch.teacher is batch.student else rewrite(batch.teacher)
    rewritten = _make_batch(
        students,
        teachers,
        pad_token_id,
        pad_to_multiple_of,
        has_teacher_view=batch.has_teacher_view,
        on_policy=True,
        sources=batch.sources,
        rows=batch.rows,
        cut_tokens=0,
    )
    return rewritten.to(batch.student.input_ids.device)
