"""One decoder layer of random weights with a filled cache, through either module of kernels."""

from dataclasses import replace
from typing import NamedTuple

import torch

from megatron_gkd.rollout.cache import CacheTable, KeyValueCache, Rows
from megatron_gkd.rollout.noise import GOLDEN, MULTIPLIERS
from megatron_gkd.rollout.weights import LayerWeights, Linear, Sizes


class LayerCase(NamedTuple):
    num_rows: int = 5
    hidden: int = 64
    groups: int = 2
    queries: int = 3
    head_dim: int = 32
    num_experts: int = 6
    first_expert: int = 0
    num_local_experts: int = 6
    experts_per_token: int = 2
    renormalize: bool = True
    intermediate: int = 48
    rank: int = 3  # of LoRA on every linear; 0 is none
    dtype: torch.dtype = torch.float32
    share: tuple[int, int] = (0, 1)
    num_written: int = 3
    longest_prompt: int = 70
    max_new_tokens: int = 9


CASES = {
    "LoRA": LayerCase(),
    "no LoRA, sizes that are no powers of two": LayerCase(
        rank=0, renormalize=False, hidden=80, num_experts=12, num_local_experts=12
    ),
    "one row, rank 1": LayerCase(num_rows=1, rank=1, num_written=0),
    "experts and rows of other ranks": LayerCase(share=(1, 2), num_local_experts=3, first_expert=2),
    "float16": LayerCase(dtype=torch.float16, rank=8, hidden=128),
    "many rows": LayerCase(num_rows=18, experts_per_token=3, queries=8, groups=1, rank=8),
    "many written": LayerCase(num_written=200, max_new_tokens=300, longest_prompt=5),
}


def make(case: LayerCase, device: str):
    """(layer, sizes, rows, cache, prompts and slots of the rows, input [B, H], rotation)."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(case.dtype).to(device)

    def linear(parts, num_outputs, num_inputs, experts=()):
        # behind the rows of experts' weights stand columns of LoRA, which decoding does not read
        behind = 8 if experts else 0
        weight = randn(*experts, num_outputs, num_inputs + behind, scale=num_inputs**-0.5)
        weight = weight[..., :num_inputs]
        if not case.rank:
            return Linear(weight, None, None)
        rank = parts * case.rank
        num_down = max(16, 1 << (rank - 1).bit_length()) if experts else -(-rank // 32) * 32
        num_up = num_down if experts else -(-rank // 8) * 8
        down = torch.zeros(*experts, num_down, num_inputs, dtype=case.dtype, device=device)
        up = torch.zeros(*experts, num_up, num_outputs, dtype=case.dtype, device=device)
        down[..., :rank, :] = randn(*experts, rank, num_inputs, scale=num_inputs**-0.5)
        up[..., :rank, :] = randn(*experts, rank, num_outputs, scale=0.5)
        return Linear(weight, down, up)

    heads, local = case.groups * case.queries, (case.num_local_experts,)
    layer = LayerWeights(
        input_norm=1 + randn(case.hidden, scale=0.1),
        qkv=linear(3, (heads + 2 * case.groups) * case.head_dim, case.hidden),
        qk_norm=1 + randn(case.queries + 1, case.head_dim, scale=0.1),
        output=linear(1, case.hidden, heads * case.head_dim),
        mlp_norm=1 + randn(case.hidden, scale=0.1),
        router=randn(case.num_experts, case.hidden),
        gate_up=linear(2, 2 * case.intermediate, case.hidden, local),
        down=linear(1, case.hidden, case.intermediate, local),
    )
    sizes = Sizes(
        case.hidden,
        case.groups,
        case.queries,
        case.head_dim,
        case.num_experts,
        case.first_expert,
        case.num_local_experts,
        case.experts_per_token,
        case.renormalize,
        1e-6,
    )
    num_prompts = max(1, case.num_rows // 2)  # rows share prompts
    prompts = torch.randint(num_prompts, (case.num_rows,), generator=generator).to(device)
    slots = torch.randperm(case.num_rows, generator=generator).to(device)
    lengths = torch.randint(1, case.longest_prompt + 1, (num_prompts,), generator=generator)
    rows = replace(
        Rows.on(torch.device(device), case.num_rows),
        prompts=prompts.int(),
        slots=slots.int(),
        prompt_lengths=lengths.to(device)[prompts].int(),
        step=torch.tensor([case.num_written], device=device),
    )
    cache = KeyValueCache(
        CacheTable.on(torch.device(device), case.dtype),
        num_layers=2,
        num_prompts=num_prompts,
        num_rows=case.num_rows,
        num_groups=case.groups,
        head_dim=case.head_dim,
        prompt_width=case.longest_prompt,
        max_new_tokens=case.max_new_tokens,
    )
    cache.prompt.copy_(randn(*cache.prompt.shape))
    cache.response.copy_(randn(*cache.response.shape))
    angles = torch.rand(case.num_rows, case.head_dim // 2, generator=generator).to(device) * 6
    rotation = (
        torch.cat((angles, angles), 1).cos().to(case.dtype),
        torch.cat((-angles.sin(), angles.sin()), 1).to(case.dtype),
    )
    return layer, sizes, rows, cache, prompts, slots, randn(case.num_rows, case.hidden), rotation


def run_layer(kernels, case: LayerCase, device: str = "cpu") -> dict[str, torch.Tensor]:
    """What every function of the module gives for the second of the cache's two layers."""
    layer, sizes, rows, cache, prompts, slots, x, rotation = make(case, device)
    if not kernels.CAPTURABLE:
        cache.join(prompts, slots)
    width = cache.prompt.shape[4]
    keys = torch.arange(width + case.max_new_tokens, device=device)
    beyond = (keys >= rows.prompt_lengths[:, None]) & (keys < width)
    mask = torch.zeros_like(beyond, dtype=case.dtype).masked_fill(beyond, -float("inf"))
    query = kernels.qkv(x, layer, rotation, rows, cache, 1, case.num_written, sizes)
    written = cache.response[1, :, :, :, case.num_written]
    if kernels.CAPTURABLE:
        written = written[:, slots]
    mask = mask.repeat_interleave(case.groups, dim=0)[:, None]
    context = kernels.attend(query, rows, cache, 1, case.num_written, mask, sizes)
    delta = kernels.output(context, layer)
    of_attention = kernels.whole(delta, case.hidden, case.dtype)
    residual = x.clone()
    normed = kernels.add_norm(residual, delta, layer.mlp_norm, sizes.eps)
    routing = kernels.route(normed, layer, sizes, case.share)
    delta = kernels.experts(normed, layer, routing, sizes)
    of_experts = kernels.whole(delta, case.hidden, case.dtype)
    results = dict(
        query=query,
        written=written,
        context=context,
        of_attention=of_attention,
        residual=residual,
        normed=normed,
        ids=routing.ids.sort(dim=1).values,
        probabilities=routing.probabilities,
        of_experts=of_experts,
    )
    return {name: value.detach().double().cpu() for name, value in results.items()}


