"""The training model's modes for generating text, as contexts that restore it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_gkd.model.attention import SdpaAttention

# megatron-core's modules copy the configuration's flag when they are built, under these names.
_SEQUENCE_PARALLEL_FLAGS = (
    "sequence_parallel",
    "scatter_to_sequence_parallel",
    "reduce_scatter_embeddings",
)
# Not cuDNN's: it makes a plan for each length, and in decoding every token is a new length.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def _assignments() -> Iterator[Callable[[Any, str, Any], None]]:
    """Yields assign(owner, attribute, value); on exit everything assigned is restored."""
    undo: list[tuple[Any, str, Any]] = []

    def assign(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    try:
        yield assign
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)


@contextmanager
def generation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and attention that reads an explicit mask; all restored on
    exit.

    Transformer Engine's attention applies its own causal mask, which is wrong with padding on the
    left: torch's attention replaces it (core attention has no parameters).
    """
    modules: list[Any] = list(model.modules())
    with _assignments() as assign, torch.no_grad(), sdpa_kernel(_KERNELS):
        for module in modules:
            if module.training:
                assign(module, "training", False)
            if not isinstance(getattr(module, "core_attention", None), (SdpaAttention, type(None))):
                attention = SdpaAttention(module.config, module.layer_number, module.attn_mask_type)
                assign(module, "core_attention", attention)
        yield


@contextmanager
def without_sequence_parallel(model: nn.Module) -> Iterator[None]:
    """For decoding, as one token cannot be sharded: the flags of sequence parallelism are off in
    every module and in the configuration they share; restored on exit.
    """
    with _assignments() as assign:
        configs = {
            id(module.config): module.config
            for module in model.modules()
            if hasattr(module, "config")
        }
        for owner in [*configs.values(), *model.modules()]:
            for flag in _SEQUENCE_PARALLEL_FLAGS:
                if getattr(owner, flag, False):
                    assign(owner, flag, False)
        yield
