"""An adapter at a lower rank: each linear's update W_up W_down is replaced by its best
approximation of that rank.

Singular values in fp64; no matrix larger than the adapter's own is formed.
"""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_gkd.lora.adapter import adapter_tensors
from megatron_gkd.lora.adapter_sum import refuse_outside, write_adapter
from megatron_gkd.lora.peft_config import CONFIG, peft_config, saved_targets
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.lora.peft_writer import save_tensors
from megatron_gkd.model.args import ModelArgs


def truncate(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """down [r, in], up [out, r] -> ([rank, in], [out, rank], the singular values of up @ down,
    falling), all fp64.

    `rank` stands for r where r is smaller.
    """
    basis_up, small_up = torch.linalg.qr(up.double())
    basis_down, small_down = torch.linalg.qr(down.double().T)
    left, values, right = torch.linalg.svd(small_up @ small_down.T)
    root = values[:rank].sqrt()
    return root[:, None] * (right[:rank] @ basis_down.T), basis_up @ left[:, :rank] * root, values


def lower_rank(
    adapter: PeftAdapter, model_args: ModelArgs, hf_model: str, rank: int, output: Path
) -> str:
    """Write `adapter` at `rank` into the folder `output`; return the table of errors. A linear
    whose own rank is lower (rank_pattern, layers without LoRA) keeps its update and is padded with
    zeros.

    Raises ValueError for a rank that is not lower, or LoRA on another model of the family.
    """
    refuse_outside(adapter)
    if not 0 < rank < adapter.rank:
        raise ValueError(
            f"--lora_rank {rank}: the adapter has rank {adapter.rank}; "
            f"choose 1 to {adapter.rank - 1}"
        )
    root, scale = model_args.family.adapter_root, adapter.alpha / adapter.rank
    sizes = adapter_tensors(model_args, rank, saved_targets(adapter.targets))
    tensors = {name: torch.zeros(size) for name, size in sizes.items()}
    lost: dict[str, float] = {}
    total: dict[str, float] = {}
    names = [name for name in sizes if ".lora_A." in name]
    for down_name in names + [f"{root}{linear}.lora_A.weight" for linear in adapter.towers]:
        if down_name not in adapter:
            continue
        up_name = down_name.replace(".lora_A.", ".lora_B.")
        (down, own_scale), (up, _) = adapter.tensor(down_name), adapter.tensor(up_name)
        new_down, new_up, values = truncate(down, up * (own_scale / scale), rank)
        missing = rank - len(new_down)
        tensors[down_name] = pad(new_down, (0, 0, 0, missing)).float()
        tensors[up_name] = pad(new_up, (0, missing)).float()
        linear = down_name.split(".lora_A.")[0].removeprefix("base_model.model.")
        lost[linear] = values[rank:].square().sum().item()
        total[linear] = values.square().sum().item()
    settings = peft_config(
        model_args.family,
        rank=rank,
        alpha=scale * rank,
        dropout=0.0,
        targets=adapter.targets,
        base_model=hf_model,
        towers=adapter.towers,
    )

    def fill(folder: Path) -> None:
        save_tensors(
            tensors,
            folder,
            model_args.family,
            rank=rank,
            alpha=scale * rank,
            targets=adapter.targets,
        )
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")

    write_adapter(output, "lower_rank", fill, [adapter.folder, Path(hf_model)])
    return (
        f"rank {adapter.rank} -> {rank}, alpha {adapter.alpha:g} -> {scale * rank:g}\n"
        + error_table(lost, total)
    )


def error_table(lost: dict[str, float], total: dict[str, float]) -> str:
    """Relative Frobenius error of the update, by kind of linear and of all; the worst linear by
    name.
    """
    kinds = sorted({name.rsplit(".", 1)[1] for name in total})
    lines = ["error of the update (Frobenius norm, relative):"]
    for kind in [*kinds, "all"]:
        names = [name for name in total if kind == "all" or name.endswith(f".{kind}")]
        whole = sum(total[name] for name in names)
        share = sum(lost[name] for name in names) / whole if whole else 0.0
        lines.append(f"  {kind:10} {share**0.5:.2e}")
    worst = max((name for name in total if total[name]), key=lambda name: lost[name] / total[name])
    return "\n".join([*lines, f"  worst: {(lost[worst] / total[worst]) ** 0.5:.2e} of {worst}"])
