"""The lm_head of a few rows, with the active adapter's LoRA."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_gkd.lora.modules import has_head_lora


class Head:
    """On the last stage. Products are fp32: those of bf16 numbers are exact in it, so a GPU reads
    the weight as it is; elsewhere a weight of another dtype is copied to fp32, once.
    """

    def __init__(self, model: Any):
        self.model = model
        weight = model.output_layer.weight.detach()
        self.weight = weight if weight.is_cuda else weight.float()
        self.num_columns = len(weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, H] -> fp32 [B, V/TP], new memory. No collectives."""
        if self.weight.dtype == torch.float32:
            logits = hidden.float() @ self.weight.T
        else:
            logits = torch.mm(hidden, self.weight.T, out_dtype=torch.float32)
        slot = self.model.head_lora.slot if has_head_lora(self.model) else None
        if slot is not None:
            (down,), (up,) = slot.down.values(), slot.up.values()
            logits.addmm_(F.linear(hidden.float(), down), up.T, alpha=slot.scale)
        return logits
