"""The flags of the tools, one dataclass each (make_tiny_model's: demo/tiny/config.py). Imports no
torch, so that --help and a misspelt flag are answered at once.
"""

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_gkd.flags import setting

OUTPUT_HELP = "Folder to write; must not exist or be empty."


def num_workers_setting() -> Any:
    """Two at least: one reads while the other writes."""
    return field(
        default_factory=lambda: max(2, min(os.cpu_count() or 1, 8)),
        metadata={"help": "Processes. Default: CPUs, at least 2, at most 8."},
    )


def check_num_workers(num_workers: int) -> None:
    if num_workers < 1:
        raise ValueError(f"--num_workers {num_workers}: must be 1 or more")


@dataclass
class HfToMegatronConfig:
    hf_model: str = field(metadata={"help": "Hugging Face model folder."})
    output: str = field(metadata={"help": OUTPUT_HELP})
    tensor_model_parallel_size: int = setting(
        1, "Layout of the training to come: pads the vocabulary, cuts the chunks."
    )
    pipeline_model_parallel_size: int = setting(
        1, "Checked against the model; the checkpoint loads at any layout."
    )
    expert_model_parallel_size: int = setting(
        1, "Checked against the model; the checkpoint loads at any layout."
    )
    num_workers: int = num_workers_setting()

    def __post_init__(self):
        check_num_workers(self.num_workers)


@dataclass
class MegatronToHfConfig:
    checkpoint: str = field(
        metadata={"help": "Megatron checkpoint, or checkpoint-STEP of a training run."}
    )
    output: str = field(metadata={"help": OUTPUT_HELP})
    hf_model: str | None = setting(
        None, "Hugging Face folder: what the checkpoint itself does not hold."
    )
    adapter: list[str] = setting([], "PEFT adapters to add to the weights.")
    weight: list[float] = setting(
        [], "A factor for each adapter, a training run's own first. Default: 1."
    )
    export: Literal["merged", "adapter"] = setting(
        "merged", "Of a training run: `merged` into the base model, or the `adapter` alone."
    )
    num_workers: int = num_workers_setting()

    def __post_init__(self):
        check_num_workers(self.num_workers)


@dataclass
class MergeLoraConfig:
    hf_model: str = field(
        metadata={"help": "Hugging Face folder (or Megatron checkpoint) of the base model."}
    )
    output: str = field(metadata={"help": OUTPUT_HELP})
    adapter: list[str] = setting([], "PEFT adapter folders.")
    weight: list[float] = setting([], "A factor for each adapter. Default: 1.")
    num_workers: int = num_workers_setting()

    def __post_init__(self):
        check_num_workers(self.num_workers)


@dataclass
class LowerRankConfig:
    hf_model: str = field(
        metadata={"help": "Model folder that the adapter belongs to (its config.json is read)."}
    )
    adapter: str = field(metadata={"help": "PEFT adapter folder."})
    output: str = field(metadata={"help": "Adapter folder to write; must not exist or be empty."})
    lora_rank: int = field(metadata={"help": "The rank to come down to."})


@dataclass
class VerifyConfig:
    hf_model: str = field(metadata={"help": "Hugging Face model folder: the reference."})
    checkpoint: str | None = setting(None, "Megatron checkpoint that should hold the same model.")
    adapter: str | None = setting(None, "PEFT adapter folder.")
    merged: str | None = setting(
        None, "Hugging Face folder that should be --hf_model with --adapter added."
    )
    quick: bool = setting(
        False, "Compare manifests, headers and small files only; no tensor is read."
    )
    tensor_model_parallel_size: int = setting(1, "Layout at which the logits are computed.")
    pipeline_model_parallel_size: int = setting(1, "The same.")
    expert_model_parallel_size: int = setting(1, "The same.")
    device: Literal["auto", "cuda", "cpu"] = setting("auto", "auto: CUDA where torch sees a GPU.")
    tolerance: float = setting(1e-4, "Largest difference of a logit that passes.")
    tensor_tolerance: float = setting(
        0.0,
        "Largest difference of a weight that passes, in fp32, whatever the types. "
        "0: the same bits.",
    )

    def __post_init__(self):
        for flag in ("tolerance", "tensor_tolerance"):
            if not getattr(self, flag) >= 0:
                raise ValueError(f"--{flag} {getattr(self, flag)}: must be 0 or more")
        if self.merged and not self.adapter:
            raise ValueError("--merged is compared with --hf_model and --adapter: name the adapter")
        if self.quick and (self.merged or self.tensor_tolerance):
            flag = "merged" if self.merged else "tensor_tolerance"
            raise ValueError(
                f"--{flag} needs the tensors, and --quick reads none: leave one of them out"
            )
        if self.quick and not (self.checkpoint or self.adapter):
            raise ValueError("--quick: there is nothing to compare, name --checkpoint or --adapter")
