"""A rank's experts as two grouped products, plugged into megatron-core's MoELayer through
`MoESubmodules.experts`.

Weights are stacked [experts, out, in], so `torch.nn.functional.grouped_mm` serves CPU and GPU
alike. It is one kernel in bfloat16 on GPUs of compute capability 9.0 and 10.0; elsewhere torch
waits for the offsets and multiplies expert by expert. E experts of this rank, T dispatched tokens
sorted by expert, H hidden size, I intermediate size of an expert.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_gkd.startup import transformer_engine_usable

FAST_GROUPED_MM = ((9, 0), (10, 0))  # compute capabilities


class ExpertRows(NamedTuple):
    """Which of the T rows belong to which expert, in both forms that grouped products ask for."""

    counts: Tensor
    """int64 [E], on the CPU where megatron-core's dispatcher has brought them there already"""
    offsets: Tensor
    """int32 [E], on the device of the rows: the end of each expert's"""

    @classmethod
    def of(cls, counts: Tensor, device: torch.device) -> "ExpertRows":
        """Does not wait for the device."""
        return cls(counts, counts.to(device, non_blocking=True).cumsum(0).to(torch.int32))


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [T, in] sorted by expert, weight [E, out, in], offsets [E] int32 (ends of the experts'
    rows) -> [T, out].

    grouped_mm wants rows of a multiple of 16 bytes: other sizes are padded with zeros (a copy of
    the weight, on small or odd models only).
    """
    if not len(
        x
    ):  # a rank whose experts got no token: no kernel to start, and gradients that are zero
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
        self.weight = nn.Parameter(
            torch.empty(
                num_experts,
                out_features,
                in_features,
                dtype=dtype,
                device=torch.cuda.current_device(),
            )
        )
        self.weight.allreduce = False  # expert-parallel: outside the ordinary data-parallel group

    def forward(self, x: Tensor, rows: ExpertRows) -> Tensor:
        """x [T, in] sorted by expert -> [T, out]."""
        return grouped_product(x, self.weight, rows.offsets)


class TransformerEngineGroupedLinear(GroupedLinear):
    """The same weights through Transformer Engine's GroupedLinear (a GPU and its package are
    needed).
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int, dtype: torch.dtype):
        super().__init__(num_experts, in_features, out_features, dtype)
        from transformer_engine.pytorch import GroupedLinear as Product

        self.product = Product(
            num_experts, in_features, out_features, bias=False, params_dtype=dtype, device="meta"
        )
        for expert in range(num_experts):  # views of the stacked weight: nothing is held twice
            setattr(
                self.product,
                f"weight{expert}",
                nn.Parameter(self.weight.data[expert], requires_grad=False),
            )

    def forward(self, x: Tensor, rows: ExpertRows) -> Tensor:
        """As GroupedLinear's."""
        if not len(x):  # a rank whose experts got no token
            return x @ self.weight[0].T
        return self.product(x, rows.counts.tolist())


def grouped_linear(experts_impl: str, device: torch.device) -> type[GroupedLinear]:
    """The module for `--experts_impl`: `auto` takes Transformer Engine's where it is installed and
    a GPU is there.

    Raises ValueError for `te` where it cannot run.
    """
    te_usable = transformer_engine_usable(device)
    if experts_impl == "te" and not te_usable:
        raise ValueError(
            "--experts_impl te needs Transformer Engine and a GPU; use --experts_impl grouped_mm, or install it: EXTRAS=test,gpu bash launch/setup_env.sh"
        )
    return (
        TransformerEngineGroupedLinear
        if te_usable and experts_impl in ("auto", "te")
        else GroupedLinear
    )


class GroupedExperts(nn.Module):
    """down(silu(gate(x)) * up(x)), weighted by the router's probability. `linear` is the grouped
    linear it is made of.
    """

    def __init__(
        self,
        num_local_experts: int,
        config,
        pg_collection=None,
        name: str | None = None,
        linear: type = GroupedLinear,
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
        """megatron-core's hook for delayed weight gradients: the base is frozen and LoRA's are
        computed in place.
        """
