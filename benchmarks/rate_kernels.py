"""What benchmarks/rates.py times: products, attention, and the package's own kernels around them,
each with the FLOPs or bytes that the planner counts for it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_gkd.loss import Divergence, linear_divergence
from megatron_gkd.model import experts, norm_rotary
from megatron_gkd.model.dispatcher import Chosen
from megatron_gkd.model.grouped import grouped_outer, grouped_product
from megatron_gkd.plan.step_work import LOSS_PASSES, UPDATE_PASSES

Run = Callable[[], Any]


class Timed(NamedTuple):
    """run once: so much of `amount` (FLOPs, or bytes). size: of the point, None without points."""

    entry: str
    size: float | None
    amount: float
    run: Run


@dataclass(frozen=True)
class Sizes:
    """Of what is timed, by kind of device."""

    side: int
    """The longer sides of products"""
    sides: tuple[int, ...]
    """The smallest side of products, from LoRA's ranks up"""
    group_rows: tuple[int, ...]
    """Rows of an expert"""
    tokens: int
    hidden: int
    inter: int
    experts: int
    chosen: int
    heads: int
    key_heads: int
    head_dim: int
    rows: tuple[int, ...]
    """Positions of a row"""
    columns: int
    """Of the vocabulary"""


SIZES = {
    "cpu": Sizes(
        side=512,
        sides=(8, 24, 64, 192, 512),
        group_rows=(1, 2, 4, 16, 64, 256),
        tokens=512,
        hidden=512,
        inter=384,
        experts=16,
        chosen=4,
        heads=8,
        key_heads=2,
        head_dim=64,
        rows=(32, 128, 256, 512),
        columns=4096,
    ),
    "cuda": Sizes(
        side=4096,
        sides=(16, 64, 128, 512, 4096),
        group_rows=(1, 2, 4, 16, 64, 256, 1024),
        tokens=8192,
        hidden=2048,
        inter=768,
        experts=128,
        chosen=8,
        heads=32,
        key_heads=4,
        head_dim=128,
        rows=(256, 1024, 2048, 8192),
        columns=152064,
    ),
}


