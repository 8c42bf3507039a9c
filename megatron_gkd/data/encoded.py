"""A checked row -> `Encoded`, its tokens as they are stored; and from there -> `Sample`, its media
read.
"""

import hashlib
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from megatron_gkd.data.chat import Chat, ChatTokenizer
from megatron_gkd.data.rows import Row, RowMedia
from megatron_gkd.data.sample import MediumPositions, Sample, View
from megatron_gkd.data.views import conversations_of, row_tokens
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
    teacher_labels: list[int] | None
    """Those of `teacher_prompt`; None if nothing in it is trained"""
    cut_tokens: int
    shortened_turns: int
    """Assistant turns that are not trained, since the chat template leaves out a part of them"""
    trimmed_turns: int
    """Of which it leaves out white space"""
    tags_as_text: int
    """Tags such as `<audio>` that are no placeholders"""
    media: list[dict]
    """Of each medium the fields of its `Reference`, num_tokens and `Size.note`"""
    student_media: list[int]
    """Indices in `media`: audios, images, videos, each kind in the order of its placeholders"""
    teacher_media: list[int]
    use_audio_in_video: bool

    def labels_of_teacher_prompt(self) -> list[int]:
        """`teacher_labels`, written out."""
        return self.teacher_labels or [IGNORED_LABEL] * len(self.teacher_prompt or [])

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
    labels: list[int]
    media: RowMedia


def encode_rows(
    rows: Sequence[Row],
    get_chat: Callable[[], ChatTokenizer],
    max_length: int,
    vocab_size: int,
    processor: MediaProcessor,
    *,
    read_media: bool = False,
) -> list[Encoded | RowError]:
    """Tokenise checked rows and cut their responses so that both views have at most `max_length`
    tokens.

    `get_chat` is called only if a row holds text. Media are read only as far as their number of
    tokens requires, unless `read_media`. A RowError stands for a row with ids of the tokenizer that
    the model does not have, media that cannot be used or do not match their placeholders, or a
    prompt that leaves no room for a response.
    """
    conversations = [each for row in rows for each in conversations_of(row)]
    chats = iter(get_chat().encode(conversations) if conversations else ())
    found: list[Encoded | RowError] = []
    for row in rows:
        of_row = [next(chats) for _ in conversations_of(row)]
        try:
            found.append(_encode(row, of_row, max_length, vocab_size, processor, read_media))
        except RowError as error:
            found.append(error)
    return found


def _encode(
    row: Row,
    chats: list[Chat | RowError],
    max_length: int,
    vocab_size: int,
    processor: MediaProcessor,
    read_media: bool,
) -> Encoded:
    if row.has_media:
        processor.check_has_towers()
    tokens = row_tokens(row, chats)
    (input_ids, labels, start), teacher_view = tokens.student, tokens.teacher
    for ids in (input_ids, teacher_view.ids if teacher_view else []):
        if max(ids, default=0) >= vocab_size:
            raise RowError(
                f"the tokenizer gives id {max(ids)}, out of the model's vocabulary "
                f"[0, {vocab_size}): is it another model's tokenizer?"
            )

    if row.messages is not None:  # ids are taken as they are given
        for token in processor.placeholder_ids.intersection(labels):
            raise RowError(
                f"the response holds token {token}, a placeholder of media: they stand before it"
            )

    sizes: dict[Reference, Size] = {}
    measure = _measuring(processor, sizes, max_length)
    student = _fill_prompt(
        input_ids[:start],
        labels[:start],
        row.media,
        row,
        processor,
        measure,
        "the row has",
        as_given=True,
    )
    input_ids, labels = student.ids + input_ids[start:], student.labels + labels[start:]
    start = len(student.ids)
    teacher = student
    if teacher_view is not None:
        teacher = _fill_prompt(
            teacher_view.ids,
            teacher_view.labels,
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
    if read_media:  # only now: a row that is too long is not decoded
        for reference, size in sizes.items():
            _check_size(processor.load(reference), size.num_tokens, reference)
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
        teacher_labels=teacher.labels
        if has_teacher_view and _num_trained(teacher.labels)
        else None,
        cut_tokens=num_trained - _num_trained(labels),
        shortened_turns=tokens.shortened_turns,
        trimmed_turns=tokens.trimmed_turns,
        tags_as_text=row.tags_as_text,
        media=[
            reference._asdict() | {"num_tokens": size.num_tokens, "note": size.note}
            for reference, size in sizes.items()
        ],
        student_media=[index_of[medium] for kind in KINDS for medium in student.media[kind]],
        teacher_media=[index_of[medium] for kind in KINDS for medium in teacher.media[kind]],
        use_audio_in_video=row.use_audio_in_video,
    )


def _num_trained(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORED_LABEL)


def _measuring(
    processor: MediaProcessor, sizes: dict[Reference, Size], max_length: int
) -> Callable[[Reference], Size]:
    """`processor.measure`, called once per medium; the results are kept in `sizes`. A medium that
    alone is too long is refused before its tokens are written out.
    """

    def measure(reference: Reference) -> Size:
        if reference not in sizes:
            sizes[reference] = processor.measure(reference)
            num_tokens = sizes[reference].num_tokens
            if num_tokens >= max_length:
                raise RowError(
                    f"{reference.name}: has {num_tokens} tokens and leaves no room for a response "
                    f"in --max_length {max_length}"
                )
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
    labels: list[int],
    media: RowMedia,
    row: Row,
    processor: MediaProcessor,
    measure: Callable[[Reference], Size],
    where: str,
    *,
    as_given: bool,
) -> _Prompt:
    """A prompt's ids and labels with all tokens of its media (`as_given`: see `fill`). where: how
    the message begins if placeholders and media differ in number.
    """
    is_bare = row.messages is None or processor.placeholder_ids.isdisjoint(ids)
    if is_bare and not row.has_media:
        return _Prompt(ids, labels, media)
    tokens = processor.token_ids
    placeholders = find_placeholders(ids, tokens, row.use_audio_in_video)
    media = _with_tracks(media, placeholders)
    check_counts(placeholders, media, where)
    sizes = {kind: [measure(reference) for reference in media[kind]] for kind in KINDS}
    filled = fill(ids, placeholders, sizes, tokens, as_given=as_given)
    return _Prompt(filled.ids, [labels[index] for index in filled.origin], media)


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
        labels = encoded.labels_of_teacher_prompt() + student.labels[start:]
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
    if media or not processor.placeholder_ids.isdisjoint(prompt):
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
