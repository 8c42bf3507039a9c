"""What the experts do with rows, in torch: the reference of expert_triton.py, and what CPUs run.

The letters are expert_order.py's; H hidden size, I width of an expert.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_gkd.model.expert_order import Order


def chosen(routing_map: Tensor, probabilities: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """bool and fp32 [T, A] -> (int32 [T, K] ascending, fp32 [T, K])."""
    num_experts = routing_map.shape[1]
    # the lowest id is the largest number
    countdown = torch.arange(num_experts, 0, -1, dtype=torch.int32, device=routing_map.device)
    largest = (routing_map * countdown).topk(num_chosen, dim=1).values
    ids = num_experts - largest
    return ids, probabilities.gather(1, ids.long())


def spread(gradient: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """[T, K] -> [T, A], zero where an expert was not chosen."""
    return gradient.new_zeros(len(ids), num_experts).scatter_(1, ids.long(), gradient)


def order_pairs(ids: Tensor, first_expert: int, num_experts: int, *, is_partial: bool) -> Order:
    """ids int32 [T, K] -> the order of the pairs of experts first_expert .. first_expert + E - 1. P
    is T K: how many of them there are, only the device knows.
    """
    local = ids.flatten() - first_expert
    if is_partial:
        local = local.where((local >= 0) & (local < num_experts), num_experts)
    by_expert, pairs = local.sort(stable=True)
    numbers = torch.arange(num_experts, dtype=local.dtype, device=ids.device)
    offsets = torch.searchsorted(by_expert, numbers, right=True, out_int32=True)
    numbers = torch.arange(len(pairs), dtype=torch.int32, device=ids.device)
    rows = torch.empty_like(numbers).scatter_(0, pairs, numbers)
    if is_partial:
        rows = rows.where(local < num_experts, -1)
    counts = offsets.diff(prepend=offsets.new_zeros(1))
    return Order(pairs.int(), rows.view(ids.shape), offsets, counts, is_partial)


def gather_rows(x: Tensor, order: Order, width: int) -> Tensor:
    """x [T, H] -> [P, width]: each row's token, zeros behind it."""
    size = x.shape[1]
    tokens = order.pairs // order.num_chosen
    if width == size:
        return x.index_select(0, tokens)
    out = x.new_empty(len(tokens), width)
    out[:, size:] = 0
    torch.index_select(x, 0, tokens, out=out[:, :size])
    return out


def sum_rows(rows: Tensor, order: Order, size: int) -> Tensor:
    """The first `size` columns of rows [P, ...] -> [T, size]: each token's rows summed in fp32."""
    total: Tensor | None = None
    if not len(rows):
        return rows.new_zeros(len(order.rows), size)
    for index in order.rows.unbind(1):
        if order.is_partial:
            term = rows[:, :size].index_select(0, index.clamp(min=0))
            term = term.where((index >= 0)[:, None], 0)
        else:
            term = rows[:, :size].index_select(0, index)
        total = term.float() if total is None else total.add_(term)
    assert total is not None
    return total.to(rows.dtype)


def activation(gate_up: Tensor, probabilities: Tensor, order: Order, width: int) -> Tensor:
    """gate_up [P, 2 I], fp32 [T, K] -> [P, width]: silu(gate) up p, in fp32 and rounded once, zeros
    behind.
    """
    size = gate_up.shape[1] // 2
    gate, up = gate_up.float().chunk(2, dim=1)
    probability = probabilities.flatten().index_select(0, order.pairs)[:, None]
    out = gate_up.new_empty(len(gate_up), width)
    out[:, size:] = 0
    out[:, :size] = F.silu(gate).mul_(up).mul_(probability)
    return out


def activation_backward(
    gate_up: Tensor, probabilities: Tensor, gradient: Tensor, order: Order
) -> tuple[Tensor, Tensor, Tensor]:
    """gradient: of the activation, the first I columns of [P, ...] -> the gradients of gate_up
    [P, 2 I] and of the probabilities [T, K], zero for other ranks' pairs, and the activation itself
    [P, I].
    """
    size = gate_up.shape[1] // 2
    gate, up = gate_up.float().chunk(2, dim=1)
    probability = probabilities.flatten().index_select(0, order.pairs)[:, None]
    gradient = gradient[:, :size].float()
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    product = silu * up
    of_rows = (gradient * product).sum(dim=1)
    gradient = gradient * probability
    of_gate_up = torch.empty_like(gate_up)
    slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
    of_gate_up[:, :size] = slope.mul_(up).mul_(gradient)
    of_gate_up[:, size:] = silu.mul_(gradient)
    index = order.rows.flatten()
    if not len(gate_up):
        of_probabilities = torch.zeros_like(probabilities)
    else:
        of_pairs = of_rows.index_select(0, index.clamp(min=0) if order.is_partial else index)
        if order.is_partial:
            of_pairs = of_pairs.where(index >= 0, 0)
        of_probabilities = of_pairs.view(probabilities.shape)
    return of_gate_up, of_probabilities, product.mul_(probability).to(gate_up.dtype)
