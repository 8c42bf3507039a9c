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
from datetime import timedelta
from functools import partial
from pathlib import Path

from checkpoint_tools.command import parse_flags, refusals_in_one_line
from checkpoint_tools.settings import VerifyConfig
from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below, which take seconds
    CONFIG = parse_flags(VerifyConfig, __doc__)
    startup.quiet_imports()

import torch

from megatron_gkd.parallel import destroy, initialize, resolve_device
from megatron_gkd.verify.models import report_logits
from megatron_gkd.verify.tensors import Folders, report_tensors

_TIMEOUT = timedelta(hours=6)  # ranks wait while rank 0 runs transformers' model on the CPU


def verify(config: VerifyConfig) -> bool:
    """The whole comparison, on every rank. Raises ValueError where there is nothing to compare, or
    no such layout.
    """
    folders = folders_of(config)
    check_tensors = partial(report_tensors, folders, config.tensor_tolerance, config.quick)
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
        return report_logits(folders, config.tolerance, parallel) and passed[0]
    except (ValueError, FileNotFoundError) as error:
        if parallel.rank == 0:
            print(f"the logits cannot be compared: {error}")
        return False


def folders_of(config: VerifyConfig) -> Folders:
    others = (config.checkpoint, config.adapter, config.merged)
    return Folders(Path(config.hf_model), *(Path(name) if name else None for name in others))


def main(config: VerifyConfig) -> None:
    with refusals_in_one_line():
        passed = verify(config)
    if torch.distributed.is_initialized():
        destroy()
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main(CONFIG)
