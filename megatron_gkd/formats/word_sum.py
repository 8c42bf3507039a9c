"""A digest of a file's content that many processes can form together, each of what it writes or
reads, in any order and any cut: their sums are added.

Word i of a file (8 bytes, little-endian; zeros behind the last) counts times an odd number of its
place, and all is summed modulo 2^64. An odd number has an inverse there, so that one changed word
always changes the sum; words that changed places do with a probability of 1 - 2^-32 or more. It
tells damage, not an attacker. One multiplication and one addition per word.
"""

from pathlib import Path

import numpy as np

WORD_BYTES = 8
_PERIOD = 1 << 16  # words: as many factors stay in a processor's cache
_MODULUS = 1 << 64


def _odd_numbers(count: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(20_261)).integers(
        0, 1 << 63, count, dtype=np.uint64
    ) * np.uint64(2) + np.uint64(1)


_FACTORS = _odd_numbers(_PERIOD)


def _of_period(number: int) -> int:
    """An odd number of the period's own: the finaliser of SplitMix64 (Steele et al., 2014)."""
    mixed = (number + 1) * 0x9E3779B97F4A7C15 % _MODULUS
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % _MODULUS
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % _MODULUS
    return (mixed ^ mixed >> 31) | 1


def word_sum(data: bytes | memoryview, start: int) -> int:
    """The share of `data`, which lies at byte `start` of its file, in 0 to 2^64 - 1."""
    head = min(-start % WORD_BYTES, len(data))
    tail = len(data) - (len(data) - head) % WORD_BYTES
    # of a word that is cut each piece counts as with zeros in place of the other
    total = _of_piece(data[:head], start) + _of_piece(data[tail:], start + tail)
    words = np.frombuffer(data, "<u8", (tail - head) // WORD_BYTES, head)
    first, done = (start + head) // WORD_BYTES, 0
    while done < len(words):
        period, place = divmod(first + done, _PERIOD)
        part = words[done : done + _PERIOD - place]
        total += int(np.dot(part, _FACTORS[place : place + len(part)])) * _of_period(period)
        done += len(part)
    return total % _MODULUS


def _of_piece(piece: bytes | memoryview, start: int) -> int:
    """Of less than a word."""
    if not len(piece):
        return 0
    place, first = divmod(start, WORD_BYTES)
    value = int.from_bytes(piece, "little") << 8 * first
    return value * int(_FACTORS[place % _PERIOD]) * _of_period(place // _PERIOD)


def file_sum(path: Path, start: int = 0, stop: int | None = None) -> int:
    """That of the bytes from `start` to `stop` (default: the end) of a file. Host memory: 1 MiB."""
    total = 0
    with open(path, "rb") as file:
        file.seek(start)
        while stop is None or start < stop:
            block = file.read(1 << 20 if stop is None else min(1 << 20, stop - start))
            if not block:
                break
            total += word_sum(block, start)
            start += len(block)
    return total % _MODULUS


def added(sums: list[int]) -> int:
    """The sum of shares."""
    return sum(sums) % _MODULUS
