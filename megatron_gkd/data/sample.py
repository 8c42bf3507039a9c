"""A checked row -> a `Sample`: what the student reads, what the teacher reads, and which tokens are
the response.

Both views end with the same response, copied id by id; they differ in what stands before it. A row
without a teacher view trains every assistant turn; with one, only the last response is trained, the
one that both views share.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.data.chat import ChatTokenizer
from megatron_gkd.data.rows import IGNORED_LABEL, Row, RowMedia
from megatron_gkd.errors import RowError
from megatron_gkd.media.medium import KINDS, Medium, Reference, Size
from megatron_gkd.media.placeholders import (
    BOTH,
    Placeholder,
    check_counts,
    fill,
    find_placeholders,
    positions_of,
)
from megatron_gkd.media.positions import MediaTokenIds, rope_positions
from megatron_gkd.media.processor import MediaProcessor


class MediumPlace(NamedTuple):
    """Where a view shows a medium."""

    medium: int
    """Its index in the sample's media."""
    positions: list[int]
    """Of its tokens in the view, in the order in which the tower gives their features."""


@dataclass(frozen=True)
class View:
    """`labels` are unshifted, -100 = not trained; `response_start` is the index of the (last)
    response's first token. `position_ids` [3, S] float32 are the rotary positions in time, height
    and width; None: 0, 1, 2, ... in all.
    """

    input_ids: list[int]
    labels: list[int]
    response_start: int
    position_ids: Tensor | None = None
    media: tuple[MediumPlace, ...] = ()

    def targets(self) -> list[int]:
        """The trained ids in order; the first token of a view has no place that predicts it."""
        return [label for label in self.labels[1:] if label != IGNORED_LABEL]


@dataclass(frozen=True)
class Sample:
    """`teacher` is `student` itself without a teacher view. `row` is the index in the data set,
    `cut_tokens` the trained tokens of the response that did not fit into max_length. `media`: each
    once, whichever view shows it.
    """

    student: View
    teacher: View
    has_teacher_view: bool
    source: str
    row: int
    cut_tokens: int
    media: tuple[Medium, ...] = ()

    @property
    def media_pair(self) -> str:
        """What student and teacher perceive, for metrics."""
        student, teacher = (
            [self.media[place.medium].kind for place in view.media]
            for view in (self.student, self.teacher)
        )
        return media_pair(student, teacher)


def media_pair(student: Iterable[str], teacher: Iterable[str]) -> str:
    """`audio > text`: the student hears, the teacher reads; each side's kinds of media in the order
    of their names.
    """
    return " > ".join("+".join(sorted(set(kinds))) or "text" for kinds in (student, teacher))


class Encoded(NamedTuple):
    """The compact form of a sample, as it is stored: the teacher's view is its prompt and the
    student's response.
    """

    input_ids: list[int]
    labels: list[int]
    response_start: int
    teacher_prompt: list[int] | None
    cut_tokens: int
    media: list[dict]
    """kind, path, data, is_track, num_tokens of each medium, not read"""
    student_media: list[int]
    """Indices in `media`, of each kind in the order of the placeholders"""
    teacher_media: list[int]
    use_audio_in_video: bool


class _Shown(NamedTuple):
    """A prompt in which every medium has all its tokens."""

    ids: list[int]
    origin: list[int]
    media: dict[str, list[Reference]]


