"""Samples -> padded tensors. Shapes: B rows, S positions (padded), N response rows (positions that
predict a trained token), M media tokens (positions whose embedding a tower makes).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_gkd.data.rows import IGNORED_LABEL
from megatron_gkd.data.sample import Sample, View
from megatron_gkd.media.medium import Media


@dataclass
class BatchView:
    """What one side reads. int64 but for the position ids; padding stands on the right."""

    input_ids: Tensor
    """[B, S]"""
    labels: Tensor
    """[B, S], unshifted, -100 = not trained"""
    lengths: Tensor
    """[B], tokens without padding"""
    prompt_lengths: Tensor
    """[B], tokens before the (last) response"""
    position_ids: Tensor
    """float32 [3, B, S]: temporal, height and width planes of the rotary positions, equal for text
    """
    media_rows: Tensor
    """[M]: b * S + s of every media token"""
    media_tokens: Tensor
    """[M]: its number among the tokens of the batch's `Media`"""

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

    def to(self, device: str | torch.device) -> "BatchView":
        return BatchView(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass
class Batch:
    """One micro-batch of one data-parallel rank. Without any teacher view `teacher` is the same
    object as `student`.
    """

    student: BatchView
    teacher: BatchView
    has_teacher_view: bool
    on_policy: bool = False
    sources: list[str] = field(default_factory=list)
    """Of each row; "" for a filler row"""
    media_pairs: list[str] = field(default_factory=list)
    """What student and teacher perceive of each row (`Sample.media_pair`)"""
    rows: list[int] = field(default_factory=list)
    """Index of each row in the data set; -1 for a filler row (one pad token, nothing trained)."""
    cut_tokens: int = 0
    media: Media | None = None

    def to(self, device: str | torch.device) -> "Batch":
        """The batch with its tensors on `device`."""
        student = self.student.to(device)
        return replace(
            self,
            student=student,
            teacher=student if self.teacher is self.student else self.teacher.to(device),
            media=None if self.media is None else self.media.to(device),
        )


def pad_views(
    views: Sequence[View],
    pad_token_id: int,
    pad_to_multiple_of: int,
    first_token: Sequence[dict[int, int]],
) -> BatchView:
    """Pad on the right to the longest view, rounded up to a multiple of `pad_to_multiple_of`
    positions.

    first_token: for each view's sample, its media -> the number of the medium's first token in the
    batch's `Media`.
    """
    longest = max(len(view.input_ids) for view in views)
    size = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(views), size), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(views), size), IGNORED_LABEL, dtype=torch.int64)
    position_ids = torch.arange(size, dtype=torch.float32).repeat(3, len(views), 1)
    media_rows, media_tokens = [], []
    for index, view in enumerate(views):
        length = len(view.input_ids)
        input_ids[index, :length] = torch.tensor(view.input_ids, dtype=torch.int64)
        labels[index, :length] = torch.tensor(view.labels, dtype=torch.int64)
        if view.position_ids is not None:
            position_ids[:, index, :length] = view.position_ids
        for place in view.media:
            media_rows += [index * size + position for position in place.positions]
            first = first_token[index][place.medium]
            media_tokens += range(first, first + len(place.positions))
    return BatchView(
        input_ids=input_ids,
        labels=labels,
        lengths=torch.tensor([len(view.input_ids) for view in views]),
        prompt_lengths=torch.tensor([view.response_start for view in views]),
        position_ids=position_ids,
        media_rows=torch.tensor(media_rows, dtype=torch.int64),
        media_tokens=torch.tensor(media_tokens, dtype=torch.int64),
    )


def _make_batch(
    students: list[View],
    teachers: list[View],
    pad_token_id: int,
    pad_to_multiple_of: int,
    first_token: list[dict[int, int]],
    **rest,
) -> Batch:
    student = pad_views(students, pad_token_id, pad_to_multiple_of, first_token)
    if all(mine is other for mine, other in zip(students, teachers)):
        return Batch(student, student, **rest)
    teacher = pad_views(teachers, pad_token_id, pad_to_multiple_of, first_token)
    assert torch.equal(student.targets, teacher.targets), (
        "the views of student and teacher train different tokens"
    )
    return Batch(student, teacher, **rest)


def _filler(pad_token_id: int) -> View:
    return View([pad_token_id], [IGNORED_LABEL], 1)


