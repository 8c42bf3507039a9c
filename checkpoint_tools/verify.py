"""`[torchrun ...] -m checkpoint_tools.verify --hf_model DIR [--checkpoint DIR] [--adapter DIR]`: is
it the same model?

First tensor by tensor (bits of the checkpoint, names, shapes, types, padding, the adapter's own
records), then logits in fp32 on text, audio and image rows: our towers and Megatron decoder, read
from the checkpoint (or the folder) at the given layout, against transformers and peft (in memory on
the CPU, 4 bytes a parameter). Prints a table, names the first layer that parts; the exit status is
1 on any mismatch, 2 when there is nothing to compare. Without torchrun it is one process.
"""

import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below
    startup.quiet_imports()

import torch

from checkpoint_tools.command import parse_flags, refusals_in_one_line
from megatron_gkd.flags import setting
from megatron_gkd.parallel import destroy, initialize, resolve_device
from megatron_gkd.verify.models import report_logits
from megatron_gkd.verify.tensors import Folders, report_tensors

_TIMEOUT = timedelta(hours=6)  # ranks wait while rank 0 runs transformers' model on the CPU


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
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    device: str = setting("auto", "auto, cuda or cpu.")
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

    @property
    def folders(self) -> Folders:
        others = (self.checkpoint, self.adapter, self.merged)
        return Folders(Path(self.hf_model), *(Path(name) if name else None for name in others))


def verify(config: VerifyConfig) -> bool:
    """The whole comparison, on every rank. Raises ValueError where there is nothing to compare, or
    no such layout.
    """
    check_tensors = partial(report_tensors, config.folders, config.tensor_tolerance, config.quick)
    if config.quick:
        return os.environ.get("RANK", "0") != "0" or check_tensors()
    parallel = initialize(
        resolve_device(config.device),
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        timeout=_TIMEOUT,
    )
    passed = [parallel.rank == 0 and check_tensors()]
    torch.distributed.broadcast_object_list(passed)
    try:
        return report_logits(config.folders, config.tolerance, parallel) and passed[0]
    except (ValueError, FileNotFoundError) as error:
        if parallel.rank == 0:
            print(f"the logits cannot be compared: {error}")
        return False


def main() -> None:
    with refusals_in_one_line():
        config = parse_flags(VerifyConfig, __doc__)
        passed = verify(config)
    if torch.distributed.is_initialized():
        destroy()
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
