"""adapter_model.safetensors as checkpoints and tools write it: under per-expert names, which PEFT
loads under every version of transformers.
"""

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from megatron_gkd.families import Family
from megatron_gkd.formats.safetensors_file import (
    Run,
    Sizes,
    first_bytes,
    make_header,
    total_bytes,
    write_header,
    write_runs,
)
from megatron_gkd.lora.peft_config import TENSORS
from megatron_gkd.lora_targets import HEAD

RECORD = "megatron_gkd.lora"  # in the metadata of TENSORS: what adapter_config.json should say


def stored_names(name: str, family: Family) -> list[str]:
    """Under which names TENSORS has a tensor of the adapter. The lm_head's are there under every
    root of the family: unlike the others' PEFT 0.21 looks for them on a part of the whole model
    without its prefix.
    """
    if not name.startswith(f"{family.adapter_root}{HEAD}."):
        return [name]
    bare = name.removeprefix(family.adapter_root)
    return [f"base_model.model.{root}{bare}" for root in family.adapter_roots]


def stored_sizes(sizes: Sizes, family: Family) -> Sizes:
    """Of every tensor in TENSORS, from those of the adapter's tensors."""
    return {other: size for name, size in sizes.items() for other in stored_names(name, family)}


def adapter_header(
    stored: Sizes, *, rank: int, alpha: float, targets: list[str], use_rslora: bool = False
) -> bytes:
    """The header of TENSORS. Its metadata, which PEFT does not read, say what the tensors were
    trained with. The same arguments give the same bytes.
    """
    trained = {"rank": rank, "alpha": alpha, "targets": targets}
    record = json.dumps(trained | ({"use_rslora": True} if use_rslora else {}))
    return make_header(stored, {"format": "pt", RECORD: record}, compact=False)


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
    """Write FOLDER/adapter_model.safetensors from whole tensors, fp32."""
    sizes = stored_sizes({name: tensor.shape for name, tensor in tensors.items()}, family)
    header = adapter_header(sizes, rank=rank, alpha=alpha, targets=targets, use_rslora=use_rslora)
    write_header(folder / TENSORS, header, total_bytes(sizes))
    starts = first_bytes(sizes)
    write_runs(
        folder / TENSORS,
        [
            Run(8 + len(header) + starts[stored], tensor.flatten())
            for name, tensor in tensors.items()
            for stored in stored_names(name, family)
        ],
    )


def read_record(folder: Path) -> dict | None:
    """The rank, alpha and targets that the weights were trained with; None in an adapter of another
    writer.
    """
    with safe_open(folder / TENSORS, framework="pt") as file:
        text = (file.metadata() or {}).get(RECORD)
    return json.loads(text) if text else None