def _collect_media(samples: Sequence[Sample | None]) -> tuple[Media | None, list[dict[int, int]]]:
    """All media, audios first, and for each sample: its medium -> the number of the medium's first
    token.
    """
    found = [
        (medium, row, index)
        for row, sample in enumerate(samples)
        for index, medium in enumerate(sample.media if sample is not None else ())
    ]
    found.sort(key=lambda item: item[0].kind != "audio")
    first_token: list[dict[int, int]] = [{} for _ in samples]
    total = 0
    for medium, row, index in found:
        first_token[row][index] = total
        total += medium.num_tokens
    audios = [(row, index) for medium, row, index in found if medium.kind == "audio"]
    row_lengths = [_longest_audio(samples[row], index) for row, index in audios]
    return Media.of([medium for medium, _, _ in found], row_lengths), first_token


def _longest_audio(sample: Sample, index: int) -> int:
    """Frames of the longest audio beside audio `index` of the sample: in the student's view where
    that shows it, else in the teacher's; its own where neither does.
    """
    own = sample.media[index].features.shape[1]
    for view in (sample.student, sample.teacher):
        shown = {place.medium for place in view.media}
        if index in shown:
            audios = [
                sample.media[number] for number in shown if sample.media[number].kind == "audio"
            ]
            return max(medium.features.shape[1] for medium in audios)
    return own


def collate(samples: Sequence[Sample | None], pad_token_id: int, pad_to_multiple_of: int) -> Batch:
    """Samples (None = filler row) -> Batch. The multiple is the tensor-parallel size under sequence
    parallelism.
    """
    filler = _filler(pad_token_id)
    media, first_token = _collect_media(samples)
    return _make_batch(
        [filler if sample is None else sample.student for sample in samples],
        [filler if sample is None else sample.teacher for sample in samples],
        pad_token_id,
        pad_to_multiple_of,
        first_token,
        has_teacher_view=any(sample is not None and sample.has_teacher_view for sample in samples),
        sources=["" if sample is None else sample.source for sample in samples],
        media_pairs=["" if sample is None else sample.media_pair for sample in samples],
        rows=[-1 if sample is None else sample.row for sample in samples],
        cut_tokens=sum(0 if sample is None else sample.cut_tokens for sample in samples),
        media=media,
    )


def with_responses(
    batch: Batch, responses: Sequence[Sequence[int]], pad_token_id: int, pad_to_multiple_of: int
) -> Batch:
    """The batch with new responses (CPU or GPU batch in, same device out): both views keep their
    prompts and media, every response token is trained.

    A response holds at least one id (the end-of-text token counts); a filler row's stays empty.
    Raises ValueError otherwise.
    """
    if len(responses) != len(batch.rows):
        raise ValueError(f"{len(responses)} responses for a batch of {len(batch.rows)} rows")
    for row, response in zip(batch.rows, responses):
        if (len(response) > 0) != (row >= 0):
            raise ValueError(
                f"row {row} got a response of {len(response)} tokens: data rows need at least one, filler rows (-1) "
                "none"
            )
    student = _respond(batch.student, responses, pad_token_id, pad_to_multiple_of)
    teacher = student
    if batch.teacher is not batch.student:
        teacher = _respond(batch.teacher, responses, pad_token_id, pad_to_multiple_of)
        assert torch.equal(student.targets, teacher.targets), (
            "the views of student and teacher train different tokens"
        )
    return replace(batch, student=student, teacher=teacher, on_policy=True, cut_tokens=0)


def _respond(
    view: BatchView, responses: Sequence[Sequence[int]], pad_token_id: int, pad_to_multiple_of: int
) -> BatchView:
    """The prompts of `view` with new responses, whose positions go on from the prompts' last ones."""
    views = []
    for index, (length, response) in enumerate(zip(view.prompt_lengths.tolist(), responses)):
        prompt = view.input_ids[index, :length].tolist()
        following = view.position_ids[:, index, length - 1 : length].cpu() + torch.arange(
            1, len(response) + 1
        )
        position_ids = torch.cat([view.position_ids[:, index, :length].cpu(), following], dim=1)
        labels = [IGNORED_LABEL] * length + list(response)
        views.append(View(prompt + list(response), labels, length, position_ids))
    written = pad_views(views, pad_token_id, pad_to_multiple_of, [{}] * len(views))
    old_size, new_size = view.input_ids.shape[1], written.input_ids.shape[1]
    rows = view.media_rows // old_size * new_size + view.media_rows % old_size
    return replace(written, media_rows=rows, media_tokens=view.media_tokens).to(
        view.input_ids.device
    )
