"""A checked row -> `Encoded`, its tokens as they are stored; and from there -> `Sample`, its media
read.

Without a teacher view every assistant turn of a row is trained; with one only the last response,
which both views share. Of a prompt alone nothing is trained: its response is written in the run.
"""

import hashlib
import os
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from megatron_gkd.data.chat import ChatTokenizer
from megatron_gkd.data.rows import Row, RowMedia
from megatron_gkd.data.sample import MediumPositions, Sample, View
from megatron_gkd.errors import RowError
from megatron_gkd.loss.rows import IGNORED_LABEL
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


class Encoded(NamedTuple):
    """A sample as it is stored: media are references, and of the teacher's view only the prompt is
    kept (its response is the student's). A prompt alone ends at `response_start`.
    """

    input_ids: list[int]
    labels: list[int]
    response_start: int
    teacher_prompt: list[int] | None
    cut_tokens: int
    media: list[dict]
    """Of each medium the fields of its `Reference`, and num_tokens"""
    student_media: list[int]
    """Indices in `media`: audios, images, videos, each kind in the order of its placeholders"""
    teacher_media: list[int]
    use_audio_in_video: bool

    def references(self) -> list[Reference]:
        """`media` as the row gave them."""
        return [Reference(*(stored[name] for name in Reference._fields)) for stored in self.media]

    def digest(self) -> bytes:
        """16 bytes that stand for the sample, wherever its media lie: of a path the name counts."""
        found = hashlib.blake2b(digest_size=16)
        media = [
            stored | {"path": stored["path"] and os.path.basename(stored["path"])}
            for stored in self.media
        ]
        for name, value in self._replace(media=media)._asdict().items():
            is_ids = isinstance(value, list) and value and isinstance(value[0], int)
            stands_for = array("q", value).tobytes() if is_ids else repr(value).encode()
            found.update(f"{name} {len(stands_for)} ".encode() + stands_for)
        return found.digest()


