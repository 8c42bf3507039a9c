"""The numbers of the towers' weights, from config.json: what media/towers.py would build.

Names are those of the settings, with transformers' values for those that config.json leaves out.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_gkd.model.args import read_config

AUDIO = dict(d_model=1280, encoder_layers=32, encoder_ffn_dim=5120, num_mel_bins=128)
AUDIO |= dict(downsample_hidden_size=480, output_dim=3584)
VISUAL: dict[str, Any] = dict(hidden_size=1152, depth=27, intermediate_size=4304, in_channels=3)
VISUAL |= dict(patch_size=16, temporal_patch_size=2, spatial_merge_size=2, out_hidden_size=3584)
VISUAL |= dict(num_position_embeddings=2304, deepstack_visual_indexes=(8, 16, 24))


def linear(inputs: int, outputs: int) -> int:
    """With a bias."""
    return inputs * outputs + outputs


def audio_parameters(of: Mapping[str, Any]) -> int:
    """Three convolutions over log-mel frames, layers, two linears."""
    width, channels = of["d_model"], of["downsample_hidden_size"]
    layer = 4 * linear(width, width) + 4 * width
    layer += linear(width, of["encoder_ffn_dim"]) + linear(of["encoder_ffn_dim"], width)
    bins = of["num_mel_bins"]
    for _ in range(3):
        bins = (bins + 1) // 2
    convolutions = linear(9, channels) + 2 * linear(9 * channels, channels)
    start = convolutions + channels * bins * width
    end = 2 * width + linear(width, width) + linear(width, of["output_dim"])
    return start + of["encoder_layers"] * layer + end


def visual_parameters(of: Mapping[str, Any]) -> int:
    """Patches and their places, blocks, a merger at the end and one for each deepstack layer."""
    width, merged = of["hidden_size"], of["hidden_size"] * of["spatial_merge_size"] ** 2
    block = linear(width, 3 * width) + linear(width, width) + 4 * width
    block += linear(width, of["intermediate_size"]) + linear(of["intermediate_size"], width)
    patch = of["in_channels"] * of["temporal_patch_size"] * of["patch_size"] ** 2
    start = linear(patch, width) + of["num_position_embeddings"] * width
    mlp = linear(merged, merged) + linear(merged, of["out_hidden_size"])
    mergers = 2 * width + mlp + len(of["deepstack_visual_indexes"]) * (2 * merged + mlp)
    return start + of["depth"] * block + mergers


COUNTS: dict[str, tuple[dict[str, Any], Callable[[Mapping[str, Any]], int]]] = {
    "audio_tower": (AUDIO, audio_parameters),
    "visual": (VISUAL, visual_parameters),
}


def tower_parameters(folder: str | Path, audio: bool, visual: bool) -> int:
    """Of the towers of FOLDER/config.json that are asked for, on the first stage. Raises as
    `read_config`, or ValueError for a size that is none.
    """
    config, wanted = read_config(folder), {"audio_tower": audio, "visual": visual}
    total = 0
    for tower in config.family.towers:
        if wanted[tower.name]:
            defaults, count = COUNTS[tower.name]
            sizes = defaults | config.settings.get(tower.config, {})
            for name, default in defaults.items():
                if isinstance(default, tuple) and not isinstance(sizes[name], list | tuple):
                    raise ValueError(
                        f"{config.path}: {tower.config}.{name} = {sizes[name]!r} is not supported "
                        "(a tower has a list of its layers)"
                    )
                if isinstance(default, int) and not (type(sizes[name]) is int and sizes[name] > 0):
                    raise ValueError(
                        f"{config.path}: {tower.config}.{name} = {sizes[name]!r} is not supported "
                        "(a tower has a whole number of at least one)"
                    )
            total += count(sizes)
    return total
