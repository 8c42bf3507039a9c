"""A batch's media -> chunks that a tower encodes independently of each other, and the share of each
tensor-parallel rank.

A chunk is a window of an audio, an image or a frame of a video: the towers' attention crosses
neither windows nor frames. The audio tower's convolutions look at even less, blocks of 2 n_window
frames.

Deviation: transformers gives an audio that is shorter than a block (a second) slightly different
features depending on what else is in the call, because it pads every block to the longest one. Here
that is the longest of the audio's own row, as if transformers read the row alone, so that neither
batch nor parallel layout matters.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_gkd.media.medium import Media

DOWNSAMPLING = 8  # of the audio tower's three convolutions
TOKENS_PER_BLOCK = 13  # of a whole block (in transformers: chunk), a constant there


@dataclass(frozen=True)
class Chunk:
    """Columns `start:stop` of Media.audio or rows `start:stop` of Media.pixels. The tower makes
    `num_tokens` tokens of them, in the batch's numbering of tokens from `first_token` on.
    """

    is_audio: bool
    start: int
    stop: int
    first_token: int
    num_tokens: int
    block_length: int = 0
    """audio: frames to which its blocks are padded"""
    height_width: tuple[int, int] = (0, 0)
    """image, video: patches of the frame"""


def by_block_length(chunks: list[Chunk]) -> list[list[Chunk]]:
    """Groups of chunks that can go through the audio tower together."""
    lengths = sorted({chunk.block_length for chunk in chunks})
    return [[chunk for chunk in chunks if chunk.block_length == length] for length in lengths]


def encoding_order(chunks: list[Chunk]) -> list[Chunk]:
    """The chunks in the order in which a tower gives their features."""
    return [chunk for group in by_block_length(chunks) for chunk in group]


def balance(chunks: Sequence[Chunk], work: Sequence[int], num_ranks: int) -> list[list[Chunk]]:
    """Chunks -> one share per rank, of about equal work: the largest chunk first, each to the rank
    with the least work.
    """
    assigned = [0] * num_ranks
    owner = {}
    for index in sorted(range(len(chunks)), key=lambda index: -work[index]):
        owner[index] = assigned.index(min(assigned))
        assigned[owner[index]] += work[index]
    return [
        [chunk for index, chunk in enumerate(chunks) if owner[index] == rank]
        for rank in range(num_ranks)
    ]


def audio_chunks(media: Media, n_window: int, n_window_infer: int) -> Iterator[Chunk]:
    """Windows of `n_window_infer` frames. Both numbers are settings of the audio tower. Raises
    ValueError if an audio's frames do not make as many tokens as its row has.
    """
    block = 2 * n_window
    window = n_window_infer // block * block
    block_lengths = media.audio_row_lengths.clamp(max=block).tolist()
    start = first_token = 0
    lengths, num_tokens = media.audio_lengths.tolist(), media.audio_tokens.tolist()
    for number, (length, expected, block_length) in enumerate(
        zip(lengths, num_tokens, block_lengths)
    ):
        made = 0
        for offset in range(0, length, window):
            frames = min(window, length - offset)
            tokens = frames // block * TOKENS_PER_BLOCK + math.ceil(frames % block / DOWNSAMPLING)
            yield Chunk(
                is_audio=True,
                start=start + offset,
                stop=start + offset + frames,
                first_token=first_token + made,
                num_tokens=tokens,
                block_length=block_length,
            )
            made += tokens
        if made != expected:
            raise ValueError(
                f"audio {number} of the batch: {length} frames make {made} tokens, "
                f"its row has {expected}"
            )
        start += length
        first_token += made


def visual_chunks(media: Media, merge_size: int) -> Iterator[Chunk]:
    """Images and frames of videos. merge_size: patches per side of a token. Raises ValueError if a
    medium's patches do not make as many tokens as its row has.
    """
    start, first_token = 0, int(media.audio_tokens.sum())
    grids, num_tokens = media.grid_thw.tolist(), media.visual_tokens.tolist()
    for number, ((time, height, width), expected) in enumerate(zip(grids, num_tokens)):
        patches, tokens = height * width, height * width // merge_size**2
        if time * tokens != expected:
            raise ValueError(
                f"image or video {number} of the batch: {time} x {height} x {width} patches make "
                f"{time * tokens} tokens, its row has {expected}"
            )
        for _ in range(time):
            yield Chunk(
                is_audio=False,
                start=start,
                stop=start + patches,
                first_token=first_token,
                num_tokens=tokens,
                height_width=(height, width),
            )
            start += patches
            first_token += tokens
