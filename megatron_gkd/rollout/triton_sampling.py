"""The sampler's Triton kernels: every logit is read once and every score written once; without
top-k every score is read once more, its noise drawn where it is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gkd.rollout.noise import GOLDEN, MULTIPLIERS
from megatron_gkd.rollout.scores import GROUP, Scores

CHUNK = 2048  # columns of a program
NOISE_CHUNK = 1024  # the same, with numbers of 64 bits
_GOLDEN = tl.constexpr(GOLDEN)
_FIRST, _SECOND = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])


@triton.jit
def scores_kernel(
    logits: tl.tensor,
    seen: tl.tensor,
    scores: tl.tensor,
    maxima: tl.tensor,
    log_sums: tl.tensor,
    num_columns: tl.tensor,
    num_real: tl.tensor,
    seen_width: tl.tensor,
    num_groups: tl.tensor,
    num_chunks: tl.tensor,
    penalty: tl.tensor,
    temperature: tl.tensor,
    PENALTY: tl.constexpr,
    GREEDY: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores of BLOCK columns of a row, the largest of each GROUP_SIZE, and the log-sum-exp of the
    logits: NaN where one of the real ones is not finite.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * num_columns + column, mask=column < num_real, other=-float("inf"))
    is_bad = (column < num_real) & ((x != x) | (tl.abs(x) == float("inf")))
    top = tl.max(x, 0)
    shifted = tl.where(x == -float("inf"), 0.0, tl.exp(x - top))
    log_sum = top + tl.log(tl.sum(shifted, 0))
    log_sum = tl.where(tl.max(is_bad.to(tl.int32), 0) > 0, float("nan"), log_sum)
    tl.store(log_sums + row * num_chunks + chunk, log_sum)
    if PENALTY:
        was_seen = tl.load(seen + row * seen_width + column, mask=column < num_real, other=0)
        x = tl.where(was_seen != 0, tl.where(x < 0, x * penalty, x / penalty), x)
    if not GREEDY:
        x = x / temperature
    tl.store(scores + row * num_columns + column, x, mask=column < num_columns)
    groups = tl.max(tl.reshape(x, (BLOCK // GROUP_SIZE, GROUP_SIZE)), 1)
    group = chunk * (BLOCK // GROUP_SIZE) + tl.arange(0, BLOCK // GROUP_SIZE)
    tl.store(maxima + row * num_groups + group, groups, mask=group < num_groups)


def scores_of(
    logits: Tensor, seen: Tensor, num_real: int, *, penalty: float, temperature: float
) -> Scores:
    """As in torch_kernels."""
    num_rows, num_columns = logits.shape
    num_chunks, num_groups = triton.cdiv(num_columns, CHUNK), triton.cdiv(num_columns, GROUP)
    scores = torch.empty_like(logits)
    maxima = logits.new_empty(num_rows, num_groups)
    log_sums = logits.new_empty(num_rows, num_chunks)
    scores_kernel[num_rows, num_chunks](
        logits,
        seen,
        scores,
        maxima,
        log_sums,
        num_columns,
        num_real,
        seen.stride(0),
        num_groups,
        num_chunks,
        float(penalty),
        float(temperature),
        penalty != 1,
        temperature == 0,
        GROUP,
        CHUNK,
        num_warps=4,
    )
    return Scores(scores, log_sums.logsumexp(dim=1), maxima)


@triton.jit
def mix(x: tl.tensor):
    """noise.py's hash; a right shift of int64 is arithmetic."""
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def best_kernel(
    scores: tl.tensor,
    keys: tl.tensor,
    best: tl.tensor,
    columns: tl.tensor,
    num_columns: tl.tensor,
    num_chunks: tl.tensor,
    first_column: tl.tensor,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest of BLOCK columns of a row, and where it is: the lowest of equal ones."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    there = column < num_columns
    x = tl.load(scores + row * num_columns + column, mask=there, other=-float("inf"))
    x = x.to(tl.float64)
    if NOISE:
        bits = mix(tl.load(keys + row) + (first_column + column).to(tl.int64) * _GOLDEN)
        uniform = (((bits >> 12) & 0xFFFFFFFFFFFFF).to(tl.float64) + 0.5) * 2.0**-52
        x += -tl.log(-tl.log(uniform))
    top = tl.max(x, 0)
    # NaN equals nothing: then any column that is there
    at = tl.min(tl.where(x == top, column, num_columns - 1), 0)
    tl.store(best + row * num_chunks + chunk, top)
    tl.store(columns + row * num_chunks + chunk, at.to(tl.int64))


def best_of(scores: Tensor, step_keys: Tensor | None, first_column: int) -> tuple[Tensor, Tensor]:
    """As in torch_kernels."""
    scores = scores.contiguous()
    num_rows, num_columns = scores.shape
    num_chunks = triton.cdiv(num_columns, NOISE_CHUNK)
    best = scores.new_empty(num_rows, num_chunks, dtype=torch.float64)
    columns = scores.new_empty(num_rows, num_chunks, dtype=torch.int64)
    best_kernel[num_rows, num_chunks](
        scores,
        scores if step_keys is None else step_keys,
        best,
        columns,
        num_columns,
        num_chunks,
        first_column,
        step_keys is not None,
        NOISE_CHUNK,
        num_warps=4,
    )
    chunk = best.argmax(dim=1, keepdim=True)
    return best.gather(1, chunk), columns.gather(1, chunk)
