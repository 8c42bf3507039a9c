"""LoRA on the experts' linears, inside the base's grouped product: [W, s W_up] [x, W_down x].

s W_up lies in the activations' dtype in columns of the base's weight (model/grouped.py), and W_down
beside it: both are written when a parameter has changed since, which its version counter tells:
once after an optimizer's update or the loading of an adapter, not once a call. Each adapter has
columns of its own, so the toggle between student and teacher moves nothing. A call reads the weight
up to its adapter's last column: the base alone (the teacher) reads its own columns, in the very
product that it would run without LoRA; an adapter behind another's columns meets zeros there.

E experts, r rank, P projections of a fused linear, R = P r rounded up to 8 (grouped_mm wants rows
of 16 bytes), T rows sorted by expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_gkd.lora.dropout import Drop
from megatron_gkd.lora.low_product import select_kernels
from megatron_gkd.lora.slots import LoraModule, LoraSlot, zeros
from megatron_gkd.model.expert_order import Order
from megatron_gkd.model.grouped import (
    GroupedLinear,
    GroupedMatrices,
    grouped_outer,
    grouped_product,
    round_up,
)

GATE_UP, DOWN = ("gate_proj", "up_proj"), ("down_proj",)


def num_columns(names: Sequence[str], rank: int, targets: Sequence[str]) -> int:
    """R of an adapter on `targets` for the linear that holds the projections `names`."""
    return round_up(rank * len([name for name in names if name in targets]), 8)


def versions_of(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """What changes when a parameter is written or moved. torch counts its own writes, but for fused
    optimizers (optimizer.py does) and for what goes through `.data`.
    """
    return [(parameter._version, parameter.data_ptr()) for parameter in parameters]


class Layout:
    """A slot's matrices as its linear multiplies with them."""

    def __init__(self, first: int, down: Tensor, size: int):
        self.first = first  # of W_up's columns
        self.size = size  # R
        self.down = down  # [E, R, in], its rows behind P r zero
        self.versions: list[tuple[int, int]] = []


