"""Samples -> padded tensors. Shapes: B rows, S positions (padded), N response rows (positions that
predict a trained token), M media tokens (positions whose embedding comes from a tower).

A padding sample fills up a batch: one pad token, nothing trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_gkd.data.sample import Sample, View
from megatron_gkd.loss.rows import IGNORED_LABEL
from megatron_gkd.media.medium import Media


@dataclass
class BatchView:
    """What student or teacher reads. All int64 except the position ids; padded on the right."""

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
    """[M]: the number of each among the tokens of the batch's `Media`"""

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
    """One micro-batch of one data-parallel rank. If no row has a teacher view, `teacher` is the
    same object as `student`.
    """

    student: BatchView
    teacher: BatchView
    has_teacher_view: bool
    on_policy: bool = False
    sources: list[str] = field(default_factory=list)
    """Of each row; "" for a padding sample"""
    media_pairs: list[str] = field(default_factory=list)
    """`Sample.media_pair` of each row; "" for a padding sample"""
    rows: list[int] = field(default_factory=list)
    """Index of each row in the data set; -1 for a padding sample"""
    cut_tokens: int = 0
    """Trained tokens that did not fit into max_length, of all rows"""
    media: Media | None = None
    """Those of all rows and both views; None if there are none"""
    log_probabilities: Tensor | None = None
    """fp32 [N], in nats: of the responses' tokens as the rollout drew them from the student; None
    where it did not
    """

    def to(self, device: str | torch.device) -> "Batch":
        """The batch with its tensors on `device`."""
        student = self.student.to(device)
        return replace(
            self,
            student=student,
            teacher=student if self.teacher is self.student else self.teacher.to(device),
            media=None if self.media is None else self.media.to(device),
            log_probabilities=(
                None if self.log_probabilities is None else self.log_probabilities.to(device)
            ),
        )


def pad_views(
    views: Sequence[View],
    pad_token_id: int,
    pad_to_multiple_of: int,
    first_token: Sequence[dict[int, int]],
) -> BatchView:
    """Pad on the right to the longest view, rounded up to a multiple of `pad_to_multiple_of`
    positions.

    first_token: for each view, index of a medium in its sample -> number of the medium's first
    token among the tokens of the batch's `Media`.
    """
    longest = max(len(view.input_ids) for view in views)
    size = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(views), size), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(views), size), IGNORED_LABEL, dtype=torch.int64)
    position_ids = torch.arange(size, dtype=torch.float32).repeat(3, len(views), 1)
    media_rows: list[int] = []
    media_tokens: list[int] = []
    for index, view in enumerate(views):
        length = len(view.input_ids)
        input_ids[index, :length] = torch.tensor(view.input_ids, dtype=torch.int64)
        labels[index, :length] = torch.tensor(view.labels, dtype=torch.int64)
        if view.position_ids is not None:
            position_ids[:, index, :length] = view.position_ids
        for medium, positions in view.media:
            media_rows += [index * size + position for position in positions]
            first = first_token[index][medium]
            media_tokens += range(first, first + len(positions))
    return BatchView(
        input_ids=input_ids,
        labels=labels,
        lengths=torch.tensor([len(view.input_ids) for view in views]),
        prompt_lengths=torch.tensor([view.response_start for view in views]),
        position_ids=position_ids,
        media_rows=torch.tensor(media_rows, dtype=torch.int64),
        media_tokens=torch.tensor(media_tokens, dtype=torch.int64),
    )


def collate(samples: Sequence[Sample | None], pad_token_id: int, pad_to_multiple_of: int) -> Batch:
    """Samples (None = padding sample) -> Batch. Lengths are padded to a multiple that tensor
    parallelism needs to shard the sequence.
    """
    padding_view = View([pad_token_id], [IGNORED_LABEL], 1)
    students = [padding_view if sample is None else sample.student for sample in samples]
    teachers = [padding_view if sample is None else sample.teacher for sample in samples]
    media, first_token = _collect_media(samples)
    student = teacher = pad_views(students, pad_token_id, pad_to_multiple_of, first_token)
    if any(view is not other for view, other in zip(students, teachers)):
        teacher = pad_views(teachers, pad_token_id, pad_to_multiple_of, first_token)
    _check_same_targets(student, teacher)
    return Batch(
        student,
        teacher,
        has_teacher_view=any(sample is not None and sample.has_teacher_view for sample in samples),
        sources=["" if sample is None else sample.source for sample in samples],
        media_pairs=["" if sample is None else sample.media_pair for sample in samples],
        rows=[-1 if sample is None else sample.row for sample in samples],
        cut_tokens=sum(0 if sample is None else sample.cut_tokens for sample in samples),
        media=media,
    )


def _check_same_targets(student: BatchView, teacher: BatchView) -> None:
    assert teacher is student or torch.equal(student.targets, teacher.targets), (
        "the views of student and teacher train different tokens"
    )


def _collect_media(samples: Sequence[Sample | None]) -> tuple[Media | None, list[dict[int, int]]]:
    """All media, audios first; and for each sample, index of a medium in it -> number of the
    medium's first token.
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
    row_lengths = [
        length for sample in samples if sample is not None for length in _audio_row_lengths(sample)
    ]
    return Media.of([medium for medium, _, _ in found], row_lengths), first_token


def _audio_row_lengths(sample: Sample) -> list[int]:
    """For each audio of the sample: frames of the longest audio in the student's view if that shows
    it, else in the teacher's; its own if neither does.
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
    return list(longest.values())


def with_responses(
    batch: Batch, responses: Sequence[Sequence[int]], pad_token_id: int, pad_to_multiple_of: int
) -> Batch:
    """The batch, on its device, with new responses: both views keep their prompts and media, every
    response token is trained.

    A response has at least one id (the end-of-text token counts), that of a padding sample none.
    Raises ValueError otherwise.
    """
    if len(responses) != len(batch.rows):
        raise ValueError(f"{len(responses)} responses for a batch of {len(batch.rows)} rows")
    for row, response in zip(batch.rows, responses):
        if (len(response) > 0) != (row >= 0):
            raise ValueError(
                f"row {row} got a response of {len(response)} tokens: data rows need at least "
                "one, padding samples (-1) none"
            )
    student = teacher = _respond(batch.student, responses, pad_token_id, pad_to_multiple_of)
    if batch.teacher is not batch.student:
        teacher = _respond(batch.teacher, responses, pad_token_id, pad_to_multiple_of)
    _check_same_targets(student, teacher)
    return replace(
        batch,
        student=student,
        teacher=teacher,
        on_policy=True,
        cut_tokens=0,
        log_probabilities=None,
    )


def _respond(
    view: BatchView, responses: Sequence[Sequence[int]], pad_token_id: int, pad_to_multiple_of: int
) -> BatchView:
    """The prompts of `view` with new responses; their positions continue those of the prompts."""
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
