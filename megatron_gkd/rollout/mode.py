"""The state of the training model while it writes, and the way back, whatever happens."""

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
# Not cuDNN's: it plans anew for every length, and in decoding every token makes a new one.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def _assignments() -> Iterator[Callable[[Any, str, Any], None]]:
    """Gives assign(owner, attribute, value); everything assigned is restored on exit."""
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

    Transformer Engine's attention builds its own causal mask, which left padding breaks: torch's
    takes its place (core attention has no parameters).
    """
    with _assignments() as assign, torch.no_grad(), sdpa_kernel(_KERNELS):
        for module in list(model.modules()):
            if module.training:
                assign(module, "training", False)
            if not isinstance(getattr(module, "core_attention", None), (SdpaAttention, type(None))):
                attention = SdpaAttention(module.config, module.layer_number, module.attn_mask_type)
                assign(module, "core_attention", attention)
        yield


@contextmanager
def without_sequence_parallel(model: nn.Module) -> Iterator[None]:
    """One token cannot be cut over the tensor-parallel ranks: the flags of sequence parallelism go
    off in every module and in the configuration they share; restored on exit.
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
