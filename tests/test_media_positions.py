"""Rotary positions of rows with media: equal to transformers' get_rope_index, bit for bit."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoePreTrainedModelForConditionalGeneration,
    _get_feat_extract_output_lengths,
)

from megatron_gkd.media.positions import MediaTokenIds, rope_positions

SECONDS = (1.0, 0.5, 0.7, 1 / 3, 2.0, 0.08)  # fractional times too


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder()


@pytest.fixture(scope="module")
def ids(folder):
    return MediaTokenIds.read(folder)


class Row:
    """A random row: its tokens, and its media as get_rope_index wants them."""

    def __init__(self, ids, generator, kinds, use_audio_in_video):
        self.ids, self.generator = ids, generator
        self.tokens, self.frames, self.images, self.videos, self.seconds = (
            self.text(),
            [],
            [],
            [],
            [],
        )
        self.use_audio_in_video = use_audio_in_video
        for kind in kinds:
            getattr(self, f"add_{kind}")()
            self.tokens += self.text()

    def draw(self, low, high):
        return int(torch.randint(low, high, (), generator=self.generator))

    def text(self):
        return [self.draw(0, 200) for _ in range(self.draw(0, 6))]

    @property
    def audio_tokens(self):
        return [
            int(_get_feat_extract_output_lengths(torch.tensor(frames))) for frames in self.frames
        ]

    def grid(self, longest):
        merge = self.ids.spatial_merge_size
        return (self.draw(1, longest + 1), merge * self.draw(1, 6), merge * self.draw(1, 6))

    def size(self, grid):
        return grid[0] * grid[1] * grid[2] // self.ids.spatial_merge_size**2

    def add_audio(self):
        self.frames.append(self.draw(1, 350))
        pads = [self.ids.audio_token_id] * self.audio_tokens[-1]
        self.tokens += [self.ids.audio_start_token_id, *pads, self.ids.audio_end_token_id]

    def add_image(self):
        self.images.append(self.grid(1))
        pads = [self.ids.image_token_id] * self.size(self.images[-1])
        self.tokens += [self.ids.vision_start_token_id, *pads, self.ids.vision_end_token_id]

    def add_video(self):
        self.videos.append(self.grid(5))
        self.seconds.append(SECONDS[self.draw(0, len(SECONDS))])
        pads = [self.ids.video_token_id] * self.size(self.videos[-1])
        self.tokens += [self.ids.vision_start_token_id, *pads, self.ids.vision_end_token_id]

    def add_both(self):
        self.frames.append(self.draw(1, 350))
        self.videos.append(self.grid(5))
        self.seconds.append(SECONDS[self.draw(0, len(SECONDS))])
        pads = [self.ids.video_token_id] * self.size(self.videos[-1])
        pads += [self.ids.audio_token_id] * self.audio_tokens[-1]
        self.tokens += [self.ids.vision_start_token_id, self.ids.audio_start_token_id, *pads]
        self.tokens += [self.ids.audio_end_token_id, self.ids.vision_end_token_id]

    def ours(self, ids):
        return rope_positions(
            self.tokens,
            ids,
            audio_tokens=self.audio_tokens,
            image_grids=self.images,
            video_grids=self.videos,
            seconds_per_grid=self.seconds,
            use_audio_in_video=self.use_audio_in_video,
        )

    def reference(self, thinker):
        tokens = torch.tensor([self.tokens])
        return Qwen3OmniMoePreTrainedModelForConditionalGeneration.get_rope_index(
            thinker,
            tokens,
            torch.tensor(self.images) if self.images else None,
            torch.tensor(self.videos) if self.videos else None,
            torch.ones_like(tokens),
            self.use_audio_in_video,
            torch.tensor(self.frames),
            torch.tensor(self.seconds),
        )[0][:, 0]


@pytest.fixture(scope="module")
def thinker(folder):
    """What get_rope_index uses of a model."""
    config = AutoConfig.from_pretrained(folder).thinker_config
    methods = Qwen3OmniMoePreTrainedModelForConditionalGeneration
    thinker = SimpleNamespace(
        config=config, spatial_merge_size=config.vision_config.spatial_merge_size
    )
    thinker.get_llm_pos_ids_for_vision = lambda *args: methods.get_llm_pos_ids_for_vision(
        thinker, *args
    )
    return thinker


def test_equal_to_transformers_on_random_mixtures(ids, thinker):
    """Of 200 rows a half shows the videos' audio, and of those some have silent videos too."""
    generator = torch.Generator().manual_seed(0)
    longest = 0
    for number in range(200):
        use_audio_in_video = number % 2 == 1
        choices = ["audio", "image", "both" if use_audio_in_video else "video"] + ["video"] * (
            number % 8 == 7
        )
        kinds = [
            choices[int(torch.randint(len(choices), (), generator=generator))]
            for _ in range(number % 7)
        ]
        row = Row(ids, generator, kinds, use_audio_in_video)
        if not row.tokens:
            continue
        found, expected = row.ours(ids), row.reference(thinker)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected), (number, kinds)
        longest = max(longest, len(row.tokens))
    assert longest > 300


def test_text_and_audio_count_up(ids):
    row = Row(ids, torch.Generator().manual_seed(1), ["audio", "audio"], False)
    assert torch.equal(
        row.ours(ids), torch.arange(len(row.tokens), dtype=torch.float32).expand(3, -1)
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda row: row.frames.append(10), "places for 1 audios, 2 audios belong to it"),
        (lambda row: row.images.clear(), "places for 1 images, 0 images belong to it"),
        (lambda row: row.seconds.append(1.0), "2 seconds_per_grid for 1 videos"),
        (lambda row: row.frames.__setitem__(0, 2000), "makes 260 tokens of id"),
        (lambda row: row.tokens.append(row.ids.image_token_id), "tokens of id"),
    ],
)
def test_refusals(ids, change, message):
    row = Row(ids, torch.Generator().manual_seed(2), ["audio", "image", "video"], False)
    change(row)
    with pytest.raises(ValueError, match=message):
        row.ours(ids)


def test_missing_setting_is_named(folder, tmp_path):
    config = json.loads((Path(folder) / "config.json").read_text())
    del config["thinker_config"]["vision_end_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: vision_end_token_id is missing"):
        MediaTokenIds.read(tmp_path)