class _Prompt(NamedTuple):
    """A prompt with all tokens of each of its media."""

    ids: list[int]
    origin: list[int]
    """Index of each id in the prompt that was given"""
    media: RowMedia


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

    `get_chat` is called only if the row holds text. Media are read only as far as their number of
    tokens requires, unless `read_media`. Raises RowError for ids of the tokenizer that the model
    does not have, media that cannot be used or do not match their placeholders, and for a prompt
    that leaves no room for a response.
    """
    if row.has_media:
        processor.check_has_towers()
    input_ids, labels, start = _student_tokens(row, get_chat)
    teacher_ids = _teacher_prompt(row, get_chat)
    if teacher_ids is None and row.teacher_media is not None:
        teacher_ids = input_ids[:start]
    if teacher_ids is not None:
        labels[:start] = [IGNORED_LABEL] * start
    for ids in (input_ids, teacher_ids or []):
        if max(ids, default=0) >= vocab_size:
            raise RowError(
                f"the tokenizer gives id {max(ids)}, out of the model's vocabulary "
                f"[0, {vocab_size}): is it another model's tokenizer?"
            )

    sizes: dict[Reference, Size] = {}
    measure = _measuring(processor, sizes, read_media)
    student = _fill_prompt(
        input_ids[:start], row.media, row, processor, measure, "the row has", as_given=True
    )
    input_ids = student.ids + input_ids[start:]
    labels = [labels[index] for index in student.origin] + labels[start:]
    start = len(student.ids)
    teacher = student
    if teacher_ids is not None:
        teacher = _fill_prompt(
            teacher_ids,
            row.media if row.teacher_media is None else row.teacher_media,
            row,
            processor,
            measure,
            "the teacher's view has",
            # otherwise the ids are the student's, perhaps with the tokens of the student's media
            as_given=row.teacher_messages is not None or row.teacher_input_ids is not None,
        )

    for name, num_prompt in (("prompt", start), ("teacher's prompt", len(teacher.ids))):
        if num_prompt >= max_length:
            raise RowError(
                f"the {name} has {num_prompt} tokens and leaves no room for a response in "
                f"--max_length {max_length}"
            )
    end = start + max_length - max(start, len(teacher.ids))
    num_trained = _num_trained(labels)
    labels = labels[:end]
    while row.has_response and labels[-1] == IGNORED_LABEL:
        labels.pop()
    has_teacher_view = teacher.ids != student.ids or teacher.media != student.media
    index_of = {reference: index for index, reference in enumerate(sizes)}
    return Encoded(
        input_ids=input_ids[: len(labels)],
        labels=labels,
        response_start=start,
        teacher_prompt=teacher.ids if has_teacher_view else None,
        cut_tokens=num_trained - _num_trained(labels),
        media=[
            reference._asdict() | {"num_tokens": size.num_tokens}
            for reference, size in sizes.items()
        ],
        student_media=[index_of[medium] for kind in KINDS for medium in student.media[kind]],
        teacher_media=[index_of[medium] for kind in KINDS for medium in teacher.media[kind]],
        use_audio_in_video=row.use_audio_in_video,
    )


def _student_tokens(
    row: Row, get_chat: Callable[[], ChatTokenizer]
) -> tuple[list[int], list[int], int]:
    """(input ids, labels, index of the (last) response's first token)."""
    if not row.has_response:
        prompt = row.input_ids or get_chat().encode_request(row.messages or [], row.options)
        if not prompt:
            raise RowError("empty prompt: the chat template and the tokenizer make no token of it")
        return prompt, [IGNORED_LABEL] * len(prompt), len(prompt)
    if row.messages is None:
        assert row.input_ids is not None and row.labels is not None
        start = next(index for index, label in enumerate(row.labels) if label != IGNORED_LABEL)
        return row.input_ids, list(row.labels), start
    input_ids, spans = get_chat().encode(row.messages, row.options)
    labels = [IGNORED_LABEL] * len(input_ids)
    turns = [index for index, turn in enumerate(row.messages) if turn["role"] == "assistant"]
    for index, (begin, end) in zip(turns, spans):
        if index not in row.untrained:
            labels[begin:end] = input_ids[begin:end]
    start = spans[-1][0]
    if start == 0:
        raise RowError("empty prompt: the chat template and the tokenizer make no token of it")
    return input_ids, labels, start


def _teacher_prompt(row: Row, get_chat: Callable[[], ChatTokenizer]) -> list[int] | None:
    """The teacher's tokens before the response; None if they are the student's."""
    if row.teacher_messages is None:
        return row.teacher_input_ids
    if not row.has_response:
        return get_chat().encode_request(row.teacher_messages, row.teacher_options)
    # Any response will do, only what comes before it is kept.
    response = row.messages[-1] if row.messages else {"role": "assistant", "content": "response"}
    return get_chat().encode_prompt([*row.teacher_messages[:-1], response], row.teacher_options)


def _num_trained(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORED_LABEL)


def _measuring(
    processor: MediaProcessor, sizes: dict[Reference, Size], read_media: bool
) -> Callable[[Reference], Size]:
    """`processor.measure`, called once per medium; the results are kept in `sizes`."""

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
            f"{reference.name}: makes {medium.num_tokens} tokens where its header said "
            f"{num_tokens}; is the file cut short?"
        )


def _fill_prompt(
    ids: list[int],
    media: RowMedia,
    row: Row,
    processor: MediaProcessor,
    measure: Callable[[Reference], Size],
    where: str,
    *,
    as_given: bool,
) -> _Prompt:
    """A prompt's ids with all tokens of its media (`as_given`: see `fill`). where: how the message
    begins if placeholders and media differ in number.
    """
    if not row.has_media:
        return _Prompt(ids, list(range(len(ids))), media)
    tokens = processor.token_ids
    placeholders = find_placeholders(ids, tokens, row.use_audio_in_video)
    media = _with_tracks(media, placeholders)
    check_counts(placeholders, media, where)
    sizes = {kind: [measure(reference) for reference in media[kind]] for kind in KINDS}
    filled = fill(ids, placeholders, sizes, tokens, as_given=as_given)
    return _Prompt(filled.ids, filled.origin, media)


