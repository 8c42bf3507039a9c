"""Grouped matrix products: rows sorted by expert, each expert's rows with its own matrix.

`torch.nn.functional.grouped_mm` works on CPU and GPU. It is one kernel in bfloat16 on GPUs of
compute capability 9.0 and 10.0; elsewhere torch waits for the offsets and multiplies expert by
expert.

A linear's weight lies in rows that may be longer than its inputs: behind the base's columns stand
those of LoRA's W_up, so that one product of [x, W_down x] gives the base's output and LoRA's update
(lora/grouped.py fills them). `GroupedLinear.weight` is the base's part of these rows, a view: what
reads and writes the base never sees LoRA's columns.

E experts of this rank, P rows sorted by expert, offsets int32 [E]: the end of each expert's rows.
Rows behind the last expert's take part in nothing.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_gkd.model.expert_order import Order

FAST_GROUPED_MM = ((9, 0), (10, 0))  # compute capabilities
# Columns of a weight with LoRA are a multiple of this many: 16 bytes, the least that grouped_mm
# takes. More (32, 64) may be faster and cost memory: docs/experts.md.
COLUMN_MULTIPLE = 8


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _missing(size: int, dtype: torch.dtype) -> int:
    """Columns to a multiple of 16 bytes."""
    return -size % (16 // dtype.itemsize)


def _rows_of_16_bytes(x: Tensor) -> bool:
    return x.stride(-2) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [P, in], weight [E, out, in] -> [P, out]: x W_e' for the expert e that owns the row.

    grouped_mm needs rows of a multiple of 16 bytes: other sizes are padded with zeros, which copies
    the weight, but only in models of unusual sizes.
    """
    if not len(x):  # the rank's experts got no token: no kernel to launch, zero gradients
        return x @ weight[0].T
    num_outputs = weight.shape[1]
    extra_outputs, extra_inputs = (
        _missing(size, x.dtype) for size in (num_outputs, weight.shape[2])
    )
    if extra_outputs or extra_inputs:
        x, weight = F.pad(x, (0, extra_inputs)), F.pad(weight, (0, extra_inputs, 0, extra_outputs))
    product = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    return product[:, :num_outputs] if extra_outputs else product


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """left [P, m], right [P, n] -> [E, m, n]: left' right over the rows of each expert. That of an
    expert without rows may be anything: some GPUs leave uninitialised memory there.
    """
    m, n = left.shape[1], right.shape[1]
    if not len(left):
        return left.new_zeros(len(offsets), m, n)
    if _missing(m, left.dtype) or not _rows_of_16_bytes(left):
        left = F.pad(left, (0, _missing(m, left.dtype)))
    if _missing(n, right.dtype) or not _rows_of_16_bytes(right):
        right = F.pad(right, (0, _missing(n, right.dtype)))
    return F.grouped_mm(left.T, right, offs=offsets)[:, :m, :n]


class LowProduct(Protocol):
    """LoRA on a grouped linear, as one call of it has it: the R numbers low = W_down x of a row."""

    first: int
    """The first of W_up's columns in the weight"""
    size: int
    """R"""
    parameters: tuple[Tensor, ...]

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [P, in] -> low [P, R], dropout included."""

    def backward_input(self, of_low: Tensor, offsets: Tensor, into: Tensor) -> None:
        """What the gradient of low [P, R] adds to that of x, in place: `into` [P, in]."""

    def gradients(
        self, of_low: Tensor, x: Tensor, of_output: Tensor, low: Tensor, order: Order
    ) -> tuple[Tensor, ...]:
        """Of `parameters`, from the gradients of low [P, R] and of the output [P, out]."""


class GroupedMatrices(NamedTuple):
    """What one call of a grouped linear multiplies with."""

    weight: Tensor
    """[E, out, K]: the base's columns, behind them those that the call uses of LoRA's"""
    num_inputs: int
    low: LowProduct | None

    def product(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [P, K], its columns behind `num_inputs` zero -> (output [P, out], low [P, R]). Writes
        low into x.
        """
        low = None
        if self.low is not None:
            low = self.low.forward(x[:, : self.num_inputs], offsets)
            x[:, self.low.first : self.low.first + self.low.size] = low
        return grouped_product(x, self.weight, offsets), low

    def backward_input(self, gradient: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient of the output [P, out] -> (of x [P, K], of which the columns behind
        `num_inputs` mean nothing, of low [P, R]).
        """
        of_x = grouped_product(gradient, self.weight.transpose(1, 2), offsets)
        if self.low is None:
            return of_x, None
        of_low = of_x[:, self.low.first : self.low.first + self.low.size].contiguous()
        self.low.backward_input(of_low, offsets, of_x[:, : self.num_inputs])
        return of_x, of_low


class GroupedLinear(nn.Module):
    """The frozen weight [E, out, in] of a linear of E experts. spare_columns: room for so many
    columns of LoRA; without it `add_columns` moves the weight.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        *,
        spare_columns: int = 0,
    ):
        super().__init__()
        width = in_features
        if spare_columns:
            width = round_up(in_features + spare_columns, COLUMN_MULTIPLE)
        size = (num_experts, out_features, width)
        # LoRA's columns, and what is between and behind them, are zero until they are filled
        self.rows = torch.empty(size, dtype=dtype, device=torch.cuda.current_device())
        self.rows[:, :, in_features:] = 0
        self.num_columns = in_features  # in use
        weight: Any = nn.Parameter(self.rows[:, :, :in_features], requires_grad=False)
        weight.allreduce = False  # expert-parallel: outside the ordinary data-parallel group
        self.weight: nn.Parameter = weight

    @torch.no_grad()
    def add_columns(self, number: int) -> int:
        """Room for `number` columns of another adapter -> the first one's index in `rows`."""
        first, self.num_columns = self.num_columns, self.num_columns + number
        width = round_up(self.num_columns, COLUMN_MULTIPLE)
        if width > self.rows.shape[2]:
            rows = self.rows.new_zeros(*self.rows.shape[:2], width)
            rows[:, :, : self.rows.shape[2]] = self.rows
            self.rows = rows
            self.weight.data = rows[:, :, : self.weight.shape[2]]
        return first

    def matrices(self) -> GroupedMatrices:
        """The base alone."""
        return GroupedMatrices(self.weight.detach(), self.weight.shape[2], None)

    def columns(self, first: int, number: int) -> Tensor:
        """[E, out, number] of `rows`, to be written."""
        assert self.rows.data_ptr() == self.weight.data_ptr(), "the weight was moved from its rows"
        return self.rows[:, :, first : first + number]

    def with_columns(self, low: LowProduct) -> GroupedMatrices:
        """The base and the columns of `low`; those of other adapters before them meet zeros."""
        width = round_up(low.first + low.size, COLUMN_MULTIPLE)
        return GroupedMatrices(self.rows[:, :, :width], self.weight.shape[2], low)