class Data:
    """Random tensors on the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *size: int) -> Tensor:
        x = torch.empty(*size, device=self.device, dtype=self.dtype)
        return x.normal_(generator=self.generator)


def _linear(x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return F.linear(x, next(weights))


def dense(data: Data, sizes: Sizes) -> Iterator[Timed]:
    side = sizes.side
    for name, shape in (("rows", (None, side, side)), ("columns", (side, None, side))):
        few = (1, 2, 4) if name == "rows" else ()  # tokens of a rollout
        for small in (*few, *sizes.sides):
            rows, columns, inner = (small if s is None else s for s in shape)
            x = data(rows, inner)
            # a token's weights come from memory, not from a cache that has just read them
            number = 16 if name == "rows" and small < 64 else 1
            weights = cycle([data(columns, inner) for _ in range(number)])
            flops = 2.0 * rows * columns * inner
            yield Timed(f"dense.{name}", small, flops, partial(_linear, x, weights))
    for small in sizes.sides:  # as LoRA's update: added to an output
        x, weight, out = data(side, small), data(small, side), data(side, side)
        run = partial(out.addmm_, x, weight)
        yield Timed("dense.inner", small, 2.0 * side * side * small, run)


def _offsets(rows: int, groups: int, device: torch.device) -> Tensor:
    return torch.arange(1, groups + 1, dtype=torch.int32, device=device) * rows


def grouped(data: Data, sizes: Sizes) -> Iterator[Timed]:
    """Experts with equally many rows."""
    groups, (hidden, inter) = min(sizes.experts, 16), (sizes.hidden, sizes.inter)
    usual = sizes.tokens * sizes.chosen // sizes.experts

    def product(name: str, size: int, rows: int, columns: int, inner: int) -> Timed:
        x, weight = data(rows * groups, inner), data(groups, columns, inner)
        offsets = _offsets(rows, groups, data.device)
        flops = 2.0 * rows * groups * columns * inner
        return Timed(name, size, flops, lambda: grouped_product(x, weight, offsets))

    for rows in sizes.group_rows:
        yield product("grouped.rows", rows, rows, 2 * inter, hidden)
    for small in sizes.sides:
        if small <= usual:
            yield product("grouped.columns", small, usual, small, hidden)
            yield product("grouped.inner", small, usual, hidden, small)
    for small in sizes.sides:
        if small <= usual:
            left, right = data(usual * groups, small), data(usual * groups, hidden)
            offsets = _offsets(usual, groups, data.device)
            flops = 2.0 * usual * groups * small * hidden
            run = partial(grouped_outer, left, right, offsets)
            yield Timed("outer.rows", small, flops, run)
            run = partial(grouped_outer, right, left, offsets)
            yield Timed("outer.columns", small, flops, run)
    for rows in sizes.group_rows:
        left, right = data(rows * groups, hidden), data(rows * groups, hidden)
        offsets = _offsets(rows, groups, data.device)
        flops = 2.0 * rows * groups * hidden * hidden
        run = partial(grouped_outer, left, right, offsets)
        yield Timed("outer.inner", rows, flops, run)


def attention(data: Data, sizes: Sizes) -> Iterator[Timed]:
    for row in sizes.rows:
        number = max(sizes.tokens // row, 1)
        width = sizes.heads * sizes.head_dim
        query = data(number, sizes.heads, row, sizes.head_dim).requires_grad_()
        key, value = (
            data(number, sizes.key_heads, row, sizes.head_dim).requires_grad_() for _ in range(2)
        )
        pairs = number * row * row / 2
        grouped_queries: dict[str, Any] = dict(
            is_causal=True, enable_gqa=sizes.heads > sizes.key_heads
        )
        forward = partial(F.scaled_dot_product_attention, query, key, value, **grouped_queries)
        with torch.no_grad():
            yield Timed("attention.forward", row, 4 * pairs * width, torch.no_grad()(forward))
        with torch.enable_grad():
            out = forward()
        gradient = torch.randn_like(out)
        inputs = (query, key, value)
        run = partial(torch.autograd.grad, out, inputs, gradient, retain_graph=True)
        yield Timed("attention.backward", row, 10 * pairs * width, run)


def kernels(data: Data, sizes: Sizes) -> Iterator[Timed]:
    """The bytes of each are those that layer_work.py counts."""
    tokens, hidden, inter, chosen = sizes.tokens, sizes.hidden, sizes.inter, sizes.chosen
    number = data(1).element_size()
    of = lambda name, numbers, run: Timed(f"bytes.{name}", None, numbers * number, run)
    x, y = data(tokens, hidden), data(tokens, hidden)
    yield of("add", 3 * x.numel(), lambda: x + y)
    big = data(8 * tokens, hidden)
    into = torch.empty_like(big)
    yield of("copy", 2 * big.numel(), lambda: into.copy_(big))
    leaf, weight = data(tokens, hidden).requires_grad_(), data(hidden)
    norm = lambda: F.rms_norm(leaf, (hidden,), weight, 1e-6)
    yield of("rms_norm", 2 * x.numel(), torch.no_grad()(norm))
    with torch.enable_grad():
        out = norm()
    backward = partial(torch.autograd.grad, out, leaf, y, retain_graph=True)
    yield of("rms_norm_backward", 3 * x.numel(), backward)

    groups, dim = sizes.key_heads, sizes.head_dim
    queries, keys = sizes.heads * dim, groups * dim
    qkv = data(tokens, 1, queries + 2 * keys).requires_grad_()
    rotation = torch.randn(tokens, 1, 2, dim // 2, device=data.device)
    weights = data(dim), data(dim)
    rotate = lambda: norm_rotary.norm_rotary(qkv, *weights, rotation, groups, 1e-6)
    yield of("norm_rotary", 2 * tokens * (queries + keys), torch.no_grad()(rotate))
    with torch.enable_grad():
        results = rotate()
    upstream = [torch.randn_like(result) for result in results]
    backward = partial(torch.autograd.grad, results, qkv, upstream, retain_graph=True)
    yield of("norm_rotary_backward", 3 * qkv.numel(), backward)

    module = experts.select_kernels(data.device)
    logits = torch.rand(tokens, sizes.experts, device=data.device)
    ids = logits.topk(chosen, dim=1).indices.sort(dim=1).values.int()
    order_pairs = lambda: module.order_pairs(ids, 0, sizes.experts, is_partial=False)
    pairs, order = tokens * chosen, order_pairs()
    yield Timed("bytes.order_pairs", None, pairs * 4 * 4.0, order_pairs)
    width = hidden + 16
    gather = lambda: module.gather_rows(x, order, width)
    yield of("gather_rows", pairs * (hidden + width), gather)
    rows = data(pairs, hidden)
    yield of("sum_rows", (pairs + tokens) * hidden, lambda: module.sum_rows(rows, order, hidden))
    half = module.order_pairs(ids, 0, sizes.experts // 2, is_partial=True)
    own = int(half.offsets[-1])
    half = half._replace(pairs=half.pairs[:own])
    run = lambda: module.sum_rows(rows[:own], half, hidden)
    yield of("sum_own_rows", (own + tokens) * hidden, run)
    gate_up, chances = data(pairs, 2 * inter), torch.rand(tokens, chosen, device=data.device)
    activate = lambda: module.activation(gate_up, chances, order, inter + 8)
    yield of("activation", pairs * (3 * inter + 8), activate)
    of_a = data(pairs, inter + 8)
    activate_backward = lambda: module.activation_backward(gate_up, chances, of_a, order)
    yield of("activation_backward", pairs * 6 * inter, activate_backward)
    yield router(data, sizes, ids)


def pair_matrices(data: Data, sizes: Sizes) -> Iterator[Timed]:
    """What a token's experts do with LoRA on a CPU besides its products."""
    if data.device.type != "cpu":
        return
    pairs, rank = 4 * sizes.chosen, 16
    width = sizes.hidden + 2 * sizes.inter
    of_layers = cycle([data(sizes.experts, width, rank) for _ in range(16)])
    ids = torch.arange(pairs, device=data.device) * sizes.experts // pairs
    num_bytes = 2.0 * pairs * width * rank * data(1).element_size()
    yield Timed(
        "bytes.pair_matrices", None, num_bytes, lambda: next(of_layers).index_select(0, ids)
    )