def encode_row(
    row: Row,
    get_chat: Callable[[], ChatTokenizer],
    max_length: int,
    vocab_size: int,
    processor: MediaProcessor,
    *,
    read_media: bool = False,
) -> Encoded:
    """Tokenise a checked row and cut its response so that both views have at most `max_length`
    tokens.

    `get_chat` is called only if the row holds text, and of media only what tells their size is
    read, unless `read_media`. Raises RowError for ids of the tokenizer that the model does not
    have, media that cannot be used or do not match their placeholders, and for a prompt that leaves
    no room for a response.
    """
    if row.has_media:
        processor.check_has_towers()
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
    teacher_media = row.media if row.teacher_media is None else row.teacher_media
    if teacher_prompt is None and row.teacher_media is not None:
        teacher_prompt = input_ids[:start]
    if teacher_prompt is not None:
        labels[:start] = [IGNORED_LABEL] * start
    for ids in (input_ids, teacher_prompt or []):
        if max(ids, default=0) >= vocab_size:
            raise RowError(
                f"the tokenizer gives id {max(ids)}, out of the model's vocabulary [0, {vocab_size}): is it another "
                "model's tokenizer?"
            )

    sizes: dict[Reference, Size] = {}
    measure = _measuring(processor, sizes, read_media)
    student = _show(
        input_ids[:start], row.media, row, processor, measure, "the row has", as_given=True
    )
    input_ids, labels = (
        student.ids + input_ids[start:],
        [labels[index] for index in student.origin] + labels[start:],
    )
    start = len(student.ids)
    teacher = student
    if teacher_prompt is not None:
        as_given = not (
            row.teacher_messages is None and row.teacher_input_ids is None
        )  # else with the student's media
        teacher = _show(
            teacher_prompt,
            teacher_media,
            row,
            processor,
            measure,
            "the teacher's view has",
            as_given=as_given,
        )

    for name, num_prompt in (("prompt", start), ("teacher's prompt", len(teacher.ids))):
        if num_prompt >= max_length:
            raise RowError(
                f"the {name} has {num_prompt} tokens and leaves no room for a response in --max_length {max_length}"
            )
    end = start + max_length - max(start, len(teacher.ids))
    num_trained = _num_trained(labels)
    labels = labels[:end]
    while labels[-1] == IGNORED_LABEL:
        labels.pop()
    if teacher.ids == student.ids and teacher.media == student.media:
        teacher = student  # the teacher sees what the student sees
    indices = {reference: index for index, reference in enumerate(sizes)}
    return Encoded(
        input_ids[: len(labels)],
        labels,
        start,
        None if teacher is student else teacher.ids,
        num_trained - _num_trained(labels),
        [
            reference._asdict() | {"num_tokens": size.num_tokens}
            for reference, size in sizes.items()
        ],
        *(
            [indices[reference] for kind in KINDS for reference in view.media[kind]]
            for view in (student, teacher)
        ),
        row.use_audio_in_video,
    )


def _num_trained(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORED_LABEL)


def _measuring(
    processor: MediaProcessor, sizes: dict[Reference, Size], read_media: bool
) -> Callable[[Reference], Size]:
    """`processor.measure`, once for each medium, remembered in `sizes`."""

    def measure(reference: Reference) -> Size:
        if reference not in sizes:
            sizes[reference] = processor.measure(reference)
            if read_media:
                _check_size(processor.load(reference), sizes[reference].num_tokens, reference)
        return sizes[reference]

    return measure


def _check_size(medium: Medium, num_tokens: int, reference: Reference) -> None:
    if medium.num_tokens != num_tokens:
        raise RowError(
            f"{reference.name}: makes {medium.num_tokens} tokens where its header said {num_tokens}; is the file cut short?"
        )


def _show(
    prompt: list[int],
    media: RowMedia,
    row: Row,
    processor: MediaProcessor,
    measure: Callable[[Reference], Size],
    where: str,
    *,
    as_given: bool,
) -> _Shown:
    """Give every medium of a prompt all its tokens (`as_given`: see `fill`)."""
    if not any(media.values()) and not row.has_media:
        return _Shown(prompt, list(range(len(prompt))), media)
    tokens = processor.token_ids
    placeholders = find_placeholders(prompt, tokens, row.use_audio_in_video)
    media = _with_tracks(media, placeholders)
    check_counts(placeholders, media, where)
    sizes = {kind: [measure(reference) for reference in media[kind]] for kind in KINDS}
    filled = fill(prompt, placeholders, sizes, tokens, as_given=as_given)
    return _Shown(filled.ids, filled.origin, media)


