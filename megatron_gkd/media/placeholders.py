"""Media placeholders in token ids: where they stand, and one for each of a medium's tokens put in
the place of one.

A row may come with one placeholder for each medium, as a chat template writes it, or with as many
as the medium has tokens. A video that shows its audio is a video's placeholder in the first form;
in the second, tokens of both by time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_gkd.errors import RowError
from megatron_gkd.media.medium import KINDS, Size
from megatron_gkd.media.positions import MediaTokenIds

BOTH = "both"  # a video that shows its audio


class Placeholder(NamedTuple):
    """ids[start:stop] stand for one medium of `kind`: audio, image, video or BOTH."""

    kind: str
    start: int
    stop: int


class Filled(NamedTuple):
    """`origin[i]` is the index of `ids[i]` in the ids that were given."""

    ids: list[int]
    origin: list[int]


def find_placeholders(
    ids: Sequence[int], tokens: MediaTokenIds, use_audio_in_video: bool
) -> list[Placeholder]:
    """A run of one medium's token is one placeholder: template and processor put marks between two
    of them.
    """
    kinds = {
        tokens.audio_token_id: "audio",
        tokens.image_token_id: "image",
        tokens.video_token_id: "video",
    }
    found, index = [], 0
    while index < len(ids):
        start = index
        if use_audio_in_video and list(ids[index : index + 2]) == [
            tokens.vision_start_token_id,
            tokens.audio_start_token_id,
        ]:
            end = tokens.audio_end_token_id
            index = next((at for at in range(start + 2, len(ids)) if ids[at] == end), len(ids)) + 1
            found.append(Placeholder(BOTH, start + 1, min(index, len(ids))))
            continue
        kind = kinds.get(ids[index])
        index += 1
        if kind is not None:
            while index < len(ids) and ids[index] == ids[start]:
                index += 1
            found.append(
                Placeholder(BOTH if kind == "video" and use_audio_in_video else kind, start, index)
            )
    return found


def count(placeholders: Sequence[Placeholder]) -> dict[str, int]:
    """Media of each kind that the placeholders stand for; a video with its audio is one of each."""
    kinds = [placeholder.kind for placeholder in placeholders]
    both = kinds.count(BOTH)
    return {kind: kinds.count(kind) + (both if kind in ("audio", "video") else 0) for kind in KINDS}


def fill(
    ids: Sequence[int],
    placeholders: Sequence[Placeholder],
    sizes: dict[str, list[Size]],
    tokens: MediaTokenIds,
    *,
    as_given: bool,
) -> Filled:
    """`ids` with as many tokens in the place of each placeholder as its medium has. sizes: of each
    kind, in order.

    as_given: placeholders of more than one token must already be as long as their medium; otherwise
    they belong to another view and are replaced. Raises RowError with both numbers.
    """
    remaining = {kind: iter(sizes[kind]) for kind in KINDS}
    single = {
        "audio": tokens.audio_token_id,
        "image": tokens.image_token_id,
        "video": tokens.video_token_id,
    }
    filled, done = Filled([], []), 0
    for number, (kind, start, stop) in enumerate(placeholders, start=1):
        filled.ids.extend(ids[done:start])
        filled.origin.extend(range(done, start))
        if kind == BOTH:
            new = _interleaved(next(remaining["audio"]), next(remaining["video"]), tokens)
        else:
            new = [single[kind]] * next(remaining[kind]).num_tokens
        if as_given and stop - start not in (1, len(new)):
            raise RowError(
                f"placeholder {number} ({kind}) has {stop - start} tokens and its medium makes {len(new)}: write one, or all"
            )
        filled.ids.extend(new)
        filled.origin.extend([start] * len(new))
        done = stop
    filled.ids.extend(ids[done:])
    filled.origin.extend(range(done, len(ids)))
    return filled


def _interleaved(audio: Size, video: Size, tokens: MediaTokenIds) -> list[int]:
    """Tokens of a video and its audio by time, between the audio's marks; at equal times the
    picture comes first.
    """
    assert video.grid_thw is not None
    num_steps = video.grid_thw[0]
    times = (
        torch.arange(num_steps)
        * torch.tensor(video.seconds_per_grid)
        * tokens.position_id_per_seconds
    )
    times = torch.cat(
        (
            times.repeat_interleave(video.num_tokens // num_steps),
            torch.arange(audio.num_tokens).float(),
        )
    )
    is_video = times.argsort(stable=True) < video.num_tokens
    mixed = torch.where(is_video, tokens.video_token_id, tokens.audio_token_id).tolist()
    return [tokens.audio_start_token_id, *mixed, tokens.audio_end_token_id]


def positions_of(
    ids: Sequence[int], tokens: MediaTokenIds, num_tokens: dict[str, list[int]]
) -> dict[str, list[list[int]]]:
    """Of each kind: the positions of each medium's tokens in filled ids, in order."""
    ids_of = {
        "audio": tokens.audio_token_id,
        "image": tokens.image_token_id,
        "video": tokens.video_token_id,
    }
    found = {}
    for kind in KINDS:
        positions = (
            [index for index, token in enumerate(ids) if token == ids_of[kind]]
            if num_tokens[kind]
            else []
        )
        assert len(positions) == sum(num_tokens[kind]), (
            f"{len(positions)} {kind} tokens, {num_tokens[kind]} expected"
        )
        cuts = [0]
        for number in num_tokens[kind]:
            cuts.append(cuts[-1] + number)
        found[kind] = [positions[first:last] for first, last in zip(cuts, cuts[1:])]
    return found


def check_counts(placeholders: Sequence[Placeholder], media: dict[str, list], where: str) -> None:
    """Raise RowError with both numbers unless there are as many placeholders as media of each kind."""
    counts = count(placeholders)
    for kind in KINDS:
        if counts[kind] != len(media[kind]):
            raise RowError(
                f"{where} {_number(counts[kind], kind + ' placeholder')} for {_number(len(media[kind]), kind)}"
                + (_WAY_OUT if where.startswith("the teacher") else "")
            )


_WAY_OUT = (
    "; teacher_images, teacher_audios and teacher_videos are the teacher's own media ([] for none), without them it has "
    "the student's"
)


def _number(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