def router(data: Data, sizes: Sizes, ids: Tensor) -> Timed:
    """megatron-core's choice of experts, without the product."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    logits = torch.randn(sizes.tokens, sizes.experts, device=data.device)

    def run() -> None:
        chances, chosen = topk_routing_with_score_function(
            logits, sizes.chosen, use_pre_softmax=False, score_function="softmax"
        )[:2]
        Chosen.apply(chances, chosen, sizes.chosen)

    with torch.no_grad():
        return Timed("bytes.router", None, logits.numel() * 4 * 4.0, run)


def update(data: Data, sizes: Sizes) -> Iterator[Timed]:
    """The loss, whose products are made small, and AdamW."""
    rows, narrow = max(sizes.tokens // 4, 1), 8
    student = data(rows, narrow).requires_grad_()
    teacher, head = data(rows, narrow), data(sizes.columns, narrow)
    divergence = Divergence("jsd", beta=0.5, temperature=2.0)
    labels = torch.zeros(rows, dtype=torch.int64, device=data.device)

    def loss() -> None:
        with torch.enable_grad():
            linear_divergence(student, teacher, head, divergence, labels=labels)

    size = 4.0 * rows * sizes.columns
    yield Timed("bytes.divergence", None, LOSS_PASSES * size, loss)
    parameters = [torch.zeros(2**18, device=data.device, requires_grad=True) for _ in range(16)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adam = torch.optim.AdamW(parameters, fused=True)
    size = 4.0 * sum(parameter.numel() for parameter in parameters)
    yield Timed("bytes.adamw", None, UPDATE_PASSES * size, adam.step)


def all_timed(
    device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None
) -> Iterator[Timed]:
    """Everything, of the device's own sizes or of others."""
    data, sizes = Data(device, dtype), sizes or SIZES[device.type]
    for kind in (dense, grouped, attention, kernels, pair_matrices, update):
        yield from kind(data, sizes)
