"""The digest of a file that many processes form together."""

import numpy as np
import pytest

from megatron_gkd.formats.word_sum import _FACTORS, _of_period, added, file_sum, word_sum


def content(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


@pytest.mark.parametrize("size", [0, 1, 7, 4096, 1_000_003])
def test_any_cut_in_any_order_is_the_sum_of_the_whole(tmp_path, size):
    """Against the formula, word by word."""
    data = content(size)
    (tmp_path / "file").write_bytes(data)
    padded = data + bytes(-size % 8)
    expected = sum(
        int.from_bytes(padded[8 * i : 8 * i + 8], "little")
        * int(_FACTORS[i % len(_FACTORS)])
        * _of_period(i // len(_FACTORS))
        for i in range(len(padded) // 8)
    )
    assert file_sum(tmp_path / "file") == word_sum(data, 0) == expected % 2**64
    for of_cut in (3, 4, 12_340, 400_001):
        if size // of_cut < 1000:
            cuts = [word_sum(data[at : at + of_cut], at) for at in range(0, size, of_cut)]
            assert added(cuts[::-1]) == expected % 2**64
    shares = [
        (len(padded) // 4 * k // 3 * 4, len(padded) // 4 * (k + 1) // 3 * 4) for k in (2, 0, 1)
    ]
    assert added([file_sum(tmp_path / "file", *share) for share in shares]) == expected % 2**64


def test_any_change_tells():
    data = content(1_200_000)
    whole = word_sum(data, 0)
    for at in (0, 3, 299_999, 599_999):
        for bit in (0, 7):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            assert word_sum(bytes(changed), 0) != whole
    period = 8 * len(_FACTORS)
    swapped = data[period : 2 * period] + data[:period] + data[2 * period :]
    assert word_sum(swapped, 0) != whole and word_sum(bytes(len(data)), 0) == 0
    assert word_sum(data[8:16] + data[:8] + data[16:], 0) != whole
