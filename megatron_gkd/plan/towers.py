"""The towers' sizes, from config.json: the numbers of what media/towers.py would build.

Names are those of the settings, with transformers' values for those that config.json leaves out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_gkd.model.args import read_config


def linear(inputs: int, outputs: int) -> int:
    """With a bias."""
    return inputs * outputs + outputs


def halved(length: int, times: int) -> int:
    """By convolutions of stride 2."""
    for _ in range(times):
        length = (length + 1) // 2
    return length


@dataclass(frozen=True)
class AudioTower:
    """Three convolutions over blocks of log-mel frames, layers, two linears."""

    width: int
    inner: int
    layers: int
    heads: int
    bins: int
    channels: int
    output: int
    places: int
    """Of a table that is computed, not read"""
    block_frames: int
    blocks_at_once: int
    """Of the convolutions"""

    @classmethod
    def of(cls, sizes: Mapping[str, Any]) -> "AudioTower":
        return cls(
            width=sizes["d_model"],
            inner=sizes["encoder_ffn_dim"],
            layers=sizes["encoder_layers"],
            heads=sizes["encoder_attention_heads"],
            bins=sizes["num_mel_bins"],
            channels=sizes["downsample_hidden_size"],
            output=sizes["output_dim"],
            places=sizes["max_source_positions"],
            block_frames=2 * sizes["n_window"],
            blocks_at_once=sizes["conv_chunksize"],
        )

    @cached_property
    def parameters(self) -> int:
        width, channels = self.width, self.channels
        layer = 4 * linear(width, width) + 4 * width
        layer += linear(width, self.inner) + linear(self.inner, width)
        start = linear(9, channels) + 2 * linear(9 * channels, channels)
        start += channels * halved(self.bins, 3) * width
        end = 2 * width + linear(width, width) + linear(width, self.output)
        return start + self.layers * layer + end

    @property
    def numbers(self) -> int:
        """That stand all the time."""
        return self.parameters + self.places * self.width

    @property
    def lora_numbers(self) -> int:
        """Inputs and outputs of the linears that --lora_towers wraps: times the rank they are
        parameters.
        """
        return self.layers * (4 * 2 * self.width + 2 * (self.width + self.inner))


@dataclass(frozen=True)
class VisualTower:
    """Patches and their places, blocks, a merger at the end and one for each deepstack layer."""

    width: int
    inner: int
    layers: int
    heads: int
    patch: int
    """Numbers of a patch"""
    merged: int
    """Patches of a token"""
    places: int
    output: int
    deepstack: int
    """Blocks whose output the decoder reads too"""

    @classmethod
    def of(cls, sizes: Mapping[str, Any]) -> "VisualTower":
        return cls(
            width=sizes["hidden_size"],
            inner=sizes["intermediate_size"],
            layers=sizes["depth"],
            heads=sizes["num_heads"],
            patch=sizes["in_channels"] * sizes["temporal_patch_size"] * sizes["patch_size"] ** 2,
            merged=sizes["spatial_merge_size"] ** 2,
            places=sizes["num_position_embeddings"],
            output=sizes["out_hidden_size"],
            deepstack=len(sizes["deepstack_visual_indexes"]),
        )

    @cached_property
    def parameters(self) -> int:
        width, merged = self.width, self.width * self.merged
        block = linear(width, 3 * width) + linear(width, width) + 4 * width
        block += linear(width, self.inner) + linear(self.inner, width)
        start = linear(self.patch, width) + self.places * width
        mlp = linear(merged, merged) + linear(merged, self.output)
        mergers = 2 * width + mlp + self.deepstack * (2 * merged + mlp)
        return start + self.layers * block + mergers

    @property
    def numbers(self) -> int:
        """As the audio tower's."""
        return self.parameters

    @property
    def lora_numbers(self) -> int:
        """As the audio tower's."""
        return self.layers * (4 * self.width + 2 * self.width + 2 * (self.width + self.inner))


Tower = AudioTower | VisualTower


def read_towers(folder: str | Path, audio: bool, visual: bool) -> tuple[Tower, ...]:
    """Those of FOLDER/config.json that are asked for, which the first stage holds. Raises as
    `read_config`.
    """
    config, wanted = read_config(folder), {"audio_tower": audio, "visual": visual}
    found: list[Tower] = []
    for tower in config.family.towers:
        if wanted[tower.name]:
            sizes = tower.sizes(config.settings)
            kind: Any = AudioTower if tower.name == "audio_tower" else VisualTower
            found.append(kind.of(sizes))
    return tuple(found)