def _with_tracks(media: RowMedia, placeholders: list[Placeholder]) -> RowMedia:
    """The media, with the videos' own audio in their places unless the row gives it among its
    audios.
    """
    kinds = [
        placeholder.kind
        for placeholder in placeholders
        if placeholder.kind in ("audio", "video", BOTH)
    ]
    if (
        BOTH not in kinds
        or len(media["audio"]) != kinds.count("audio")
        or len(media["video"]) != kinds.count(BOTH)
    ):
        return media
    audios, videos = iter(media["audio"]), iter(media["video"])
    tracks = [
        next(audios) if kind == "audio" else next(videos)._replace(kind="audio", is_track=True)
        for kind in kinds
    ]
    return media | {"audio": tracks}


def _teacher_prompt(row: Row, get_chat: Callable[[], ChatTokenizer]) -> list[int] | None:
    """The teacher's tokens before the response; None without a view of its own text."""
    if row.teacher_messages is None:
        return row.teacher_input_ids
    response = (
        row.messages[-1]["content"] if row.messages else "response"
    )  # only what stands before it is kept
    return get_chat().encode_prompt(
        row.teacher_messages[:-1] + [{"role": "assistant", "content": response}]
    )


def decode_sample(encoded: Encoded, source: str, row: int, processor: MediaProcessor) -> Sample:
    """The stored form -> a Sample, its media read. Both views train the same ids in the same order.

    Raises RowError for a medium that cannot be read.
    """
    media = []
    for stored in encoded.media:
        reference = Reference(*(stored[name] for name in Reference._fields))
        media.append(processor.load(reference))
        _check_size(media[-1], stored["num_tokens"], reference)

    def view(ids: list[int], labels: list[int], start: int, shown: list[int]) -> View:
        if not shown:
            return View(ids, labels, start)
        return _view_with_media(
            View(ids, labels, start), shown, media, encoded.use_audio_in_video, processor.token_ids
        )

    start = encoded.response_start
    student = view(encoded.input_ids, encoded.labels, start, encoded.student_media)
    teacher = student
    if encoded.teacher_prompt is not None:
        prompt = encoded.teacher_prompt
        labels = [IGNORED_LABEL] * len(prompt) + student.labels[start:]
        teacher = view(
            prompt + student.input_ids[start:], labels, len(prompt), encoded.teacher_media
        )
        assert teacher.targets() == student.targets(), (
            f"row {row}: the views of student and teacher train different tokens"
        )
    return Sample(
        student, teacher, teacher is not student, source, row, encoded.cut_tokens, tuple(media)
    )


def _view_with_media(
    view: View,
    shown: list[int],
    media: list[Medium],
    use_audio_in_video: bool,
    tokens: MediaTokenIds,
) -> View:
    """`view` with the places and rotary positions of the media that its prompt shows (indices in
    `media`).
    """
    prompt = view.input_ids[: view.response_start]
    of_kind = {kind: [index for index in shown if media[index].kind == kind] for kind in KINDS}
    positions = positions_of(
        prompt,
        tokens,
        {kind: [media[index].num_tokens for index in of_kind[kind]] for kind in KINDS},
    )
    places = [
        MediumPlace(index, found)
        for kind in KINDS
        for index, found in zip(of_kind[kind], positions[kind])
    ]
    videos = [media[index] for index in of_kind["video"]]
    rope = rope_positions(
        prompt,
        tokens,
        audio_tokens=[media[index].num_tokens for index in of_kind["audio"]],
        image_grids=[media[index].grid_thw for index in of_kind["image"]],
        video_grids=[video.grid_thw for video in videos],
        seconds_per_grid=[video.seconds_per_grid for video in videos],
        use_audio_in_video=use_audio_in_video,
    )
    following = rope[:, -1:] + torch.arange(1, len(view.input_ids) - len(prompt) + 1)
    return replace(view, position_ids=torch.cat([rope, following], dim=1), media=tuple(places))
