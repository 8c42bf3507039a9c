"""One token's layer in torch: the reference of triton_kernels.py, and what CPUs run.

B rows, H hidden size, G groups of Q query heads, D head size, K experts a token. Products run in
the weights' dtype, the router's in fp32.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_gkd.model.grouped import grouped_product
from megatron_gkd.rollout.cache import KeyValueCache, Rows
from megatron_gkd.rollout.noise import gumbel
from megatron_gkd.rollout.scores import Scores
from megatron_gkd.rollout.weights import Delta, LayerWeights, Linear, Routing, Sizes

# Row i reads prompt i and response i of the cache, of lengths and at addresses that the host knows.
CAPTURABLE = False


def linear(x: Tensor, of: Linear) -> Tensor:
    """x [B, in] -> [B, out] with LoRA."""
    output = F.linear(x, of.weight)
    if of.down is None or of.up is None:
        return output
    low = F.linear(x, of.down[: len(of.up)])
    return output.addmm_(low, of.up)


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
    """x [B, H] -> rotated queries [B, G, Q, D]; keys and values go into layer `index` of the cache,
    behind `num_written` response tokens. rotation: cosines and sines [B, D], those of the first
    half of D negative.
    """
    heads = linear(x, layer.qkv).view(len(x), sizes.groups, sizes.queries + 2, sizes.head_dim)
    rotating = F.rms_norm(heads[:, :, :-1], (sizes.head_dim,), None, sizes.eps) * layer.qk_norm
    cos, sin = (factor[:, None, None] for factor in rotation)
    turned = torch.cat(rotating.chunk(2, dim=-1)[::-1], dim=-1)
    rotating = torch.addcmul(rotating * cos, turned, sin)
    cache.response[index, 0, :, :, num_written] = rotating[:, :, -1]
    cache.response[index, 1, :, :, num_written] = heads[:, :, -1]
    return rotating[:, :, :-1]


def attend(
    query: Tensor,
    rows: Rows,
    cache: KeyValueCache,
    index: int,
    num_written: int,
    key_mask: Tensor | None,
    sizes: Sizes,
) -> Tensor:
    """Queries [B, G, Q, D] over the row's prompt and num_written + 1 response tokens -> [B, G Q D].

    key_mask [B G, 1, W + C or more]: -inf at the positions behind a prompt's end, otherwise 0. For
    one position a row, products and a softmax are faster than torch's attention.
    """
    assert cache.joined is not None and key_mask is not None
    end = cache.prompt.shape[4] + num_written + 1
    keys, values = cache.joined[index].flatten(1, 2)[:, :, :end]
    scale = sizes.head_dim**-0.5
    scores = torch.baddbmm(key_mask[..., :end], query.flatten(0, 1), keys.mT, alpha=scale)
    return torch.bmm(scores.softmax(dim=-1), values).view(len(query), -1)


def output(context: Tensor, layer: LayerWeights) -> Delta:
    """[B, G Q D] -> this rank's part of what attention adds, [B, 1, H]."""
    return Delta(linear(context, layer.output)[:, None], None)


def add_norm(x: Tensor, delta: Delta, weight: Tensor, eps: float) -> Tensor:
    """x [B, H] += delta, in place -> its RMSNorm [B, H]."""
    x += delta.parts[:, 0]
    return F.rms_norm(x, x.shape[1:], weight, eps)


