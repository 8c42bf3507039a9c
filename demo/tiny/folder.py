"""A small model folder in the hub's format: `build_folder`, a whole Qwen3-Omni or a text model,
random or taught a toy language and its sound.
"""

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoTokenizer,
    PreTrainedModel,
)

from demo.tiny import hub_files
from demo.tiny.config import TinyModelConfig
from demo.tiny.sounds import Speaker, make_speaker
from demo.tiny.tokenizer import train_tokenizer, write_tokenizer
from demo.tiny.tower_training import train_audio_tower
from demo.tiny.training import train_toy_language
from megatron_gkd.families import families
from megatron_gkd.model.transformer_config import DTYPES

SMALL = TinyModelConfig()
TEXT_SIZES = (  # settings that have the same name in config.json
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "vocab_size",
)


def initialise(model: PreTrainedModel, seed: int) -> None:
    """Fill every parameter with seeded noise: activations of order one, logits of standard
    deviation about two.

    Norm weights are near one but not one, biases near zero but not zero, so that a misplaced weight
    shows.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed_tokens" in name or name.endswith("lm_head.weight"):
                parameter.copy_(noise * (2.0 / math.sqrt(parameter.shape[-1])))
            elif parameter.dim() >= 2:
                fan_in = parameter.shape[-1] if "experts" in name else parameter[0].numel()
                parameter.copy_(noise / math.sqrt(fan_in))
            elif name.endswith("weight"):
                parameter.copy_(1.0 + 0.1 * noise)
            else:
                parameter.copy_(0.05 * noise)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_folder(folder: Path, config: TinyModelConfig, speak: Speaker) -> None:
    family = families()[config.family]
    has_towers = bool(family.towers)
    tokenizer = train_tokenizer(config.vocab_size)
    token_ids = write_tokenizer(tokenizer, str(folder), has_media=has_towers)
    text = {name: getattr(config, name) for name in TEXT_SIZES}
    sizes = (text, config.rope_theta, config.tie_word_embeddings, token_ids)
    whole = family.whole_class if not config.thinker_only else None
    model_class = (whole or family.model_class)()
    if not has_towers:
        written = hub_files.text_model_config(next(iter(family.prefixes)), *sizes)
    elif whole:
        written = hub_files.whole_config(hub_files.thinker_config(*sizes), token_ids)
    else:
        written = hub_files.thinker_config(*sizes)
    written = {"architectures": [model_class.__name__], "dtype": config.torch_dtype, **written}
    _write_json(folder / "config.json", written)
    if has_towers:
        _write_json(folder / "preprocessor_config.json", hub_files.preprocessor_config())

    model = model_class(AutoConfig.from_pretrained(folder, dtype=torch.float32))
    initialise(model, config.seed)
    _teach(getattr(model, "thinker", model), folder, config, speak, has_towers)
    model.to(DTYPES[config.torch_dtype]).save_pretrained(
        folder, max_shard_size=config.max_shard_size
    )
    # save_pretrained writes its own spelling: keep the hub's
    _write_json(folder / "config.json", written)
    _write_json(folder / "generation_config.json", hub_files.generation_config(token_ids))


def _teach(
    model: PreTrainedModel,
    folder: Path,
    config: TinyModelConfig,
    speak: Speaker,
    has_towers: bool,
) -> None:
    """The lessons that `config` asks for, and lessons.json, which tells of them."""
    if config.train_steps:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        accuracy = train_toy_language(
            model, tokenizer, num_steps=config.train_steps, seed=config.seed
        )
        print(
            "held-out prompts answered right:",
            ", ".join(f"{rule} {share:.0%}" for rule, share in accuracy.items()),
        )
    if config.tower_steps:
        extractor = AutoFeatureExtractor.from_pretrained(folder)
        share = train_audio_tower(
            model, extractor, speak, num_steps=config.tower_steps, seed=config.seed
        )
        print(
            f"held-out {config.tower_sound}: {share:.1%} of the audio tower's outputs tell the word"
        )
    if config.train_steps or config.tower_steps:
        told = ("train_steps", *(("tower_steps", "tower_sound") if has_towers else ()), "seed")
        _write_json(folder / "lessons.json", {name: getattr(config, name) for name in told})


def build_folder(output: str, config: TinyModelConfig = SMALL) -> str:
    """Write a model folder to `output` and return its path; the same settings give the same bytes.

    Written beside and renamed: `output` is there complete or not at all. Raises ValueError for a
    folder that has files, or voices without espeak-ng.
    """
    speak = make_speaker(config.tower_sound)
    if os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output)):
        raise ValueError(
            f"--output {output} exists and is not an empty folder: remove it or choose another"
        )
    output_path = Path(output).absolute()
    output_path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output_path.name}.", dir=output_path.parent))
    try:
        _write_folder(partial, config, speak)
        partial.chmod(0o755)
        os.replace(partial, output_path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return str(output_path)
