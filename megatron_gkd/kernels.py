"""Which of the two versions of a kernel runs: each stands in torch and in Triton, side by side."""

import importlib.util

import torch


def runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run there: on CUDA, where Triton is installed."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
