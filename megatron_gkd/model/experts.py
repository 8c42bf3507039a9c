"""A rank's experts as one function of its tokens, plugged into megatron-core's MoELayer through
`MoESubmodules.experts`.

    out_t = sum over the pairs (t, e) of  D_e (p_te silu(G_e x_t) * U_e x_t)

of token t and its chosen experts e on this rank: G_e, U_e (gate and up, one matrix) and D_e (down)
are each a base W and LoRA, W + s W_up W_down. dispatcher.py brings the tokens and the order of the
pairs. The letters are expert_order.py's; H hidden size, I width of an expert, R of a linear LoRA's
low numbers.
"""

from types import ModuleType
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_gkd.kernels import runs_triton
from megatron_gkd.model.expert_order import Order, order_of
from megatron_gkd.model.grouped import GroupedLinear, GroupedMatrices


def select_kernels(device: torch.device) -> ModuleType:
    """The module of the rows' functions: expert_triton on CUDA where Triton is installed, otherwise
    expert_torch.
    """
    if runs_triton(device):
        from megatron_gkd.model import expert_triton

        return expert_triton
    from megatron_gkd.model import expert_torch

    return expert_torch


def check_experts_impl(name: str) -> None:
    """Raise ValueError for `--experts_impl te`."""
    if name == "te":
        raise ValueError(
            "--experts_impl te: Transformer Engine's grouped linear cannot be part of the experts' "
            "block, where LoRA stands in columns behind the base; use --experts_impl auto "
            "or grouped_mm, which are the same"
        )


class ExpertBlock(torch.autograd.Function):
    """The formula above, with the gradients of the tokens, the probabilities and LoRA's matrices.

    Forward, P rows sorted by expert:

        x_ext   [P, H + R]   the row's token, and low = W_down x (dropout on x) behind it
        h       [P, 2 I]     x_ext [W, s W_up]': gate and up
        a_ext   [P, I + R]   p silu(gate) * up, and its low numbers behind it
        y       [P, H]       a_ext [W, s W_up]'
        out     [T, H]       a token's rows of y added up

    Backward, from g [T, H], with dy [P, H] a copy of g for each row:

        da_ext = dy [W, s W_up]; behind da stands dlow, which adds dlow W_down (dropped) to da
        dgate = da p up (sigma + silu (1 - sigma)), dup = da p silu, dp = sum of da silu up
        dx_ext = dh [W, s W_up]; dlow adds to dx as above; the token's gradient is its rows' sum
        dW_up = s dout' low, dW_down = dlow' (dropped input), over the rows of each expert

    Saved: the tokens x [T, H], p [T, K], h, both low [P, R], the order's indices. x_ext and a_ext
    are made again; low, 1 % of h's bytes, is not, since that would read x_ext once more. Sums are
    fp32 within a kernel; what lies between them is in the activations' dtype, p is fp32. No
    collectives; the host waits where grouped_mm does (model/grouped.py).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        probabilities: Tensor,
        order: Order,
        gate_up: GroupedMatrices,
        down: GroupedMatrices,
        *parameters: Tensor,
    ) -> Tensor:
        """x [T, H], fp32 [T, K] -> [T, H], this rank's part of the sum. parameters: those of both
        linears' LoRA, for autograd alone.
        """
        kernels = select_kernels(x.device)
        x_ext = kernels.gather_rows(x, order, gate_up.weight.shape[2])
        hidden, low_in = gate_up.product(x_ext, order.offsets)
        del x_ext
        a_ext = kernels.activation(hidden, probabilities, order, down.weight.shape[2])
        y, low_out = down.product(a_ext, order.offsets)
        del a_ext
        saved = (x, probabilities, hidden, low_in, low_out, *order.tensors)
        ctx.save_for_backward(*saved)
        ctx.is_partial = order.is_partial
        ctx.gate_up, ctx.down = gate_up, down
        return kernels.sum_rows(y, order, y.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, probabilities, hidden, low_in, low_out, *indices = ctx.saved_tensors
        order = order_of(indices, is_partial=ctx.is_partial)
        gate_up, down, kernels = ctx.gate_up, ctx.down, select_kernels(x.device)
        of_gate_up: tuple[Tensor | None, ...]
        of_down: tuple[Tensor | None, ...]
        trains = any(ctx.needs_input_grad[5:])

        of_y = kernels.gather_rows(gradient.contiguous(), order, gradient.shape[1])
        of_a, of_low = down.backward_input(of_y, order.offsets)
        of_hidden, of_probabilities, a = kernels.activation_backward(
            hidden, probabilities, of_a, order
        )
        del of_a
        of_down = gradients(down, of_low, a, of_y, low_out, order, trains)
        del of_y, a
        of_x_ext, of_low = gate_up.backward_input(of_hidden, order.offsets)
        of_x = kernels.sum_rows(of_x_ext, order, x.shape[1])
        del of_x_ext
        of_gate_up = gradients(
            gate_up,
            of_low,
            kernels.gather_rows(x, order, x.shape[1]) if trains and gate_up.low else x,
            of_hidden,
            low_in,
            order,
            trains,
        )
        return of_x, of_probabilities, None, None, None, *of_gate_up, *of_down


def gradients(
    of: GroupedMatrices,
    of_low: Tensor | None,
    x: Tensor,
    of_output: Tensor,
    low: Tensor | None,
    order: Order,
    trains: bool,
) -> tuple[Tensor | None, ...]:
    """Of the linear's LoRA; None for each parameter where it is frozen."""
    if of.low is None or of_low is None or low is None:
        return ()
    if not trains:
        return (None,) * len(of.low.parameters)
    return of.low.gradients(of_low, x, of_output, low, order)


class GroupedExperts(nn.Module):
    """The experts of a layer on this rank. spare_columns: of gate_up and of down, see
    `GroupedLinear`.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
        spare_columns: tuple[int, int] = (0, 0),
    ):
        super().__init__()
        hidden, intermediate = config.hidden_size, config.moe_ffn_hidden_size
        assert intermediate is not None
        dtype, of_gate_up, of_down = config.params_dtype, *spare_columns
        self.gate_up: Any = GroupedLinear(
            num_local_experts, hidden, 2 * intermediate, dtype, spare_columns=of_gate_up
        )
        self.down: Any = GroupedLinear(
            num_local_experts, intermediate, hidden, dtype, spare_columns=of_down
        )

    def forward(self, x: Tensor, order: Order, probabilities: Tensor) -> tuple[Tensor, None]:
        """x [T, H], probabilities fp32 [T, K] -> (this rank's part of the sum [T, H], no bias).
        megatron-core passes on what the dispatcher gave it.
        """
        gate_up, down = self.gate_up.matrices(), self.down.matrices()
        parameters = [p for of in (gate_up, down) if of.low for p in of.low.parameters]
        return ExpertBlock.apply(x, probabilities, order, gate_up, down, *parameters), None

    def backward_dw(self) -> None:
        """megatron-core's hook for delayed weight gradients. None are delayed here."""
