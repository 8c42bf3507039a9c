"""A rank's experts as two grouped matrix products, plugged into megatron-core's MoELayer through
`MoESubmodules.experts`.

Weights are stacked [experts, out, in], so that `torch.nn.functional.grouped_mm` works on CPU and
GPU. It is one kernel in bfloat16 on GPUs of compute capability 9.0 and 10.0; elsewhere torch waits
for the offsets and multiplies expert by expert. E experts of this rank, T dispatched tokens sorted
by expert, H hidden size.
"""

from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_gkd.startup import transformer_engine_usable

FAST_GROUPED_MM = ((9, 0), (10, 0))  # compute capabilities


class ExpertRows(NamedTuple):
    """How the T rows are divided among the experts, in the two forms that grouped products take."""

    counts: Tensor
    """int64 [E]: rows of each expert, on the CPU if megatron-core's dispatcher has copied them"""
    offsets: Tensor
    """int32 [E]: the end of each expert's rows, on their device"""

    @classmethod
    def of(cls, counts: Tensor, device: torch.device) -> "ExpertRows":
        """Does not synchronize with the device."""
        return cls(counts, counts.to(device, non_blocking=True).cumsum(0).to(torch.int32))


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [T, in] sorted by expert, weight [E, out, in], offsets [E] int32 (ends of the experts'
    rows) -> [T, out].

    grouped_mm needs rows of a multiple of 16 bytes: other sizes are padded with zeros, which copies
    the weight, but only in models of unusual sizes.
    """
    if not len(x):  # the rank's experts got no token: no kernel to launch, zero gradients
        return x @ weight[0].T
    num_outputs, num_inputs = weight.shape[1:]
    multiple = 16 // x.element_size()
    extra_outputs, extra_inputs = -num_outputs % multiple, -num_inputs % multiple
    if extra_outputs or extra_inputs:
        x, weight = F.pad(x, (0, extra_inputs)), F.pad(weight, (0, extra_inputs, 0, extra_outputs))
    product = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    return product[:, :num_outputs] if extra_outputs else product


class GroupedLinear(nn.Module):
    """y = x W_e' for the expert e that owns the row."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, dtype: torch.dtype):
        super().__init__()
        size = (num_experts, out_features, in_features)
        weight: Any = nn.Parameter(
            torch.empty(size, dtype=dtype, device=torch.cuda.current_device())
        )
        weight.allreduce = False  # expert-parallel: outside the ordinary data-parallel group
        self.weight: nn.Parameter = weight

    def forward(self, x: Tensor, rows: ExpertRows) -> Tensor:
        """x [T, in] sorted by expert -> [T, out]."""
        return grouped_product(x, self.weight, rows.offsets)


class TransformerEngineGroupedLinear(GroupedLinear):
    """The same weights through Transformer Engine's GroupedLinear; needs the package and a GPU."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, dtype: torch.dtype):
        super().__init__(num_experts, in_features, out_features, dtype)
        from transformer_engine.pytorch import GroupedLinear as Product

        self.product = Product(
            num_experts, in_features, out_features, bias=False, params_dtype=dtype, device="meta"
        )
        for expert in range(num_experts):  # views of the stacked weight, no second copy
            setattr(
                self.product,
                f"weight{expert}",
                nn.Parameter(self.weight.data[expert], requires_grad=False),
            )

    def forward(self, x: Tensor, rows: ExpertRows) -> Tensor:
        """x [T, in] sorted by expert -> [T, out]."""
        if not len(x):  # the rank's experts got no token
            return x @ self.weight[0].T
        return self.product(x, rows.counts.tolist())


def grouped_linear(experts_impl: str, device: torch.device) -> type[GroupedLinear]:
    """The module for `--experts_impl`: `auto` is Transformer Engine's if it is installed and the
    device is a GPU, else GroupedLinear.

    Raises ValueError for `te` if it cannot run.
    """
    te_usable = transformer_engine_usable(device)
    if experts_impl == "te" and not te_usable:
        raise ValueError(
            "--experts_impl te needs Transformer Engine and a GPU; use --experts_impl grouped_mm, "
            "or install it: EXTRAS=test,gpu bash launch/setup_env.sh"
        )
    use_te = te_usable and experts_impl in ("auto", "te")
    return TransformerEngineGroupedLinear if use_te else GroupedLinear


class GroupedExperts(nn.Module):
    """down(silu(gate(x)) * up(x)), weighted by the router's probability. linear: the class of its
    grouped linear layers.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
        linear: type[GroupedLinear] = GroupedLinear,
    ):
        super().__init__()
        intermediate = config.moe_ffn_hidden_size
        self.gate_up = linear(
            num_local_experts, config.hidden_size, 2 * intermediate, config.params_dtype
        )
        self.down = linear(num_local_experts, intermediate, config.hidden_size, config.params_dtype)

    def forward(self, x: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """x [T, H], tokens_per_expert [E], probs [T] fp32 -> ([T, H], no bias)."""
        rows = ExpertRows.of(tokens_per_expert, x.device)
        gate, up = self.gate_up(x, rows).chunk(2, dim=-1)
        weighted = (F.silu(gate) * up * probs.unsqueeze(-1)).to(x.dtype)
        return self.down(weighted, rows), None

    def backward_dw(self) -> None:
        """megatron-core's hook for delayed weight gradients. None are delayed here."""
