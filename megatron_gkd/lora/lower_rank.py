"""An adapter at a lower rank: each linear's update W_up W_down is replaced by its best
approximation of that rank.

Singular values in fp64; no matrix larger than the adapter's own is formed.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_gkd.lora.adapter import adapter_tensors
from megatron_gkd.lora.adapter_sum import refuse_outside, write_adapter
from megatron_gkd.lora.peft_config import CONFIG, peft_config, saved_targets
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.lora.peft_writer import save_tensors
from megatron_gkd.lora_settings import scale_divisor
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
    lowered = approximate(adapter, model_args, rank)
    fill = lambda folder: write_files(lowered, adapter, model_args, hf_model, rank, folder)
    write_adapter(output, "lower_rank", fill, [adapter.folder, Path(hf_model)])
    alpha = adapter.stated_alpha
    return (
        f"rank {adapter.rank} -> {rank}, alpha {alpha:g} -> {_alpha(adapter, rank):g}\n"
        + error_table(lowered.lost, lowered.total)
    )


@dataclass
class Approximation:
    """The tensors of an adapter at another rank; of each linear the squares of what its update
    lost, and of the whole update.
    """

    tensors: dict[str, Tensor]
    lost: dict[str, float] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)


def approximate(adapter: PeftAdapter, model_args: ModelArgs, rank: int) -> Approximation:
    """`adapter` at `rank`, under per-expert names and with one scale for all its linears. Raises
    ValueError for LoRA that is no product of two matrices.
    """
    root, scale = model_args.family.adapter_root, adapter.alpha / adapter.rank
    sizes = adapter_tensors(model_args, rank, saved_targets(adapter.targets))
    found = Approximation({name: torch.zeros(size) for name, size in sizes.items()})
    others = adapter.towers + adapter.merge_only
    names = [name for name in sizes if ".lora_A." in name]
    for down_name in names + [f"{root}{linear}.lora_A.weight" for linear in others]:
        if down_name not in adapter:
            continue
        up_name = down_name.replace(".lora_A.", ".lora_B.")
        (down, own_scale), (up, _) = adapter.tensor(down_name), adapter.tensor(up_name)
        linear = down_name.split(".lora_A.")[0].removeprefix("base_model.model.")
        if down.dim() > 2 or linear.endswith("embed_tokens"):
            raise ValueError(
                f"{adapter.path}: LoRA on {linear}, which is no linear, has no lower rank here: "
                "merge it with checkpoint_tools.merge_lora"
            )
        new_down, new_up, values = truncate(down, up * (own_scale / scale), rank)
        missing = rank - len(new_down)
        found.tensors[down_name] = pad(new_down, (0, 0, 0, missing)).float()
        found.tensors[up_name] = pad(new_up, (0, missing)).float()
        found.lost[linear] = values[rank:].square().sum().item()
        found.total[linear] = values.square().sum().item()
    return found


def _alpha(adapter: PeftAdapter, rank: int) -> float:
    """That of the same scale at `rank`."""
    divisors = [scale_divisor(number, adapter.use_rslora) for number in (rank, adapter.rank)]
    return adapter.stated_alpha * (divisors[0] / divisors[1])


def write_files(
    lowered: Approximation,
    adapter: PeftAdapter,
    model_args: ModelArgs,
    hf_model: str,
    rank: int,
    folder: Path,
) -> None:
    """The two files of `adapter` at `rank` into FOLDER."""
    lora: dict[str, Any] = dict(
        rank=rank,
        alpha=_alpha(adapter, rank),
        targets=adapter.targets,
        use_rslora=adapter.use_rslora,
    )
    save_tensors(lowered.tensors, folder, model_args.family, **lora)
    settings = peft_config(
        model_args.family,
        **lora,
        dropout=0.0,
        base_model=hf_model,
        towers=adapter.towers + adapter.merge_only,
    )
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


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
