"""adapter_model.safetensors as checkpoints and tools write it: under per-expert names, which PEFT
loads under every version of transformers.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_gkd.families import Family
from megatron_gkd.formats.stored_tensor import SAFETENSORS_NAMES, memory
from megatron_gkd.lora.adapter import adapter_tensors
from megatron_gkd.lora.peft_config import TENSORS, saved_targets
from megatron_gkd.lora_targets import HEAD
from megatron_gkd.model.args import ModelArgs

RECORD = "megatron_gkd.lora"  # in the metadata of TENSORS: what adapter_config.json should say


def save_tensors(
    tensors: dict[str, Tensor],
    folder: Path,
    family: Family,
    *,
    rank: int,
    alpha: float,
    targets: list[str],
    use_rslora: bool = False,
) -> None:
    """Write FOLDER/adapter_model.safetensors. Its metadata, which PEFT does not read, say what the
    tensors were trained with. The lm_head's tensors are there under every root of the family:
    unlike the others' PEFT 0.21 looks for them on a part of the whole model without its prefix.

    The same arguments give the same bytes: safetensors' own save_file puts metadata in an order of
    chance.
    """
    head = f"{family.adapter_root}{HEAD}."
    tensors = tensors | {
        f"base_model.model.{root}{name.removeprefix(family.adapter_root)}": tensor
        for name, tensor in tensors.items()
        for root in family.adapter_roots
        if name.startswith(head)
    }
    trained = {"rank": rank, "alpha": alpha, "targets": targets}
    record = json.dumps(trained | ({"use_rslora": True} if use_rslora else {}))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", RECORD: record}}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / TENSORS, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            file.write(memory(tensors[name].contiguous()))


def read_record(folder: Path) -> dict | None:
    """The rank, alpha and targets that the weights were trained with; None in an adapter of another
    writer.
    """
    with safe_open(folder / TENSORS, framework="pt") as file:
        text = (file.metadata() or {}).get(RECORD)
    return json.loads(text) if text else None


def zero_tensors(model_args: ModelArgs, rank: int, targets: list[str]) -> dict[str, Tensor]:
    """The zero matrices of `saved_targets` that training does not have."""
    trained = adapter_tensors(model_args, rank, targets).keys()
    sizes = adapter_tensors(model_args, rank, saved_targets(targets))
    return {name: torch.zeros(size) for name, size in sizes.items() if name not in trained}
