"""Media placeholders in token ids: finding them, and filling them, which replaces the one token of
a medium by as many as the medium has.

A row may come with one token per medium, as a chat template writes it, or already filled. A video
that shows its audio has a video's token in the first form; in the second, tokens of both ordered by
time.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from megatron_gkd.errors import RowError
from megatron_gkd.media.medium import KINDS, Size
from megatron_gkd.media.positions import MediaTokenIds

BOTH = "both"  # a video that shows its audio
_WAY_OUT = (
    "; teacher_images, teacher_audios and teacher_videos are the teacher's own media ([] for "
    "none), without them it has the student's"
)


class Placeholder(NamedTuple):
    """ids[start:stop] stand for one medium of `kind`: audio, image, video or BOTH."""

    kind: str
    start: int
    stop: int


class Filled(NamedTuple):
    """Ids with filled placeholders; `origin[i]` is the index of `ids[i]` in the ids before."""

    ids: list[int]
    origin: list[int]


def _token_of_kind(tokens: MediaTokenIds) -> dict[str, int]:
    return {
        "audio": tokens.audio_token_id,
        "image": tokens.image_token_id,
        "video": tokens.video_token_id,
    }


def find_placeholders(
    ids: Sequence[int], tokens: MediaTokenIds, use_audio_in_video: bool
) -> list[Placeholder]:
    """The placeholders in order. A run of equal media tokens is one placeholder: templates and
    processors write start and end tokens around each. Raises RowError where no start token stands
    before one.
    """
    kinds = {token: kind for kind, token in _token_of_kind(tokens).items()}
    found: list[Placeholder] = []
    index = 0
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
            modality = "audio" if kind == "audio" else "vision"
            begin = tokens.audio_start_token_id if kind == "audio" else tokens.vision_start_token_id
            if list(ids[start - 1 : start]) != [begin]:
                raise RowError(
                    f"token {start} of the prompt is a placeholder of {kind} without its start "
                    f"token ({begin}) before it: write <|{modality}_start|><|{kind}_pad|>"
                    f"<|{modality}_end|>"
                )
            while index < len(ids) and ids[index] == ids[start]:
                index += 1
            found.append(
                Placeholder(BOTH if kind == "video" and use_audio_in_video else kind, start, index)
            )
    return found


def count(placeholders: Sequence[Placeholder]) -> dict[str, int]:
    """Number of media of each kind that the placeholders stand for; a video with its audio is one
    of each.
    """
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
    """`ids` with as many tokens for each placeholder as its medium has. sizes: of the media of each
    kind, in order.

    as_given: a placeholder of more than one token must have exactly its medium's number of tokens,
    else RowError with both numbers. If not as_given, its tokens may be those of another medium, and
    are replaced.
    """
    remaining = {kind: iter(sizes[kind]) for kind in KINDS}
    token_of = _token_of_kind(tokens)
    filled, done = Filled([], []), 0
    for number, (kind, start, stop) in enumerate(placeholders, start=1):
        filled.ids.extend(ids[done:start])
        filled.origin.extend(range(done, start))
        if kind == BOTH:
            new = _interleaved(next(remaining["audio"]), next(remaining["video"]), tokens)
        else:
            new = [token_of[kind]] * next(remaining[kind]).num_tokens
        if as_given and stop - start not in (1, len(new)):
            raise RowError(
                f"placeholder {number} ({kind}) has {stop - start} tokens and its medium makes "
                f"{len(new)}: write one, or all"
            )
        filled.ids.extend(new)
        filled.origin.extend([start] * len(new))
        done = stop
    filled.ids.extend(ids[done:])
    filled.origin.extend(range(done, len(ids)))
    return filled


def _interleaved(audio: Size, video: Size, tokens: MediaTokenIds) -> list[int]:
    """Tokens of a video and its audio ordered by time, between the audio's start and end token; at
    equal times the video comes first.
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
    """Kind -> for each medium, in order, the positions of its tokens in filled ids. num_tokens: of
    each medium.
    """
    token_of = _token_of_kind(tokens)
    found = {}
    for kind in KINDS:
        positions = (
            [index for index, token in enumerate(ids) if token == token_of[kind]]
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


def check_counts(
    placeholders: Sequence[Placeholder], media: Mapping[str, Sequence[Any]], where: str
) -> None:
    """Raise RowError with both numbers unless each kind has as many placeholders as media."""
    counts = count(placeholders)
    for kind in KINDS:
        if counts[kind] != len(media[kind]):
            way_out = _WAY_OUT if where.startswith("the teacher") else ""
            if counts[kind] < len(media[kind]):
                way_out += f"; <{kind}> in a text is the place of one"
            elif not way_out:
                way_out = f"; they are given in the parts, or in column `{kind}s`"
            raise RowError(
                f"{where} {_number(counts[kind], kind + ' placeholder')} "
                f"for {_number(len(media[kind]), kind)}{way_out}"
            )


def _number(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
