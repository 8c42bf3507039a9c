"""Placeholders of media in token ids, against transformers' processor for videos that show their
audio.
"""

import numpy as np
import pytest
import torch
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import Qwen3OmniMoeProcessor

from megatron_gkd.errors import RowError
from megatron_gkd.media.medium import Size
from megatron_gkd.media.placeholders import (
    BOTH,
    Placeholder,
    check_counts,
    count,
    fill,
    find_placeholders,
    positions_of,
)
from megatron_gkd.media.positions import MediaTokenIds, rope_positions

AUDIO, IMAGE, VIDEO, AUDIO_START, AUDIO_END, VISION_START, VISION_END = range(90, 97)
TOKENS = MediaTokenIds(
    AUDIO, IMAGE, VIDEO, AUDIO_START, AUDIO_END, VISION_START, VISION_END, 13.0, 2
)
BARE = [
    1,
    AUDIO_START,
    AUDIO,
    AUDIO_END,
    VISION_START,
    IMAGE,
    VISION_END,
    2,
    VISION_START,
    VIDEO,
    VISION_END,
    3,
]


def test_each_medium_gets_its_tokens():
    found = find_placeholders(BARE, TOKENS, False)
    assert found == [
        Placeholder("audio", 2, 3),
        Placeholder("image", 5, 6),
        Placeholder("video", 9, 10),
    ]
    sizes = {"audio": [Size(3)], "image": [Size(2)], "video": [Size(4, (2, 2, 4), 1.0)]}
    full = fill(BARE, found, sizes, TOKENS, as_given=True)
    assert (
        full.ids
        == BARE[:2] + [AUDIO] * 3 + BARE[3:5] + [IMAGE] * 2 + BARE[6:9] + [VIDEO] * 4 + BARE[10:]
    )
    assert [BARE[index] for index in full.origin] == full.ids
    again = fill(full.ids, find_placeholders(full.ids, TOKENS, False), sizes, TOKENS, as_given=True)
    assert again.ids == full.ids == [full.ids[index] for index in again.origin]
    larger = sizes | {"image": [Size(5)]}
    other = fill(
        full.ids, find_placeholders(full.ids, TOKENS, False), larger, TOKENS, as_given=False
    )
    assert other.ids.count(IMAGE) == 5 and other.ids.count(AUDIO) == 3
    with pytest.raises(
        RowError,
        match=r"placeholder 2 \(image\) has 2 tokens and its medium makes 5: write one, or all",
    ):
        fill(full.ids, find_placeholders(full.ids, TOKENS, False), larger, TOKENS, as_given=True)
    positions = positions_of(full.ids, TOKENS, {"audio": [1, 2], "image": [2], "video": [4]})
    assert positions == {"audio": [[2], [3, 4]], "image": [[7, 8]], "video": [[12, 13, 14, 15]]}


def test_a_placeholder_stands_behind_its_start_token():
    for ids in ([IMAGE], [1, AUDIO_START, IMAGE], [AUDIO_START, AUDIO, 2, AUDIO, AUDIO]):
        with pytest.raises(RowError, match=r"without its start token \(9[35]\) before it: write <"):
            find_placeholders(ids, TOKENS, False)


def test_counts():
    placeholders = find_placeholders(BARE, TOKENS, True)
    assert [placeholder.kind for placeholder in placeholders] == ["audio", "image", BOTH]
    assert count(placeholders) == {"audio": 2, "image": 1, "video": 1}
    check_counts(placeholders, {"audio": [1, 2], "image": [1], "video": [1]}, "the row has")
    with pytest.raises(RowError, match="2 audio placeholders for 1 audio; they are giv"):
        check_counts(placeholders, {"audio": [1], "image": [1], "video": [1]}, "the row has")


class Words:
    """What transformers' methods ask of their processor; tokens are letters."""

    audio_token, image_token, video_token, audio_bos_token, audio_eos_token = "aiv<>"
    vision_bos_token, vision_eos_token = "[]"
    video_processor = image_processor = type("Processor", (), {"merge_size": 2})


def transformers_letters(grid, seconds, num_audio) -> str:
    """A video and its audio as transformers interleaves them, between the audio's marks."""
    if hasattr(Qwen3OmniMoeProcessor, "replace_video_with_audio_token"):
        inputs = {"video_grid_thw": np.array([grid]), "video_second_per_grid": [seconds]}
        return Qwen3OmniMoeProcessor.replace_video_with_audio_token(
            Words, inputs, 0, {"num_audio_tokens": [num_audio]}, 0, position_id_per_seconds=13.0
        )
    (text,) = Qwen3OmniMoeProcessor.replace_multimodal_special_tokens(  # until 5.20
        Words,
        ["[v]"],
        iter([num_audio]),
        iter([]),
        iter([np.array(grid)]),
        video_second_per_grid=iter([seconds]),
        use_audio_in_video=True,
        position_id_per_seconds=13.0,
        seconds_per_chunk=2.0,
    )
    return text.removeprefix("[").removesuffix("]")


@pytest.mark.parametrize(
    "grid, seconds, num_audio", [((3, 4, 4), 1.0, 30), ((4, 2, 6), 0.4, 60), ((2, 4, 2), 2.0, 9)]
)
def test_a_video_with_its_audio_is_interleaved_as_transformers_does(grid, seconds, num_audio):
    text = transformers_letters(grid, seconds, num_audio)
    ids = {"a": AUDIO, "v": VIDEO, "<": AUDIO_START, ">": AUDIO_END}
    expected = [1, VISION_START, *(ids[letter] for letter in text), VISION_END, 2]

    bare = [1, VISION_START, VIDEO, VISION_END, 2]
    size = Size(int(np.prod(grid)) // 4, grid, seconds)
    sizes = {"audio": [Size(num_audio)], "image": [], "video": [size]}
    full = fill(bare, find_placeholders(bare, TOKENS, True), sizes, TOKENS, as_given=True)
    assert full.ids == expected
    found = find_placeholders(full.ids, TOKENS, True)
    assert found == [Placeholder(BOTH, 2, len(expected) - 2)]
    assert fill(full.ids, found, sizes, TOKENS, as_given=True).ids == expected
    arguments = dict(
        audio_tokens=[num_audio],
        video_grids=[grid],
        seconds_per_grid=[seconds],
        use_audio_in_video=True,
    )
    positions = rope_positions(full.ids, TOKENS, **arguments)
    times = positions[0, 3:-3]
    assert torch.equal(times, times.sort().values)  # the tokens stand in the order of their times
