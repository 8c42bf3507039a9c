"""The rows that `verify` runs through both models: text of several lengths, and where the model
has towers a sound and a picture.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_gkd.families import family_of
from megatron_gkd.media.medium import Media, Medium

NUM_FRAMES = 230  # of sound: two whole chunks of the audio tower and a part
PICTURE = (1, 8, 12)  # patches: time, height, width


@dataclass(frozen=True)
class Rows:
    """`inputs` are the arguments of transformers' model, `media` and `is_media` [B, S], which
    marks their tokens, the same for our towers; `real` [B, S] marks what is not padding.
    """

    name: str
    inputs: dict[str, Tensor]
    media: Media | None
    is_media: Tensor

    @property
    def real(self) -> Tensor:
        return self.inputs["attention_mask"].bool()


def make_rows(config: Any) -> list[Rows]:
    """Rows for the model of transformers' `config`. Seeded: the same for every call."""
    generator = torch.Generator().manual_seed(0)
    rows = [_text(config, generator)]
    if family_of(config.model_type).towers:
        rows += [_sound(config, generator), _picture(config, generator)]
    return rows


def _words(config: Any, generator: torch.Generator, *size: int) -> Tensor:
    """Random ids, none of which stands for media."""
    special = [getattr(config, name) for name in dir(config) if name.endswith("token_id")]
    vocab_size = config.get_text_config().vocab_size
    ordinary = torch.tensor([token for token in range(vocab_size) if token not in special])
    return ordinary[torch.randint(len(ordinary), size, generator=generator)]


def _text(config: Any, generator: torch.Generator) -> Rows:
    lengths = torch.tensor([32, 17, 5])
    mask = torch.arange(32) < lengths[:, None]
    ids = torch.where(mask, _words(config, generator, 3, 32), 0)
    return Rows(
        "text", {"input_ids": ids, "attention_mask": mask.long()}, None, torch.zeros_like(mask)
    )


def _around(config: Any, generator: torch.Generator, media: Tensor) -> dict[str, Tensor]:
    """A row of words with the tokens `media` [M] among them."""
    ids = torch.cat([_words(config, generator, 4), media, _words(config, generator, 7)])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _sound(config: Any, generator: torch.Generator) -> Rows:
    audio, count = config.audio_config, family_of(config.model_type).num_audio_tokens
    assert count is not None, "a family with towers counts the tokens of a sound"
    num_tokens = count(NUM_FRAMES, config)
    media = torch.tensor(
        [config.audio_start_token_id]
        + [config.audio_token_id] * num_tokens
        + [config.audio_end_token_id]
    )
    features = torch.randn(1, audio.num_mel_bins, NUM_FRAMES, generator=generator)
    mask = torch.ones(1, NUM_FRAMES, dtype=torch.long)
    inputs = _around(config, generator, media) | {
        "input_features": features,
        "feature_attention_mask": mask,
    }
    sound = Media.of([Medium("audio", features[0], None, num_tokens)])
    return Rows("audio", inputs, sound, inputs["input_ids"] == config.audio_token_id)


def _picture(config: Any, generator: torch.Generator) -> Rows:
    vision, (time, height, width) = config.vision_config, PICTURE
    num_tokens = time * height * width // vision.spatial_merge_size**2
    media = (
        [config.vision_start_token_id]
        + [config.image_token_id] * num_tokens
        + [config.vision_end_token_id]
    )
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(time * height * width, patch, generator=generator)
    inputs = _around(config, generator, torch.tensor(media))
    inputs |= {"pixel_values": pixels, "image_grid_thw": torch.tensor([PICTURE])}
    picture = Media.of([Medium("image", pixels, PICTURE, num_tokens)])
    return Rows("image", inputs, picture, inputs["input_ids"] == config.image_token_id)
