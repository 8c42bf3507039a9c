"""A digest of a file's content that many processes can form together, each of what it writes or
reads, in any order and any cut: their sums are added.

Word i of a file (4 bytes, little-endian; zeros behind the last) counts times an odd number of its
place, and all is summed modulo 2^64. An odd number has an inverse there, so that one changed word
always changes the sum; words that changed places do with a probability of 1 - 2^-32 or more. It
tells damage, not an attacker. One multiplication and one addition per word.
"""

from pathlib import Path

import numpy as np

WORD_BYTES = 4
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
    """The share of `data`, which lies at byte `start` (a multiple of 4) of its file, in 0 to
    2^64 - 1; only at the end of a file may `data` end within a word.
    """
    assert start % WORD_BYTES == 0
    if over := len(data) % WORD_BYTES:
        data = bytes(data) + bytes(WORD_BYTES - over)
    words = np.frombuffer(data, dtype="<u4")
    first, total, done = start // WORD_BYTES, 0, 0
    while done < len(words):
        period, place = divmod(first + done, _PERIOD)
        part = words[done : done + _PERIOD - place].astype(np.uint64)
        share = int(np.dot(part, _FACTORS[place : place + len(part)]))
        total += share * _of_period(period)
        done += len(part)
    return total % _MODULUS


def file_sum(path: Path, start: int = 0, stop: int | None = None) -> int:
    """That of the bytes from `start` to `stop` (default: the end) of a file, both multiples of 4
    unless at its end. Host memory: 1 MiB.
    """
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
