"""The state of the training model while it writes, and the way back, whatever happens."""

from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import nn

from megatron_gkd.model.attention import SdpaAttention

# megatron-core's modules copy the configuration's flag when they are built, under these names.
_SEQUENCE_PARALLEL_FLAGS = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def generation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no sequence parallelism, and attention that reads an explicit mask; all restored
    on exit.

    One token cannot be cut over the tensor-parallel ranks, so the flags of sequence parallelism go off in every module
    and in the configuration they share. Transformer Engine's attention builds its own causal mask, which left padding
    breaks: torch's takes its place (core attention has no parameters).
    """
    undo: list[tuple[Any, str, Any]] = []

    def assign(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    try:
        configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        for owner in [*configs.values(), *model.modules()]:
            for flag in _SEQUENCE_PARALLEL_FLAGS:
                if getattr(owner, flag, False):
                    assign(owner, flag, False)
        for module in list(model.modules()):
            if module.training:
                assign(module, "training", False)
            if not isinstance(getattr(module, "core_attention", None), (SdpaAttention, type(None))):
                assign(
                    module, "core_attention", SdpaAttention(module.config, module.layer_number, module.attn_mask_type)
                )
        with torch.no_grad():
            yield
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)