def run_scores(kernels, penalty, temperature, num_real, device) -> dict[str, torch.Tensor]:
    """Scores of five rows of 4352 columns, two of them with a logit that is not finite."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 4352, generator=generator) * 3
    seen = torch.rand(5, 4368, generator=generator) < 0.3
    if num_real:
        logits[3, 77], logits[4, 4000] = float("nan"), -float("inf")
    found = kernels.scores_of(
        logits.to(device), seen.to(device), num_real, penalty=penalty, temperature=temperature
    )
    results = dict(scores=found.scores[:3], log_sum=found.log_sum)
    if num_real:
        values, columns = found.top_k(20)
        results |= dict(values=values[:3], columns=columns[:3])
    return {name: value.double().cpu() for name, value in results.items()}


def key_of(column: int, hashed: int) -> int:
    """The step's key for which noise.py's hash of this column is `hashed`; both int64."""
    x = hashed % 2**64
    for bits, multiplier in ((31, None), (27, MULTIPLIERS[1]), (30, MULTIPLIERS[0])):
        if multiplier is not None:
            x = x * pow(multiplier, -1, 2**64) % 2**64
        x ^= (x >> bits) ^ (x >> 2 * bits)
    x = (x - (column + 1) * GOLDEN) % 2**64
    return x - 2**64 * (x >= 2**63)


def run_best(kernels, num_columns, has_noise, device) -> dict[str, torch.Tensor]:
    """Of six rows: equal scores, a row of padding alone, one with a NaN, with or without noise, of
    which the last one has the largest there is.
    """
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(6, num_columns, generator=generator).round(decimals=1)
    scores[3] = -float("inf")
    scores[4, num_columns // 2] = float("nan")
    keys = torch.randint(2**62, (6,), generator=generator) * 2 - 2**62
    keys[5] = key_of(3007, -1)
    value, column = kernels.best_of(scores.to(device), keys.to(device) if has_noise else None, 3000)
    return {name: x.cpu() for name, x in dict(value=value, column=column).items()}
