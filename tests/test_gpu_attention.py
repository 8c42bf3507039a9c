"""Attention over packed rows on CUDA: the kernels for a batch of one length and for sequences of
several lengths against torch's attention row by row in float32, values and gradients.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_gkd.model.attention import EagerAttention, SdpaAttention
from megatron_gkd.model.packed_rows import PackedRows
from tests.gpu import DEVICE, needs_gpu

pytestmark = [pytest.mark.extended, needs_gpu]
SMALLER = 1 if DEVICE == "cuda" else 64  # long rows are slow on a CPU

HEADS, GROUPS, HEAD_DIM = 8, 1, 128  # of a rank at TP 4


def attention(kind=SdpaAttention):
    return kind(SimpleNamespace(kv_channels=HEAD_DIM), 1, None)


def inputs(size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [draw(n, size, heads).to(dtype) for n, heads in enumerate((HEADS, GROUPS, GROUPS))]


def draw(seed: int, size: int, heads: int = HEADS) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(size, heads, HEAD_DIM, device=DEVICE, generator=generator)


def run(attend, rows, tensors, cotangent):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    own = leaves[0].index_select(0, rows.own_positions)
    output = attend(own, *leaves[1:], rows)
    output.backward(cotangent[rows.own_positions].to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(
    "lengths, parts",
    [
        ((16384,), 1),
        ((16384,), 2),
        ((2048, 2048, 2048), 1),
        ((333, 333), 1),
        ((700,), 1),
        ((1, 700, 8, 4096, 33, 512), 1),
        ((8, 704, 4096, 32), 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_at_once_are_rows_one_by_one(lengths, parts, dtype):
    # multiples of 8, which is what four parts need
    lengths = (
        [8 * -(-length // 8 // SMALLER) for length in lengths]
        if parts > 1
        else [-(-length // SMALLER) for length in lengths]
    )
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    tensors = inputs(starts[-1], dtype)
    cotangent = draw(3, starts[-1])
    for part in range(parts):
        rows = PackedRows(starts=starts, num_parts=parts, part=part, device=torch.device(DEVICE))
        ways = [attention().attend]
        if DEVICE == "cuda" and rows.common_length:  # which choose another kernel
            ways.append(attention().attend_at_once)
        found = [run(attend, rows, tensors, cotangent) for attend in ways]
        wide = [tensor.float() for tensor in tensors]
        expected = run(_by_row, rows, wide, cotangent)  # float32: a call a row
        # what rounding to 16 bits does to the same: torch's attention row by row in 16 bits
        by_row = run(_by_row, rows, tensors, cotangent)
        for mine, its, exact in zip(zip(*found, strict=True), by_row, expected, strict=True):
            scale, usual = exact.abs().max(), (its.float() - exact).abs().max()
            for way in mine:
                assert (way.float() - exact).abs().max() <= 2 * usual + 1e-3 * scale


def _by_row(query, key, value, rows):
    return attention().attend_by_row(query, key, value, rows)


@pytest.fixture
def deterministic():
    """The kernel for rows of several lengths adds up the gradient of the queries by atomics."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_no_row_sees_another():
    rows = PackedRows(starts=[0, 700, 1500], device=torch.device(DEVICE))
    tensors, cotangent = inputs(1500, torch.bfloat16), draw(3, 1500)
    before = run(attention().attend, rows, tensors, cotangent)
    changed = [torch.cat((tensor[:700], torch.randn_like(tensor[700:]))) for tensor in tensors]
    after = run(attention().attend, rows, changed, cotangent)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[:700], other[:700]) and not torch.equal(one[700:], other[700:])


def test_eager_attention_agrees():
    rows = PackedRows(starts=[0, 300, 1000], device=torch.device(DEVICE))
    tensors, cotangent = inputs(1000, torch.float32), draw(3, 1000)
    found = run(attention(EagerAttention).attend, rows, tensors, cotangent)
    expected = run(attention().attend, rows, tensors, cotangent)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
