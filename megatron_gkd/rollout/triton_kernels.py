"""One token's layer in Triton kernels, for CUDA: the functions of torch_kernels.py in 13 launches.

    qkv       products with W and W_down of few rows in one kernel; then, a program a head and 16
              rows, W_up, QK-norm, rotary and the write into the cache
    attend    a program a row, group and part of its keys; a second kernel joins the parts
    output    as the products above, in parts of the sum that add_norm adds up
    add_norm  a program a row: the residual, the parts, W_up, RMSNorm
    route     the router's product is cuBLAS's; top-k and softmax, a program a row
    experts   the order of the pairs with W_down; gate and up with W_up, activation, probability;
              W_down; down with W_up

Few rows are bound by the experts' weights: each weight of a chosen expert is read once. W_down's
products stand apart, because every tile of the large ones would read W_down again. Sums and what
stays in a kernel are fp32; what goes from one to the next is in the activations' dtype, but for the
parts of the sums of qkv and output.
"""

import math

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from megatron_gkd.rollout.cache import KeyValueCache, Rows
from megatron_gkd.rollout.triton_attention import attention_kernel, join_kernel, rotate_kernel
from megatron_gkd.rollout.triton_experts import (
    down_kernel,
    gate_up_kernel,
    low_kernel,
    order_kernel,
    route_kernel,
)
from megatron_gkd.rollout.triton_linear import add_norm_kernel, linear_kernel, sum_kernel
from megatron_gkd.rollout.triton_sampling import best_of, scores_of
from megatron_gkd.rollout.weights import Delta, LayerWeights, Linear, Routing, Sizes

__all__ = [
    "add_norm",
    "attend",
    "best_of",
    "experts",
    "output",
    "qkv",
    "route",
    "scores_of",
    "whole",
]

# Lengths, indices and the cache's place are read on the device: a graph can be replayed.
CAPTURABLE = True
QKV_PARTS, OUTPUT_PARTS = 2, 4  # of the sum over a product's inputs: enough programs for the GPU
# (BLOCK_N, BLOCK_K, warps, stages)
DENSE_TILE, GATE_UP_TILE, DOWN_TILE = (32, 128, 4, 4), (32, 128, 4, 4), (64, 128, 4, 4)
KEY_BLOCK, KEY_STAGES, KEY_WARPS = 64, 2, 4
ORDER_BLOCK = 64
MOST_KEY_PARTS = 32
LOW_BLOCK = 64  # low numbers of qkv that a program multiplies with W_up at a time


def _block(size: int, largest: int) -> int:
    """The largest power of two that divides `size`, up to `largest`."""
    return math.gcd(size, largest)


def _inputs(block: int, x: Tensor) -> int:
    """As many bytes of a tile's inputs as `block` numbers of 16 bits."""
    return block * 2 // x.element_size()