@dataclass(frozen=True)
class ActiveLow:
    """One call of a slot: see model/grouped.py's LowProduct."""

    first: int
    size: int
    parameters: tuple[Tensor, ...]
    """W_down [E, r, in] of each projection, then W_up [E, out, r]"""
    versions: list[tuple[int, int]]
    """Of the parameters in the forward pass"""
    down: Tensor
    drop: Drop | None
    blocks: tuple[tuple[slice, slice], ...]
    """Of each projection its rows in the linear's output, and its low numbers"""
    scale: float

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [T, in] -> [T, R]."""
        if self.drop is None or not len(x):
            return grouped_product(x, self.down, offsets)
        return select_kernels(x.device).low_forward(x, self.down, self.drop, offsets)

    def backward_input(self, of_low: Tensor, offsets: Tensor, into: Tensor) -> None:
        """Adds the gradient of low [T, R] to that of x, in place. Raises RuntimeError where a
        parameter was changed since the forward pass, as autograd does for what it has saved.
        """
        if self.versions != versions_of(self.parameters):
            raise RuntimeError("LoRA's parameters were changed between a forward and its backward")
        if not len(into):
            return
        if self.drop is None:
            into += grouped_product(of_low, self.down.transpose(1, 2), offsets)
        else:
            kernels = select_kernels(into.device)
            kernels.low_backward_input(of_low, self.down, self.drop, offsets, into=into)

    def gradients(
        self, of_low: Tensor, x: Tensor, of_output: Tensor, low: Tensor, order: Order
    ) -> tuple[Tensor, ...]:
        """fp32, of `parameters`; zero for experts without rows, where some GPUs' grouped_mm leaves
        uninitialised memory.
        """
        offsets, has_no_row = order.offsets, (order.counts == 0)[:, None, None]
        of_up = grouped_outer(of_output, low, offsets).masked_fill_(has_no_row, 0)
        if self.drop is None or not len(x):
            of_down = grouped_outer(of_low, x, offsets)
        else:
            kernels = select_kernels(x.device)
            of_down = kernels.low_backward_weight(of_low, x, self.drop, offsets)
        of_down.masked_fill_(has_no_row, 0)
        downs = [of_down[:, low_numbers].float() for _, low_numbers in self.blocks]
        ups = [
            of_up[:, rows, low_numbers].float() * self.scale for rows, low_numbers in self.blocks
        ]
        return (*downs, *ups)


class LoraGrouped(LoraModule):
    """LoRA on an expert linear (gate and up fused, or down). W_down [E, r, in] and W_up [E, out/P,
    r], local to the expert's rank. `names`: the projections that the base holds, in its order.
    """

    def __init__(self, base: GroupedLinear, names: Sequence[str], *, salt: int = 0):
        super().__init__(base, salt=salt)
        self.names = names
        self._layouts: dict[LoraSlot, Layout] = {}

    def fill(self, slot: LoraSlot, targets: Sequence[str]) -> None:
        num_experts, out_features, in_features = self.base.weight.shape
        marks = dict(
            allreduce=False,  # reduced over the experts' own data-parallel group
            tensor_model_parallel=True,  # a rank's experts are its own: all count in the norm
        )
        for name in targets:
            slot.down[name] = zeros(num_experts, slot.rank, in_features, **marks)
            slot.up[name] = zeros(num_experts, out_features // len(self.names), slot.rank, **marks)
        size = num_columns(self.names, slot.rank, targets)
        down = self.base.weight.new_zeros(num_experts, size, in_features)
        self._layouts[slot] = Layout(self.base.add_columns(size), down, size)

    def matrices(self) -> GroupedMatrices:
        """What this call multiplies with, for GroupedExperts; draws the seed of its dropout."""
        slot = self.slot
        if slot is None:
            return self.base.matrices()
        layout = self._layouts[slot]
        parameters = (*slot.down.values(), *slot.up.values())
        self._refresh(layout, slot, parameters)
        low = ActiveLow(
            layout.first,
            layout.size,
            parameters,
            layout.versions,
            layout.down,
            self.drop_of(slot),
            tuple(self._blocks(slot)),
            slot.scale,
        )
        return self.base.with_columns(low)

    @torch.no_grad()
    def _refresh(self, layout: Layout, slot: LoraSlot, parameters: Sequence[Tensor]) -> None:
        """Write the columns and W_down again if a parameter is not what it was."""
        versions = versions_of(parameters)
        if versions == layout.versions:
            return
        layout.versions = versions
        columns = self.base.columns(layout.first, layout.size)
        for (rows, low_numbers), down, up in zip(
            self._blocks(slot), slot.down.values(), slot.up.values()
        ):
            layout.down[:, low_numbers].copy_(down)
            columns[:, rows, low_numbers].copy_(up * slot.scale)

    def _blocks(self, slot: LoraSlot) -> list[tuple[slice, slice]]:
        height, rank = self.base.weight.shape[1] // len(self.names), slot.rank
        firsts = [height * self.names.index(name) for name in slot.down]
        return [
            (slice(first, first + height), slice(number * rank, (number + 1) * rank))
            for number, first in enumerate(firsts)
        ]

    def fused(self, slot: LoraSlot) -> tuple[Tensor, Tensor]:
        """W_down [E, R, in], and W_up [E, out, R]: each projection's rows in its own block of
        columns; fp32, for rollouts.
        """
        num_experts, out_features, _ = self.base.weight.shape
        size = self._layouts[slot].size
        down = torch.cat(list(slot.down.values()), dim=1)
        up = down.new_zeros(num_experts, out_features, size)
        for (rows, low_numbers), matrix in zip(self._blocks(slot), slot.up.values()):
            up[:, rows, low_numbers] = matrix
        return F.pad(down, (0, 0, 0, size - down.shape[1])), up
