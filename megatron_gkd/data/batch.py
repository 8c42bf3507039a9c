"""Samples -> tensors, one row behind the other. Shapes: B rows, T positions of the packed sequence,
N response rows (positions that predict a trained token), M media tokens (positions whose embedding
comes from a tower).

A padding sample stands where a data-parallel rank has no row: one pad token, nothing trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_gkd.data.sample import Sample, View
from megatron_gkd.loss.rows import IGNORED_LABEL
from megatron_gkd.media.medium import Media, Medium


@dataclass
class BatchView:
    """What student or teacher reads: rows one behind the other, without a gap but for the padding
    that parallelism asks for, which follows a row's tokens.
    """

    input_ids: Tensor
    """int64 [1, T]"""
    position_ids: Tensor
    """float32 [3, 1, T]: temporal, height and width planes of the rotary positions, equal for text
    """
    lengths: list[int]
    """[B], tokens of each row without padding"""
    prompt_lengths: list[int]
    """[B], tokens before the (last) response"""
    starts: list[int]
    """[B + 1], position of each row's first token, and T"""
    response_rows: Tensor
    """int64 [N]: the positions whose next token is trained, row by row"""
    targets: Tensor
    """int64 [N]: those tokens"""
    num_targets: list[int]
    """[B], trained tokens of each row"""
    media_rows: Tensor
    """int64 [M]: the position of every media token"""
    media_tokens: Tensor
    """int64 [M]: the number of each among the tokens of the batch's `Media`"""

    @property
    def size(self) -> int:
        """T"""
        return self.starts[-1]

    def to(self, device: str | torch.device) -> "BatchView":
        tensors: Any = {n: x.to(device) for n, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


@dataclass
class Batch:
    """One micro-batch of one data-parallel rank. If no row has a teacher view, `teacher` is the
    same object as `student`.
    """

    student: BatchView
    teacher: BatchView
    samples: list[Sample | None]
    """Its rows, on the host; None: a padding sample"""
    sample_ids: list[int]
    """Of each row, its index in the global batch of the step; -1 for a padding sample"""
    media: Media | None = None
    """Those of all rows and both views; None if there are none"""
    log_probabilities: Tensor | None = None
    """fp32 [N], in nats: of the responses' tokens as the rollout drew them from the student; None
    where it did not
    """

    @property
    def rows(self) -> list[int]:
        """Index of each row in the data set; -1 for a padding sample"""
        return [-1 if sample is None else sample.row for sample in self.samples]

    @property
    def sources(self) -> list[str]:
        """Of each row; "" for a padding sample"""
        return ["" if sample is None else sample.source for sample in self.samples]

    @property
    def media_pairs(self) -> list[str]:
        """`Sample.media_pair` of each row; "" for a padding sample"""
        return ["" if sample is None else sample.media_pair for sample in self.samples]

    @property
    def is_written(self) -> bool:
        """Whether a rollout wrote the responses"""
        return any(sample is not None and sample.is_written for sample in self.samples)

    @property
    def cut_tokens(self) -> int:
        """Trained tokens that did not fit into max_length, of all rows"""
        return sum(0 if sample is None else sample.cut_tokens for sample in self.samples)

    @property
    def response_tokens(self) -> int:
        """Trained tokens, with those that --skip_first_tokens leaves out of the loss"""
        return sum(len(sample.student.targets()) for sample in self.samples if sample is not None)

    @property
    def num_failed_views(self) -> int:
        """Rows for which --teacher_template made no view of the response, against its will"""
        return sum(sample is not None and bool(sample.view_problem) for sample in self.samples)

    def to(self, device: str | torch.device) -> "Batch":
        """The batch with its tensors on `device`. Samples and media stay where they are: towers
        fetch what they encode.
        """
        student = self.student.to(device)
        return replace(
            self,
            student=student,
            teacher=student if self.teacher is self.student else self.teacher.to(device),
            log_probabilities=(
                None if self.log_probabilities is None else self.log_probabilities.to(device)
            ),
        )


@dataclass(frozen=True)
class Packing:
    """How rows become one sequence: what to pad with, and how far."""

    pad_token_id: int
    sequence_multiple: int = 1
    """T is a multiple of this, so that ranks have equal shards (`Parallel.sequence_multiple`)"""
    row_multiple: int = 1
    """So is each row of this (`Parallel.row_multiple`)"""
    skip_first_tokens: int = 0
    """So many trained tokens at the start of each response are left out: of every unbroken run of
    them, in a row of several turns of each turn
    """


def pack_views(
    views: Sequence[View], packing: Packing, first_token: Sequence[dict[int, int]] | None = None
) -> BatchView:
    """The views one behind the other.

    first_token: for each view, index of a medium in its sample -> number of the medium's first
    token among the tokens of the batch's `Media`; None where no view shows a medium.
    """
    starts = [0]
    for view in views:
        starts.append(starts[-1] + _up_to_multiple(len(view.input_ids), packing.row_multiple))
    starts[-1] = _up_to_multiple(starts[-1], packing.sequence_multiple)
    input_ids = torch.full((1, starts[-1]), packing.pad_token_id, dtype=torch.int64)
    position_ids = torch.zeros(3, 1, starts[-1])
    response_rows: list[int] = []
    targets: list[int] = []
    num_targets: list[int] = []
    media_rows: list[int] = []
    media_tokens: list[int] = []
    for index, (view, start) in enumerate(zip(views, starts)):
        end = start + len(view.input_ids)
        input_ids[0, start:end] = torch.tensor(view.input_ids, dtype=torch.int64)
        position_ids[:, 0, start:end] = (
            torch.arange(end - start, dtype=torch.float32)
            if view.position_ids is None
            else view.position_ids
        )
        # the position before a trained token predicts it; nothing predicts the first one
        trained = [at for at in range(1, end - start) if view.labels[at] != IGNORED_LABEL]
        if packing.skip_first_tokens:
            trained = _without_first(trained, packing.skip_first_tokens)
        response_rows += [start + at - 1 for at in trained]
        targets += [view.labels[at] for at in trained]
        num_targets.append(len(trained))
        for medium, positions in view.media:
            assert first_token is not None
            media_rows += [start + position for position in positions]
            first = first_token[index][medium]
            media_tokens += range(first, first + len(positions))
    return BatchView(
        input_ids=input_ids,
        position_ids=position_ids,
        lengths=[len(view.input_ids) for view in views],
        prompt_lengths=[view.response_start for view in views],
        starts=starts,
        response_rows=torch.tensor(response_rows, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        num_targets=num_targets,
        media_rows=torch.tensor(media_rows, dtype=torch.int64),
        media_tokens=torch.tensor(media_tokens, dtype=torch.int64),
    )


def _without_first(positions: list[int], number: int) -> list[int]:
    """The positions without the first `number` of each run of neighbours."""
    kept, in_run = [], 0
    for index, at in enumerate(positions):
        in_run = in_run + 1 if index and at == positions[index - 1] + 1 else 1
        if in_run > number:
            kept.append(at)
    return kept


def _up_to_multiple(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def collate(
    samples: Sequence[Sample | None], packing: Packing, sample_ids: Sequence[int] | None = None
) -> Batch:
    """Samples (None = padding sample) -> Batch. sample_ids: their indices in the global batch of
    the step; None counts them from 0.
    """
    samples = list(samples)
    padding_view = View([packing.pad_token_id], [IGNORED_LABEL], 1)
    students = [padding_view if sample is None else sample.student for sample in samples]
    teachers = [padding_view if sample is None else sample.teacher for sample in samples]
    media, first_token = _collect_media(samples)
    student = teacher = pack_views(students, packing, first_token)
    if any(view is not other for view, other in zip(students, teachers)):
        teacher = pack_views(teachers, packing, first_token)
    assert teacher is student or torch.equal(student.targets, teacher.targets), (
        "the views of student and teacher train different tokens"
    )
    ids = range(len(samples)) if sample_ids is None else sample_ids
    return Batch(
        student,
        teacher,
        samples,
        [-1 if sample is None else number for sample, number in zip(samples, ids)],
        media,
        _log_probabilities(samples, packing.skip_first_tokens),
    )


def _log_probabilities(samples: Sequence[Sample | None], skip: int) -> Tensor | None:
    """Of all rows' responses without their first `skip` tokens; None unless each has them."""
    rows = [sample.log_probabilities for sample in samples if sample is not None]
    if not rows or None in rows:
        return None
    return torch.tensor([value for row in rows if row is not None for value in row[skip:]])


def _collect_media(samples: Sequence[Sample | None]) -> tuple[Media | None, list[dict[int, int]]]:
    """All media, audios first, one that several samples share once; and for each sample, index of a
    medium in it -> number of the medium's first token.
    """
    found: dict[int, tuple[Medium, int]] = {}  # by identity
    for sample in samples:
        if sample is not None:
            for medium, row_length in zip(sample.media, _audio_row_lengths(sample)):
                found.setdefault(id(medium), (medium, row_length))
    ordered = sorted(found.values(), key=lambda item: item[0].kind != "audio")
    first_of, total = {}, 0
    for medium, _ in ordered:
        first_of[id(medium)] = total
        total += medium.num_tokens
    first_token = [
        {index: first_of[id(medium)] for index, medium in enumerate(sample.media)}
        if sample is not None
        else {}
        for sample in samples
    ]
    row_lengths = [length for medium, length in ordered if medium.kind == "audio"]
    return Media.of([medium for medium, _ in ordered], row_lengths), first_token


def _audio_row_lengths(sample: Sample) -> list[int]:
    """For each medium of the sample: of an audio, frames of the longest audio in the student's view
    if that shows it, else in the teacher's; its own if neither does. 0 of others.
    """
    frames = {
        index: medium.features.shape[1]
        for index, medium in enumerate(sample.media)
        if medium.kind == "audio"
    }
    longest = dict(frames)
    for view in (sample.teacher, sample.student):
        audios = [medium for medium, _ in view.media if medium in frames]
        for audio in audios:
            longest[audio] = max(frames[other] for other in audios)
    return [longest.get(index, 0) for index in range(len(sample.media))]