def _products(x: Tensor, of: Linear, parts: int) -> Tensor:
    """x [B, in] -> fp32 [B, parts, out + R]: the parts' sum is W x, and behind it W_down x."""
    num_rows, num_inputs = x.shape
    num_outputs, num_low = of.weight.shape[0], 0 if of.down is None else of.down.shape[0]
    parts = math.gcd(parts, num_inputs // 16)
    block_n, block_k, num_warps, num_stages = DENSE_TILE
    width, block = num_outputs + num_low, _block(num_outputs, block_n)
    out = x.new_empty(num_rows, parts, width, dtype=torch.float32)
    block_m = min(64, max(16, triton.next_power_of_2(num_rows)))
    linear_kernel[width // block, parts, triton.cdiv(num_rows, block_m)](
        x,
        of.weight,
        of.weight if of.down is None else of.down,
        out,
        num_rows,
        num_outputs,
        width,
        num_inputs,
        parts,
        block_m,
        block,
        _block(num_inputs // parts, _inputs(block_k, x)),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


def qkv(
    x: Tensor,
    layer: LayerWeights,
    rotation: tuple[Tensor, Tensor],
    rows: Rows,
    cache: KeyValueCache,
    index: int,
    num_written: int,
    sizes: Sizes,
) -> Tensor:
    """As in torch_kernels; the number of written tokens is read from `rows.step`."""
    products = _products(x, layer.qkv, QKV_PARTS)
    heads = sizes.groups * (sizes.queries + 2)
    up = layer.qkv.up
    query = x.new_empty(len(x), sizes.groups, sizes.queries, sizes.head_dim)
    rotate_kernel[heads, triton.cdiv(len(x), 16)](
        products,
        products if up is None else up,
        layer.qk_norm,
        *rotation,
        rows.slots,
        rows.step,
        *cache.table,
        query,
        len(x),
        sizes.eps,
        index,
        sizes.queries,
        sizes.groups,
        sizes.head_dim,
        products.shape[2],
        0 if up is None else len(up),
        16 if up is None else max(16, min(LOW_BLOCK, triton.next_power_of_2(len(up)))),
        products.shape[1],
        num_warps=4,
    )
    return query


def attend(
    query: Tensor,
    rows: Rows,
    cache: KeyValueCache,
    index: int,
    num_written: int,
    key_mask: Tensor | None,
    sizes: Sizes,
) -> Tensor:
    """As in torch_kernels; lengths are read from `rows`, not from `key_mask`."""
    programs = len(query) * sizes.groups
    # About a thousand programs, however few rows.
    splits = min(MOST_KEY_PARTS, max(2, triton.next_power_of_2(triton.cdiv(768, programs))))
    contexts = torch.empty(
        programs, splits, 16, sizes.head_dim, dtype=torch.float32, device=query.device
    )
    tops, totals = torch.empty(2, programs, splits, 16, dtype=torch.float32, device=query.device)
    attention_kernel[programs, splits](
        query,
        rows.prompts,
        rows.prompt_lengths,
        rows.slots,
        rows.step,
        *cache.table,
        contexts,
        tops,
        totals,
        sizes.head_dim**-0.5 / math.log(2.0),
        index,
        sizes.queries,
        sizes.groups,
        sizes.head_dim,
        splits,
        _block(_inputs(KEY_BLOCK * 128, query) // sizes.head_dim, KEY_BLOCK),
        num_warps=KEY_WARPS,
        num_stages=KEY_STAGES,
    )
    context = query.new_empty(len(query), sizes.groups * sizes.queries * sizes.head_dim)
    join_kernel[programs, sizes.queries](
        contexts, tops, totals, context, sizes.queries, sizes.head_dim, splits, num_warps=2
    )
    return context


def output(context: Tensor, layer: LayerWeights) -> Delta:
    """[B, G Q D] -> this rank's part of what attention adds."""
    return Delta(_products(context, layer.output, OUTPUT_PARTS), layer.output.up)


def add_norm(x: Tensor, delta: Delta, weight: Tensor, eps: float) -> Tensor:
    """x [B, H] += delta, in place -> its RMSNorm [B, H]."""
    num_rows, hidden = x.shape
    normed = torch.empty_like(x)
    parts, up = delta
    add_norm_kernel[(num_rows,)](
        x,
        parts,
        parts if up is None else up,
        weight,
        normed,
        eps,
        hidden,
        parts.shape[2],
        parts.shape[1],
        0 if up is None else len(up),
        triton.next_power_of_2(hidden),
        num_warps=8,
    )
    return normed


def whole(delta: Delta, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """The sum of the parts, [B, H]."""
    parts, up = delta
    out = torch.empty(len(parts), hidden_size, dtype=dtype, device=parts.device)
    sum_kernel[(len(parts),)](
        parts,
        parts if up is None else up,
        out,
        hidden_size,
        parts.shape[2],
        parts.shape[1],
        0 if up is None else len(up),
        triton.next_power_of_2(hidden_size),
        num_warps=8,
    )
    return out


def route(x: Tensor, layer: LayerWeights, sizes: Sizes, share: tuple[int, int]) -> Routing:
    """As in torch_kernels."""
    if x.is_cuda and x.dtype != torch.float32:  # products of bf16 numbers are exact in fp32
        logits = torch.mm(x, layer.router.T, out_dtype=torch.float32)
    else:
        logits = F.linear(x.float(), layer.router.float())
    num_chosen = sizes.experts_per_token
    ids = torch.empty(len(x), num_chosen, dtype=torch.int32, device=x.device)
    probabilities = torch.empty(len(x), num_chosen, dtype=torch.float32, device=x.device)
    route_kernel[(len(x),)](
        logits,
        ids,
        probabilities,
        sizes.first_expert,
        sizes.num_local_experts,
        *share,
        sizes.num_experts,
        num_chosen,
        triton.next_power_of_2(sizes.num_experts),
        triton.next_power_of_2(num_chosen),
        sizes.renormalize,
        num_warps=1,
    )
    is_partial = sizes.num_local_experts < sizes.num_experts or share[1] > 1
    return Routing(ids, probabilities, is_partial)


def experts(x: Tensor, layer: LayerWeights, routing: Routing, sizes: Sizes) -> Delta:
    """x [B, H] -> [B, K, H]: what each chosen expert of this rank gives; zeros for the others."""
    num_rows, num_chosen = routing.ids.shape
    num_pairs, num_experts, hidden = num_rows * num_chosen, sizes.num_local_experts, sizes.hidden
    width = layer.down.weight.shape[2]
    gate_up_rank = 0 if layer.gate_up.down is None else layer.gate_up.down.shape[1]
    down_rank = 0 if layer.down.down is None else layer.down.down.shape[1]
    order = torch.empty(num_pairs, dtype=torch.int32, device=x.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=x.device)
    low = x.new_empty(num_pairs, max(gate_up_rank, 1))
    order_blocks = triton.cdiv(num_pairs, ORDER_BLOCK)
    order_kernel[(order_blocks + 1 + (num_pairs if gate_up_rank else 0),)](
        routing.ids,
        order,
        offsets,
        num_pairs,
        order_blocks,
        num_experts,
        x,
        x if layer.gate_up.down is None else layer.gate_up.down,
        low,
        num_chosen,
        hidden,
        gate_up_rank,
        ORDER_BLOCK,
        triton.next_power_of_2(num_experts + 1),
        _low_block(hidden, gate_up_rank),
        num_warps=8,
    )
    weighted = x.new_empty(num_pairs, width)
    block_n, block_k, num_warps, num_stages = GATE_UP_TILE
    block_n, block_k = _block(width, block_n), _block(hidden, _inputs(block_k, x))
    gate_up_kernel[num_experts, width // block_n](
        x,
        layer.gate_up.weight,
        low,
        x if layer.gate_up.up is None else layer.gate_up.up,
        order,
        offsets,
        routing.probabilities,
        weighted,
        num_chosen,
        hidden,
        width,
        gate_up_rank,
        layer.gate_up.weight.stride(1),
        block_n,
        block_k,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    low = x.new_empty(num_pairs, max(down_rank, 1))
    if layer.down.down is not None:
        low_kernel[(num_pairs,)](
            routing.ids,
            num_experts,
            weighted,
            layer.down.down,
            low,
            width,
            down_rank,
            _low_block(width, down_rank),
            num_warps=8,
        )
    make = x.new_zeros if routing.is_partial else x.new_empty
    out = make(num_rows, num_chosen, hidden)
    block_n, block_k, num_warps, num_stages = DOWN_TILE
    block_n, block_k = _block(hidden, block_n), _block(width, _inputs(block_k, x))
    down_kernel[num_experts, hidden // block_n](
        weighted,
        layer.down.weight,
        low,
        x if layer.down.up is None else layer.down.up,
        order,
        offsets,
        out,
        hidden,
        width,
        down_rank,
        layer.down.weight.stride(1),
        block_n,
        block_k,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return Delta(out, None)


def _low_block(width: int, rank: int) -> int:
    """Columns that a program of low_of reads at a time."""
    return min(triton.next_power_of_2(width), max(16, 16384 // max(rank, 1)))
