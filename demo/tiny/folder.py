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
from demo.tiny.sounds import Speaker, make_speaker
from demo.tiny.tokenizer import train_tokenizer, write_tokenizer
from demo.tiny.tower_training import train_audio_tower
from demo.tiny.training import train_toy_language
from megatron_gkd.families import Family, families
from megatron_gkd.model.transformer_config import DTYPES


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


def _write_folder(
    folder: Path,
    *,
    family: Family,
    text: dict[str, Any],
    rope_theta: float,
    tie_word_embeddings: bool,
    thinker_only: bool,
    torch_dtype: str,
    max_shard_size: str,
    train_steps: int,
    tower_steps: int,
    tower_sound: str,
    speak: Speaker,
    seed: int,
) -> None:
    has_towers = bool(family.towers)
    tokenizer = train_tokenizer(text["vocab_size"])
    token_ids = write_tokenizer(tokenizer, str(folder), has_media=has_towers)
    sizes = (text, rope_theta, tie_word_embeddings, token_ids)
    whole = family.whole_class if not thinker_only else None
    model_class = (whole or family.model_class)()
    if not has_towers:
        config = hub_files.text_model_config(next(iter(family.prefixes)), *sizes)
    elif whole:
        config = hub_files.whole_config(hub_files.thinker_config(*sizes), token_ids)
    else:
        config = hub_files.thinker_config(*sizes)
    config = {"architectures": [model_class.__name__], "dtype": torch_dtype, **config}
    _write_json(folder / "config.json", config)
    if has_towers:
        _write_json(folder / "preprocessor_config.json", hub_files.preprocessor_config())

    model = model_class(AutoConfig.from_pretrained(folder, dtype=torch.float32))
    initialise(model, seed)
    trained = getattr(model, "thinker", model)
    if train_steps:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        accuracy = train_toy_language(trained, tokenizer, num_steps=train_steps, seed=seed)
        print(
            "held-out prompts answered right:",
            ", ".join(f"{rule} {share:.0%}" for rule, share in accuracy.items()),
        )
    if tower_steps:
        extractor = AutoFeatureExtractor.from_pretrained(folder)
        share = train_audio_tower(trained, extractor, speak, num_steps=tower_steps, seed=seed)
        print(f"held-out {tower_sound}: {share:.1%} of the audio tower's outputs tell the word")
    if train_steps or tower_steps:
        tower = {"tower_steps": tower_steps, "tower_sound": tower_sound} if has_towers else {}
        _write_json(folder / "lessons.json", {"train_steps": train_steps, **tower, "seed": seed})
    model.to(DTYPES[torch_dtype]).save_pretrained(folder, max_shard_size=max_shard_size)
    # save_pretrained writes its own spelling: keep the hub's
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", hub_files.generation_config(token_ids))


def build_folder(
    output: str,
    *,
    family: str = "qwen3_omni",
    num_hidden_layers: int = 3,
    hidden_size: int = 128,
    num_attention_heads: int = 8,
    num_key_value_heads: int = 4,
    head_dim: int = 32,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    moe_intermediate_size: int = 64,
    vocab_size: int = 1024,
    rope_theta: float = 1000000.0,
    tie_word_embeddings: bool = False,
    thinker_only: bool = False,
    torch_dtype: str = "float32",
    max_shard_size: str = "5GB",
    train_steps: int = 0,
    tower_steps: int = 0,
    tower_sound: str = "tones",
    seed: int = 0,
) -> str:
    """Write a model folder to `output` and return its path; the same arguments give the same bytes.

    Sizes are the decoder's. `family` is a file of `megatron_gkd/families`; `thinker_only` leaves
    out Qwen3-Omni's talker and code2wav and the `thinker.` prefix; `train_steps` teaches the
    decoder the toy language, `tower_steps` the audio tower its sound, `tower_sound`: tones, or
    voices (espeak-ng). Written beside and renamed: `output` is there complete or not at all. Raises
    ValueError for a folder that has files, impossible sizes, lessons for a tower that the family
    does not have, or voices without espeak-ng.
    """
    if family not in families():
        raise ValueError(f"--family {family}: choose one of {', '.join(families())}")
    if not families()[family].towers:
        for flag, value in (("thinker_only", thinker_only), ("tower_steps", tower_steps)):
            if value:
                raise ValueError(
                    f"--{flag}: {families()[family].title} is a text model without towers; "
                    "leave it out"
                )
    if torch_dtype not in DTYPES:
        raise ValueError(f"--torch_dtype {torch_dtype}: choose one of {', '.join(DTYPES)}")
    speak = make_speaker(tower_sound)
    if os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output)):
        raise ValueError(
            f"--output {output} exists and is not an empty folder: remove it or choose another"
        )
    if num_attention_heads % num_key_value_heads:
        raise ValueError(
            f"--num_attention_heads {num_attention_heads} is no multiple of "
            f"--num_key_value_heads {num_key_value_heads}"
        )
    if head_dim % 2 or head_dim < 8:
        raise ValueError(
            f"--head_dim {head_dim} must be even and at least 8: half of it is split over three "
            "rotary axes"
        )
    if num_experts_per_tok > num_experts:
        raise ValueError(
            f"--num_experts_per_tok {num_experts_per_tok} exceeds --num_experts {num_experts}"
        )
    text = {
        "num_hidden_layers": num_hidden_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "moe_intermediate_size": moe_intermediate_size,
        "vocab_size": vocab_size,
    }
    output_path = Path(output).absolute()
    output_path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output_path.name}.", dir=output_path.parent))
    try:
        _write_folder(
            partial,
            family=families()[family],
            text=text,
            rope_theta=rope_theta,
            tie_word_embeddings=tie_word_embeddings,
            thinker_only=thinker_only,
            torch_dtype=torch_dtype,
            max_shard_size=max_shard_size,
            train_steps=train_steps,
            tower_steps=tower_steps,
            tower_sound=tower_sound,
            speak=speak,
            seed=seed,
        )
        partial.chmod(0o755)
        os.replace(partial, output_path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return str(output_path)
