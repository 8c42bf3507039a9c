"""What sets one family of models apart from another: its names, config, towers and adapter roots.

Plain data. What needs transformers' classes is a function that imports them when it is called, so
that a config.json is read without importing torch or transformers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class SizeInWeights(NamedTuple):
    """Where the weights show a size that config.json states."""

    setting: str
    tensor: str
    axis: int
    length: Callable[[Mapping[str, Any]], int] | None = None
    """Along that axis, of all settings; None: the setting itself"""


@dataclass(frozen=True)
class Tower:
    """A tower in front of the decoder. Its parameters have one name in the folder, in transformers'
    model and in `media.towers.Towers`: `audio_tower.layers.0.fc1.weight`.
    """

    name: str
    """`audio_tower`, which encodes sound, or `visual`, which encodes images and videos"""
    config: str
    """Its section of the config: `audio_config`"""
    output_size: str
    """The setting in that section that must be the decoder's hidden size"""
    layers: str
    """Its list of layers"""
    defaults: Mapping[str, Any]
    """Its sizes, with transformers' values for those that config.json leaves out; a tuple numbers
    some of its layers"""
    width_and_heads: tuple[str, str]
    """The settings of which the second must divide the first"""
    num_layers: str
    """The setting that says how many layers there are"""
    counts: Mapping[str, str]
    """setting -> the list of modules that has as many"""
    in_weights: tuple[SizeInWeights, ...]
    lora_linears: tuple[str, ...]
    """What `--lora_towers` wraps in each layer"""
    ends: tuple[str, ...]
    """Its other linears (of a list the first), on which LoRA can only be merged"""
    load_class: Callable[[], Any]
    """transformers' class of it"""
    aliases: Mapping[str, str]
    """setting -> another name of it, which wins in transformers where both are there"""

    def sizes(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Of a config's settings, with transformers' values for those that are left out."""
        section = settings.get(self.config) or {}
        given = {name: value for name, value in section.items() if value is not None}
        spelled = {name: given[alias] for name, alias in self.aliases.items() if alias in given}
        return {**self.defaults, **given, **spelled}

    def spelling(self, size: str, settings: Mapping[str, Any]) -> str:
        """For messages: its section and the name under which `sizes` has found it."""
        alias = self.aliases.get(size, size)
        is_given = (settings.get(self.config) or {}).get(alias) is not None
        return f"{self.config}.{alias if is_given else size}"


@dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """One per file of this folder, under the name FAMILY. A model is a decoder (a mixture of
    experts in every layer), towers in front of it or none, and other models beside it or none.
    """

    title: str
    """For messages: `Qwen3-Omni`"""
    trained_part: str = "the model"
    """For messages: the part that LoRA is put on"""

    # config.json
    prefixes: dict[str, str]
    """model_type -> what stands before `model.layers...` in the folder's tensor names. A prefix
    means that the folder holds other models too, and config.json has a `section` for this one."""
    text_defaults: dict[str, Any]
    """The decoder's settings with transformers' values for those that config.json leaves out"""
    section: str = ""
    """Of a config.json whose model_type has a prefix: decoder and towers"""
    text_section: str = ""
    """In that section, or in a config.json without it: the decoder. Empty: the settings are the
    decoder's."""
    aliases: dict[str, str] = field(default_factory=dict)
    """setting of `text_defaults` -> another name under which transformers saves it"""
    interleaved_mrope: bool = False
    """Rotary channels take turns between the time, height and width positions (`mrope_section`);
    False: all of them turn with one position"""

    # transformers' classes, the reference for our own
    config_class: Callable[[], Any]
    """Of `section`: decoder and towers"""
    model_class: Callable[[], Any]
    """Decoder with lm_head and towers"""
    whole_class: Callable[[], Any] | None = None
    """With the other models; None where there are none"""

    # what there is beside the decoder
    towers: tuple[Tower, ...] = ()
    other_models: tuple[str, ...] = ()
    """Prefixes of the tensors of models that are never trained and travel along: `talker.`"""
    other_models_title: str = "other models"
    """For messages: `talker or vocoder`"""
    other_models_switch: str = ""
    """The setting of config.json that says whether they are there"""
    media_settings: Callable[[Any], dict[str, Any]] | None = None
    """transformers' config -> the fields of `media.positions.MediaTokenIds`. Raises ValueError
    naming one that is missing."""
    num_audio_tokens: Callable[[int, Any], int] | None = None
    """(log-mel frames, transformers' config) -> tokens of a sound, by transformers"""

    # PEFT's names: base_model.model.{root}{inner}layers.3.self_attn.q_proj.lora_A.weight
    adapter_roots: tuple[str, ...] = ("",)
    """Accepted between `base_model.model.` and the names of decoder and towers; the first is
    written"""
    inner_roots: tuple[str, ...] = ("model.",)
    """Accepted before `layers.`; the first is written"""

    @property
    def adapter_root(self) -> str:
        """What the names of an adapter's tensors begin with where we write them."""
        return f"base_model.model.{self.adapter_roots[0]}"

    @property
    def adapter_layers(self) -> str:
        """The same up to the number of the decoder's layer."""
        return f"{self.adapter_root}{self.inner_roots[0]}layers."

    @property
    def excluded_modules(self) -> tuple[str, ...]:
        """Modules whose linears have the names of the decoder's: no target of LoRA unless named."""
        return tuple(tower.name for tower in self.towers) + tuple(
            name.rstrip(".") for name in self.other_models
        )