def whole(delta: Delta, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """The sum of the parts, [B, H]."""
    return delta.parts[:, 0]


def route(x: Tensor, layer: LayerWeights, sizes: Sizes, share: tuple[int, int]) -> Routing:
    """The K experts of each row and their probabilities. share (s, n): this rank computes its
    experts for the rows s, s + n, ...
    """
    logits = F.linear(x.float(), layer.router.float())
    if not sizes.renormalize:
        logits = logits.softmax(dim=-1)
    values, ids = logits.topk(sizes.experts_per_token, dim=-1)
    probabilities = values.softmax(dim=-1) if sizes.renormalize else values
    is_partial = sizes.num_local_experts < sizes.num_experts or share[1] > 1
    if is_partial:
        ids = ids - sizes.first_expert
        is_other = (ids < 0) | (ids >= sizes.num_local_experts)
        if share[1] > 1:
            row = torch.arange(len(ids), device=ids.device)[:, None]
            is_other |= row % share[1] != share[0]
        ids = ids.masked_fill(is_other, sizes.num_local_experts)
    return Routing(ids, probabilities, is_partial)


def experts(x: Tensor, layer: LayerWeights, routing: Routing, sizes: Sizes) -> Delta:
    """x [B, H] -> [B, 1, H]: the sum of the chosen experts that this rank holds, weighted.

    Always B K rows: those of other ranks' experts stand behind the last expert's.
    """
    num_rows, num_chosen = routing.ids.shape
    sorted_ids, order = routing.ids.flatten().sort(stable=True)
    numbers = _numbers(sizes.num_local_experts, x.device)
    offsets = torch.searchsorted(sorted_ids, numbers, right=True, out_int32=True)
    ids = sorted_ids
    if routing.is_partial:
        ids = ids.clamp(max=sizes.num_local_experts - 1)
    rows = x.index_select(0, order // num_chosen)
    gate, up = _grouped(rows, layer.gate_up, offsets, ids).chunk(2, dim=-1)
    probabilities = routing.probabilities.flatten().index_select(0, order)[:, None]
    weighted = (F.silu(gate) * up * probabilities).to(x.dtype)
    products = _grouped(weighted, layer.down, offsets, ids)
    if routing.is_partial:  # grouped_mm leaves the rows behind the last expert's as they were
        products = products.where((sorted_ids < sizes.num_local_experts)[:, None], 0)
    by_row = torch.empty_like(products).index_copy_(0, order, products)
    return Delta(by_row.view(num_rows, num_chosen, -1).sum(dim=1, keepdim=True), None)


@functools.cache
def _numbers(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device)


def _grouped(x: Tensor, of: Linear, offsets: Tensor, ids: Tensor) -> Tensor:
    """Rows sorted by expert; ids: of each row.

    LoRA's matrices are few numbers: each row's are copied beside each other, and two products of
    all rows follow, where grouped_mm would make two for each expert.
    """
    output = grouped_product(x, of.weight, offsets)
    if of.down is None or of.up is None:
        return output
    low = torch.bmm(x[:, None], of.down.index_select(0, ids).mT)
    return torch.baddbmm(output[:, None], low, of.up.index_select(0, ids))[:, 0]


def scores_of(
    logits: Tensor, seen: Tensor, num_real: int, *, penalty: float, temperature: float
) -> Scores:
    """Logits fp32 [B, C], which may be overwritten, of which the first `num_real` columns are no
    padding -> scores as `transformers` makes them. seen bool [B, C or more]: where the repetition
    penalty applies. Temperature 0 (greedy) divides by nothing.
    """
    num_columns = logits.shape[1]
    if num_real < num_columns:
        logits[:, num_real:] = -float("inf")
    log_sum = logits.logsumexp(dim=1)
    if num_real:
        low, high = logits[:, :num_real].aminmax(dim=1)
        log_sum = log_sum.where(low.isfinite() & high.isfinite(), float("nan"))
    scores = logits
    if penalty != 1:
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(seen[:, :num_columns], penalised, scores)
    if temperature not in (0, 1):
        scores = scores / temperature
    return Scores(scores, log_sum, None)


def best_of(scores: Tensor, step_keys: Tensor | None, first_column: int) -> tuple[Tensor, Tensor]:
    """Scores fp32 [B, C] -> the largest sum of score and noise fp64 [B, 1], or the largest score
    where there are no keys, and its column int64 [B, 1]: the lowest of equal ones. first_column:
    token id of column 0. Of a row with a NaN any column.
    """
    scores = scores.double()
    if step_keys is not None:
        columns = first_column + torch.arange(scores.shape[1], device=scores.device)
        scores = scores + gumbel(step_keys, columns.expand(len(scores), -1))
    column = scores.argmax(dim=1, keepdim=True)
    return scores.gather(1, column), column
