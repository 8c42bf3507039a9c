"""What differs between versions of `transformers` in the thinker's class.

Until 5.20 its `model` is the decoder itself, beside the towers, later `model` holds decoder and
towers; and only later versions let `peft` find the adapter names of the whole model,
`thinker.model.layers...`, on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

if TYPE_CHECKING:
    from peft import PeftModel


def decoder(thinker: nn.Module) -> nn.Module:
    """The text decoder, embedding to final norm, of a Qwen3OmniMoeThinkerForConditionalGeneration.
    """
    return getattr(thinker.model, "language_model", thinker.model)


def audio_tower(thinker: nn.Module) -> nn.Module:
    """The audio encoder of a Qwen3OmniMoeThinkerForConditionalGeneration."""
    return (
        thinker.model.audio_tower if hasattr(thinker.model, "audio_tower") else thinker.audio_tower
    )


def load_thinker(
    folder: str | Path, dtype: torch.dtype = torch.float32
) -> Qwen3OmniMoeThinkerForConditionalGeneration:
    """transformers' thinker of FOLDER in evaluation mode, on the CPU: safetensors only, nothing
    from the network.
    """
    load = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained
    return load(folder, dtype=dtype, use_safetensors=True, local_files_only=True).eval()


def load_peft(thinker: nn.Module, adapter: str | Path, **options) -> PeftModel:
    """`thinker` with the adapter, whether its names start with `thinker.` or not. Where a tensor of
    the adapter has no place, or a module of `thinker` no tensor, peft says no more than a warning
    "Found missing adapter keys". Raises FileNotFoundError where there is no safetensors file: peft
    would read a pickle, or ask the network.
    """
    file = Path(adapter, "adapter_model.safetensors")
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: save the adapter with safe_serialization=True"
        )
    from peft import PeftModel  # not at the top: only who has an adapter needs peft

    return PeftModel.from_pretrained(
        thinker, str(adapter), key_mapping={r"^thinker\.": ""}, **options
    )
