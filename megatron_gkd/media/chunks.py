"""A batch's media -> the pieces that a tower encodes apart from each other, and each
tensor-parallel rank's share.

An audio falls into windows, a video into frames: the towers' attention crosses neither.

Deviation: an audio of less than a chunk (a second) gets slightly different features in transformers
depending on what else is in the call, because its convolutions pad every chunk to the longest one.
Here that is the longest of the audio's own row, as when transformers reads the row alone, so that
neither batch nor layout matters.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_gkd.media.medium import Media

DOWNSAMPLING = 8  # of the audio tower's three convolutions
TOKENS_PER_CHUNK = 13  # transformers counts them so, whatever the chunk's frames


@dataclass(frozen=True)
class Piece:
    """What a tower encodes by itself: up to a window of an audio, an image, a frame of a video.

    Columns `start:stop` of Media.audio or rows of Media.pixels, and `num_tokens` tokens from
    `first_token` on.
    """

    is_audio: bool
    start: int
    stop: int
    first_token: int
    num_tokens: int
    width: int = 0
    """audio: frames to which its chunks are padded"""
    height_width: tuple[int, int] = (0, 0)
    """image, video: patches of the frame"""


def by_width(pieces: list[Piece]) -> list[list[Piece]]:
    """Groups of pieces of one width: those that go through the audio tower together."""
    widths = sorted({piece.width for piece in pieces})
    return [[piece for piece in pieces if piece.width == width] for width in widths]


def encoding_order(pieces: list[Piece]) -> list[Piece]:
    """The pieces in the order in which a tower gives their features."""
    return [piece for group in by_width(pieces) for piece in group]


def deal(pieces: Sequence[Piece], work: Sequence[int], ranks: int) -> list[list[Piece]]:
    """Pieces -> one share a rank, of about equal work: the largest first, each to the rank that has
    least.
    """
    taken = [0] * ranks
    owner = {}
    for index in sorted(range(len(pieces)), key=lambda index: -work[index]):
        owner[index] = taken.index(min(taken))
        taken[owner[index]] += work[index]
    return [
        [piece for index, piece in enumerate(pieces) if owner[index] == rank]
        for rank in range(ranks)
    ]


def audio_pieces(media: Media, config) -> Iterator[Piece]:
    """Windows of `n_window_infer` frames: the audio tower's attention does not cross them."""
    chunk = 2 * config.n_window
    window = config.n_window_infer // chunk * chunk
    widths = media.audio_row_lengths.clamp(max=chunk).tolist()
    start = first_token = 0
    lengths, num_tokens = media.audio_lengths.tolist(), media.audio_tokens.tolist()
    for number, (length, expected, width) in enumerate(zip(lengths, num_tokens, widths)):
        made = 0
        for offset in range(0, length, window):
            frames = min(window, length - offset)
            tokens = frames // chunk * TOKENS_PER_CHUNK + math.ceil(frames % chunk / DOWNSAMPLING)
            yield Piece(
                True,
                start + offset,
                start + offset + frames,
                first_token + made,
                tokens,
                width=width,
            )
            made += tokens
        if made != expected:
            raise ValueError(
                f"audio {number} of the batch: {length} frames make {made} tokens, its row has {expected}"
            )
        start += length
        first_token += made


def visual_pieces(media: Media, merge_size: int) -> Iterator[Piece]:
    """Frames: the vision tower's attention does not cross them."""
    start, first_token = 0, int(media.audio_tokens.sum())
    grids, num_tokens = media.grid_thw.tolist(), media.visual_tokens.tolist()
    for number, ((time, height, width), expected) in enumerate(zip(grids, num_tokens)):
        patches, tokens = height * width, height * width // merge_size**2
        if time * tokens != expected:
            raise ValueError(
                f"image or video {number} of the batch: {time} x {height} x {width} patches make {time * tokens} "
                f"tokens, its row has {expected}"
            )
        for _ in range(time):
            yield Piece(
                False, start, start + patches, first_token, tokens, height_width=(height, width)
            )
            start += patches
            first_token += tokens