def _with_tracks(media: RowMedia, placeholders: list[Placeholder]) -> RowMedia:
    """The media; if videos show their audio and `media` does not have it, each video's own track is
    put among the audios, in the order of the placeholders.
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


def decode_sample(encoded: Encoded, source: str, row: int, processor: MediaProcessor) -> Sample:
    """The stored form -> a Sample, its media read. Both views train the same ids in the same order.

    Raises RowError for a medium that cannot be read.
    """
    media = []
    for stored, reference in zip(encoded.media, encoded.references()):
        media.append(processor.load(reference))
        _check_size(media[-1], stored["num_tokens"], reference)

    def view(ids: list[int], labels: list[int], start: int, indices: list[int]) -> View:
        text = View(ids, labels, start)
        if not indices:
            return text
        return _view_with_media(
            text, indices, media, encoded.use_audio_in_video, processor.token_ids
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
    return Sample(student, teacher, source, row, encoded.cut_tokens, tuple(media))


def _view_with_media(
    view: View,
    indices: list[int],
    media: list[Medium],
    use_audio_in_video: bool,
    tokens: MediaTokenIds,
) -> View:
    """`view` with token positions and rotary positions of the media in its prompt, those of `media`
    at `indices`.
    """
    prompt = view.input_ids[: view.response_start]
    of_kind = {kind: [index for index in indices if media[index].kind == kind] for kind in KINDS}
    num_tokens = {kind: [media[index].num_tokens for index in of_kind[kind]] for kind in KINDS}
    grids = {
        kind: [grid for index in of_kind[kind] if (grid := media[index].grid_thw) is not None]
        for kind in KINDS
    }
    positions = positions_of(prompt, tokens, num_tokens)
    rope = rope_positions(
        prompt,
        tokens,
        audio_tokens=num_tokens["audio"],
        image_grids=grids["image"],
        video_grids=grids["video"],
        seconds_per_grid=[media[index].seconds_per_grid for index in of_kind["video"]],
        use_audio_in_video=use_audio_in_video,
    )
    following = rope[:, -1:] + torch.arange(1, len(view.input_ids) - len(prompt) + 1)
    return replace(
        view,
        position_ids=torch.cat([rope, following], dim=1),
        media=tuple(
            MediumPositions(index, found)
            for kind in KINDS
            for index, found in zip(of_kind[kind], positions[kind])
        ),
    )


def written_teacher_view(
    prompt: list[int], encoded: Encoded, sample: Sample, max_length: int, processor: MediaProcessor
) -> View:
    """The view of a teacher that reads `prompt`, one placeholder token a medium, before the
    response of `sample`, which was written to the row `encoded`. Raises RowError where the prompt
    has `max_length` tokens or more, or other placeholders than there are media for the teacher.
    """
    media = list(sample.media)
    if media:
        tokens = processor.token_ids
        placeholders = find_placeholders(prompt, tokens, encoded.use_audio_in_video)
        sizes: dict[str, list[Size]] = {kind: [] for kind in KINDS}
        for index in encoded.teacher_media:
            medium = media[index]
            size = Size(medium.num_tokens, medium.grid_thw, medium.seconds_per_grid)
            sizes[medium.kind].append(size)
        check_counts(placeholders, sizes, "the teacher's view has")
        prompt = fill(prompt, placeholders, sizes, tokens, as_given=True).ids
    if len(prompt) >= max_length:
        raise RowError(
            f"the teacher's prompt has {len(prompt)} tokens of --max_length {max_length}"
        )
    response = sample.student.input_ids[sample.student.response_start :]
    view = View(prompt + response, [IGNORED_LABEL] * len(prompt) + response, len(prompt))
    if not encoded.teacher_media:
        return view
    return _view_with_media(
        view, encoded.teacher_media, media, encoded.use_audio_in_video, processor.token_ids
    )
