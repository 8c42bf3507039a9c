"""TMRoPE: the rotary positions (time, height, width) of one row of text and media, as transformers'
get_rope_index computes them.

Text and audio count up in all three planes. An image or a frame of a video has one time and the
rows and columns of its grid; what follows begins after the largest position so far. Imports no
megatron-core, since the data workers call it. S tokens of the row.

Two oddities of get_rope_index are kept, because the model is used with them: after a video with its
audio, positions continue from whichever of the two ended last, although the grid may have larger
ones; and in a row whose videos show their audio, a silent video may take the turn of a later
medium, which then counts as text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_gkd.json_fields import Form, check_fields, is_number, whole
from megatron_gkd.model.args import read_config

Grid = tuple[int, int, int]

_TOKEN_ID = whole(0, 2**31 - 1)
_FORMS = {f"{kind}_token_id": _TOKEN_ID for kind in ("audio", "image", "video")}
_FORMS |= {
    f"{kind}_{end}_token_id": _TOKEN_ID for kind in ("audio", "vision") for end in ("start", "end")
}
_FORMS |= {"position_id_per_seconds": Form("a number above 0", lambda v: is_number(v) and v > 0)}


@dataclass(frozen=True)
class MediaTokenIds:
    """Settings of the folder's config.json that place media in a row: their token ids, and the
    units of their positions.
    """

    audio_token_id: int
    image_token_id: int
    video_token_id: int
    audio_start_token_id: int
    audio_end_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    position_id_per_seconds: float
    """Time positions per second of video"""
    spatial_merge_size: int
    """Patches per side of a token"""

    @classmethod
    def read(cls, folder: str | Path) -> "MediaTokenIds":
        """From FOLDER/config.json. Raises FileNotFoundError, or ValueError naming the file and the
        setting, or the family that has no media.
        """
        config = read_config(folder)
        read_settings = config.family.media_settings
        if read_settings is None:
            raise ValueError(f"{config.path}: {config.family.title} has no audio, images or videos")
        stated = {name: of for name, of in config.settings.items() if of is not None}
        check_fields(config.path, stated, _FORMS)
        loaded = config.load()
        try:
            return cls(**read_settings(loaded))
        except ValueError as error:
            raise ValueError(f"{config.path}: {error}") from error


@dataclass(frozen=True)
class _Medium:
    """A medium of the row: `num_marks` start tokens, the first of them at index `first`, then its
    tokens, then as many end tokens.
    """

    kind: str
    """audio, image, video, or both: a video that shows its audio"""
    first: int
    num_audio_tokens: int = 0
    grid: Grid = (0, 0, 0)
    seconds_per_grid: float = 1.0

    @property
    def num_marks(self) -> int:
        return 2 if self.kind == "both" else 1

    def num_grid_tokens(self, ids: MediaTokenIds) -> int:
        time, height, width = self.grid
        return time * height * width // ids.spatial_merge_size**2


def rope_positions(
    input_ids: Sequence[int] | Tensor,
    ids: MediaTokenIds,
    *,
    audio_tokens: Sequence[int] = (),
    image_grids: Sequence[Grid] = (),
    video_grids: Sequence[Grid] = (),
    seconds_per_grid: Sequence[float] = (),
    use_audio_in_video: bool = False,
) -> Tensor:
    """The positions of a row, float32 [3, S].

    audio_tokens: number of tokens of each audio in the order of the row, the audio of videos
    included; image_grids and video_grids: patches in time, height and width; seconds_per_grid: of
    each video, seconds between two patches in time. use_audio_in_video: a video whose start token
    is followed by that of an audio shows both at once.

    Raises ValueError if the row's placeholders and the media differ in number, with both numbers.
    """
    tokens = torch.as_tensor(input_ids, dtype=torch.int64).cpu()
    found = _find_media(tokens, ids, use_audio_in_video)
    media = _describe(found, audio_tokens, image_grids, video_grids, seconds_per_grid)
    _check_tokens(tokens, ids, media)

    positions, done, start = [], 0, torch.zeros(())
    for medium in _counted(media, use_audio_in_video):
        num_text = medium.first - done
        positions += [_count(num_text, start), _count(medium.num_marks, start + num_text)]
        block, last = _block(medium, ids, start + num_text + medium.num_marks)
        end_marks = _count(medium.num_marks, last + 1)
        positions += [block, end_marks]
        start = end_marks.max() + 1
        done = medium.first + block.shape[1] + 2 * medium.num_marks
    positions.append(_count(len(tokens) - done, start))
    return torch.cat(positions, dim=1)


def _count(length: int, start: Tensor) -> Tensor:
    """float32 [3, length]: start, start + 1, ... in all planes."""
    return (torch.arange(length) + start).expand(3, -1)


def _find_media(
    tokens: Tensor, ids: MediaTokenIds, use_audio_in_video: bool
) -> list[tuple[str, int]]:
    """Kind and first start token of each medium, in order."""
    is_start = (tokens == ids.vision_start_token_id) | (tokens == ids.audio_start_token_id)
    kinds = {
        (ids.vision_start_token_id, ids.image_token_id): "image",
        (ids.vision_start_token_id, ids.video_token_id): "video",
        (ids.audio_start_token_id, ids.audio_token_id): "audio",
    }
    if use_audio_in_video:
        kinds[ids.vision_start_token_id, ids.audio_start_token_id] = "both"
    found: list[tuple[str, int]] = []
    for index in is_start[:-1].nonzero()[:, 0].tolist():
        kind = kinds.get(tuple(tokens[index : index + 2].tolist()))
        is_track = found and found[-1] == ("both", index - 1)  # the audio's start in a video
        if kind and not is_track:
            found.append((kind, index))
    return found


def _describe(
    found: list[tuple[str, int]],
    audio_tokens: Sequence[int],
    image_grids: Sequence[Grid],
    video_grids: Sequence[Grid],
    seconds_per_grid: Sequence[float],
) -> list[_Medium]:
    """The media with their sizes. Raises ValueError if the row has another number of them."""
    if len(seconds_per_grid) != len(video_grids):
        raise ValueError(f"{len(seconds_per_grid)} seconds_per_grid for {len(video_grids)} videos")
    for name, kinds, given in (
        ("audio", ("audio", "both"), audio_tokens),
        ("image", ("image",), image_grids),
        ("video", ("video", "both"), video_grids),
    ):
        expected = sum(kind in kinds for kind, _ in found)
        if expected != len(given):
            raise ValueError(
                f"the row has places for {expected} {name}s, {len(given)} {name}s belong to it"
            )
    audios, images = iter(audio_tokens), iter(image_grids)
    videos = zip(video_grids, seconds_per_grid)
    media = []
    for kind, first in found:
        num_audio_tokens, seconds = 0, 1.0
        grid: Grid = (0, 0, 0)
        if kind in ("audio", "both"):
            num_audio_tokens = int(next(audios))
        if kind == "image":
            grid = next(images)
        elif kind != "audio":
            grid, seconds = next(videos)
        time, height, width = map(int, grid)
        media.append(_Medium(kind, first, num_audio_tokens, (time, height, width), float(seconds)))
    return media


def _check_tokens(tokens: Tensor, ids: MediaTokenIds, media: list[_Medium]) -> None:
    """Raise ValueError unless each medium's placeholders follow its start tokens, and no others
    remain.
    """
    totals: dict[int, int] = {}
    for number, medium in enumerate(media):
        visual_id = ids.image_token_id if medium.kind == "image" else ids.video_token_id
        expected = {
            ids.audio_token_id: medium.num_audio_tokens,
            visual_id: medium.num_grid_tokens(ids),
        }
        begin = medium.first + medium.num_marks
        inside = tokens[begin : begin + sum(expected.values())]
        for token, size in expected.items():
            there = int((inside == token).sum())
            if there != size:
                raise ValueError(
                    f"medium {number + 1} of the row ({medium.kind}) makes {size} tokens of id "
                    f"{token}, {there} of them follow its start"
                )
            totals[token] = totals.get(token, 0) + size
    for token in (ids.audio_token_id, ids.image_token_id, ids.video_token_id):
        there = int((tokens == token).sum())
        if there != totals.get(token, 0):
            raise ValueError(
                f"the row has {there} tokens of id {token}, its media make {totals.get(token, 0)}"
            )


def _counted(media: list[_Medium], use_audio_in_video: bool) -> Iterator[_Medium]:
    """The media that transformers gives media positions to; the others count as text.

    Its loop takes as many turns as there are images, audios and, without use_audio_in_video,
    videos. It looks for images and videos while it expects one, and with use_audio_in_video it does
    not expect the silent ones.
    """
    num = {
        kind: sum(medium.kind == kind for medium in media)
        for kind in ("audio", "image", "video", "both")
    }
    turns = num["image"] + num["audio"] + (num["both"] if use_audio_in_video else num["video"])
    images, videos = num["image"], num["both"] if use_audio_in_video else num["video"]
    for medium in media:
        if turns <= 0:
            return
        expected = images > 0 or videos > 0 or medium.kind == "audio"
        turns -= expected or medium.kind == "both"  # its audio takes a turn in any case
        if expected:
            images -= medium.kind == "image"
            videos -= medium.kind in ("video", "both")
            yield medium


def _block(medium: _Medium, ids: MediaTokenIds, start: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [3, tokens of the medium], and the position after which the row continues."""
    audio = _count(medium.num_audio_tokens, start)
    if medium.kind == "audio":
        return audio, audio.max()
    time, height, width = medium.grid
    height, width = height // ids.spatial_merge_size, width // ids.spatial_merge_size
    seconds = torch.tensor(medium.seconds_per_grid)
    times = (torch.arange(time) * seconds * ids.position_id_per_seconds).float()
    rows, columns = torch.arange(height).float(), torch.arange(width).float()
    grid = torch.stack(torch.meshgrid(times, rows, columns, indexing="ij")).flatten(1) + start
    if medium.kind != "both":
        return grid, grid.max()
    both = torch.cat((grid, audio), dim=1)
    order = both[0].argsort(stable=True)  # by time, the video before its audio
    is_grid = order < grid.shape[1]
    others = (is_grid != is_grid[-1]).nonzero()[:, 0]
    both = both[:, order]
    return both, both[:, int(others[-1]) + 1 :].max()
