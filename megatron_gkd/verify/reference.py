"""transformers' model of a folder, and peft's around it: what ours is compared with.

What differs between versions: until 5.20 Qwen3-Omni's `model` is the decoder itself, beside the
towers, later `model` holds decoder and towers; and only later versions let `peft` find the adapter
names of the whole model on the part of it that is trained.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_gkd.families import family_of
from megatron_gkd.model.args import read_config

if TYPE_CHECKING:
    from peft import PeftModel


def decoder(model: Any) -> Any:
    """The text decoder, embedding to final norm, of transformers' model with an lm_head."""
    return getattr(model.model, "language_model", model.model)


def tower(model: Any, name: str) -> Any:
    """A tower of transformers' model by its name in the family: `audio_tower`, `visual`."""
    return getattr(model.model, name) if hasattr(model.model, name) else getattr(model, name)


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of FOLDER (decoder, lm_head and towers) in evaluation mode, on the CPU:
    safetensors only, nothing from the network.
    """
    load = read_config(folder).family.model_class().from_pretrained
    return load(folder, dtype=dtype, use_safetensors=True, local_files_only=True).eval()


def load_peft(model: Any, adapter: str | Path, **options: Any) -> PeftModel:
    """`model`, transformers', with the adapter, whichever of the family's roots its names have.
    Where a tensor of the adapter has no place, or a module of `model` no tensor, peft says no more
    than a warning "Found missing adapter keys". Raises FileNotFoundError where there is no
    safetensors file: peft would read a pickle, or ask the network.
    """
    file = Path(adapter, "adapter_model.safetensors")
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: save the adapter with safe_serialization=True"
        )
    from peft import PeftModel  # needed only with an adapter

    roots = family_of(model.config.model_type).adapter_roots
    # later versions find the names themselves, and with a mapping no longer those of the towers
    before_5_20 = decoder(model) is model.model
    mapping = {f"^{re.escape(root)}": "" for root in roots if root and before_5_20}
    return PeftModel.from_pretrained(model, str(adapter), key_mapping=mapping or None, **options)
