"""A sound file: its length, its samples.

libsndfile reads it, or FFmpeg a video's track and formats that libsndfile does not know, such as
m4a, aac, wma, webm. Headers are anyone's: what is decoded grows block by block, up to a limit, and
no memory is taken for what a header claims.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import numpy as np

from megatron_gkd.errors import RowError, first_line, shortened
from megatron_gkd.media.medium import MAX_PATH, Reference
from megatron_gkd.media.video_file import sound_blocks

LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000  # Hz
_INEXACT_HEADERS = ("MP3", "OGG")  # formats whose headers give the length only roughly
_UNKNOWN_LENGTH = 2**63 - 1  # libsndfile's, of a flac that was written to a pipe
_BLOCK = 1 << 18  # samples of all channels
_BYTES = 4  # of a sample, float32


def sound_length(reference: Reference, rate: int, max_bytes: int) -> int:
    """Number of samples at `rate`: from the header, or counted while they are decoded where it
    tells only roughly. Raises RowError for a file that cannot be read or has more than `max_bytes`,
    decoded or at `rate`, or a sampling rate out of range.
    """
    info = _exact_header(reference)
    if info is not None:
        _check(reference, info.frames, info.channels, info.samplerate, rate, max_bytes)
        return resampled_length(info.frames, info.samplerate, rate)
    length, own_rate = 0, rate
    for block, block_rate in _blocks(reference, rate, max_bytes):
        length, own_rate = length + len(block), block_rate
    return resampled_length(length, own_rate, rate)


def read_sound(reference: Reference, rate: int, max_bytes: int) -> tuple[np.ndarray, int]:
    """(float32 [samples], the mean of all channels; their rate in Hz). Raises the errors of
    `sound_length`, and RowError for samples that are no finite numbers.
    """
    parts, own_rate = [np.zeros(0, np.float32)], rate
    for block, block_rate in _blocks(reference, rate, max_bytes):
        own_rate = block_rate
        if not np.isfinite(block).all():
            raise RowError(f"{reference.name}: a sample is not a finite number")
        parts.append(block.mean(axis=1))
    return np.concatenate(parts), own_rate


def resampled_length(length: int, rate: int, wanted: int) -> int:
    """Number of samples of `length` at `rate` Hz once they are at `wanted` Hz."""
    return math.ceil(length * wanted / rate)


def _blocks(reference: Reference, rate: int, max_bytes: int) -> Iterator[tuple[np.ndarray, int]]:
    """(float32 [samples, channels], their rate in Hz), one block after the other."""
    length, info = 0, _exact_header(reference)
    if info is not None:
        _check(reference, info.frames, info.channels, info.samplerate, rate, max_bytes)
    for block, own_rate in _decoded(reference):
        length += len(block)
        _check(reference, length, block.shape[1], own_rate, rate, max_bytes)
        yield block, own_rate


def _check(
    reference: Reference, length: int, channels: int, own_rate: int, rate: int, max_bytes: int
) -> None:
    if not LOWEST_RATE <= own_rate <= HIGHEST_RATE:
        raise RowError(
            f"{reference.name}: a sampling rate of {own_rate} Hz, from {LOWEST_RATE} to "
            f"{HIGHEST_RATE} are read: resample it (ffmpeg -i FILE -ar {rate} NEW_FILE.flac)"
        )
    num_bytes = _BYTES * max(length * channels, resampled_length(length, own_rate, rate))
    check_bytes(reference, num_bytes, max_bytes)


def check_bytes(reference: Reference, num_bytes: int, max_bytes: int) -> None:
    """Raise RowError if a medium has more bytes than `max_bytes` once it is decoded."""
    if num_bytes > max_bytes:
        raise RowError(
            f"{reference.name}: takes {num_bytes} bytes or more once it is decoded, "
            f"--max_media_bytes is {max_bytes}: cut it into parts, or raise the flag"
        )


def _decoded(reference: Reference) -> Iterable[tuple[np.ndarray, int]]:
    if not reference.is_track and _header(reference) is not None:
        return _by_libsndfile(reference)
    return _by_ffmpeg(reference)


def _header(reference: Reference) -> Any:
    """soundfile's, None for what libsndfile does not know: a format, or the length of a stream; and
    for a video's track.
    """
    import soundfile

    if reference.is_track:
        return None
    try:
        info = soundfile.info(reference.file())
    except (soundfile.LibsndfileError, TypeError):  # by the name `.raw` it expects bare samples
        return None
    return None if info.frames == _UNKNOWN_LENGTH else info


def _exact_header(reference: Reference) -> Any:
    """The header if it gives the exact length, else None."""
    info = _header(reference)
    return None if info is None or info.format in _INEXACT_HEADERS else info


def _by_libsndfile(reference: Reference) -> Iterator[tuple[np.ndarray, int]]:
    import soundfile

    with closing(soundfile.SoundFile(reference.file())) as file:
        size = max(_BLOCK // file.channels, 1)
        while len(block := file.read(size, dtype="float32", always_2d=True)):
            yield block, file.samplerate


def _by_ffmpeg(reference: Reference) -> Iterator[tuple[np.ndarray, int]]:
    try:
        with reference.opened() as file:
            yield from sound_blocks(file)
    except ImportError as error:
        if reference.is_track:
            raise
        name = shortened(reference.path or "FILE", MAX_PATH)
        raise RowError(
            f"{reference.name}: not one of libsndfile's formats (wav, flac, mp3 ...), and others "
            f"need PyAV ({first_line(error)}): pip install 'av>=17.1,<20', or convert it: "
            f"ffmpeg -i {name} NEW_FILE.flac"
        ) from None
    except RowError:
        raise
    except ValueError as error:
        if reference.is_track:
            raise RowError(
                f"{reference.name}: this video's sound cannot be read ({first_line(error)}), and "
                "`use_audio_in_video` takes it, unless `audios` gives one for each video"
            ) from error
        raise RowError(
            f"{reference.name}: cannot be read (not one of libsndfile's formats; FFmpeg: "
            f"{first_line(error)})"
        ) from error
