"""LoRA's two products: dropout's mask, values and gradients against float64 with the mask made
explicit, what is saved; the Triton kernels (in the interpreter where there is no CUDA) and what a
compiler makes of them.
"""

import math
import re

import pytest
import torch
from torch.nn import functional as F

from megatron_gkd.lora import low_product as torch_kernels
from megatron_gkd.lora.dropout import Drop, keep_mask
from megatron_gkd.lora.low_product import low_product
from megatron_gkd.lora.up_product import add_up_product, block_layout, lay_out
from tests.gpu import SHARED_MEMORY
from tests.processes import in_a_process

CPU = torch.device("cpu")
CUDA = torch.cuda.is_available()
SEED = 0x1234_5678_9ABC_DEF0
# rows, width, low numbers, ends of the experts' rows, dtype
CASES = {
    "dense, rows of 40": (50, 40, 8, None, torch.float32),
    "dense, three groups of columns": (70, 513, 24, None, torch.float32),
    "five experts, two without rows": (70, 300, 8, [36, 36, 50, 70, 70], torch.float32),
    "half precision, 72 low numbers": (37, 264, 72, [3, 37], torch.float16),
    "no rows": (0, 40, 8, [0, 0, 0], torch.float32),
}
if CUDA:  # Triton's interpreter multiplies bfloat16 as integers
    CASES["bfloat16"] = (70, 256, 16, [36, 36, 50, 70, 70], torch.bfloat16)


def philox(counter, key, rounds):
    """Philox 4x32 of plain integers."""
    for _ in range(rounds):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        upper_a, upper_b = a >> 32, b >> 32
        counter = (upper_b ^ counter[1] ^ key[0], b, upper_a ^ counter[3] ^ key[1], a)
        counter = tuple(word % 2**32 for word in counter)
        key = ((key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32)
    return counter


def test_the_mask_is_philox():
    # of the authors' known answers
    answer = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert philox((0, 0, 0, 0), (0, 0), 7) == answer
    drop = Drop(0.37, SEED)
    mask = keep_mask(3, 700, drop, CPU)
    for row in range(3):
        for column in (0, 1, 63, 64, 130, 255, 256, 600, 699):
            group, place = divmod(column, 256)
            word, lane = divmod(place, 64)
            counter = (64 * group + lane, row, 0, 0)
            words = philox(counter, (SEED % 2**32, SEED >> 32), 7)
            assert bool(mask[row, column]) == (words[word] >= drop.threshold)
    assert torch.equal(keep_mask(2, 100, drop, CPU), mask[:2, :100])  # a place has its own bit


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_entries_are_kept_independently(probability):
    """Means and correlations of fixed seeds lie within five standard deviations of the exact
    ones, sums of rows and of columns spread as those of independent entries.
    """
    rows, columns = 1024, 1024
    masks = [keep_mask(rows, columns, Drop(probability, SEED + salt), CPU) for salt in (0, 1)]
    x, other = ((mask.double() - (1 - probability)) for mask in masks)
    variance = probability * (1 - probability)
    assert abs(x.mean()) < 5 * math.sqrt(variance / x.numel())
    for left, right in (
        (x[:, 1:], x[:, :-1]),
        (x[1:], x[:-1]),
        (x[:, 64:], x[:, :-64]),  # words of one counter
        (x[:, 256:], x[:, :-256]),
        (x, other),  # neighbouring seeds, as those of two ranks
    ):
        assert abs((left * right).mean()) < 5 * variance / math.sqrt(left.numel())
    for dim in (0, 1):  # chi-square, 1024 degrees of freedom
        chi_square = (x.sum(dim).square() / (variance * x.shape[dim])).sum()
        assert abs(chi_square - x.shape[1 - dim]) < 5 * math.sqrt(2 * x.shape[1 - dim])


def make(case, dtype=None):
    """x, down (fp32), the gradient of low, offsets, of a case."""
    num_rows, width, num_low, ends, stored = CASES[case]
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator)
    experts = () if ends is None else (len(ends),)
    down = draw(*experts, num_low, width)
    x, gradient = (draw(num_rows, n).to(dtype or stored) for n in (width, num_low))
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    return x, down, gradient, offsets


def reference(x, down, gradient, offsets, drop):
    """low and its gradients by autograd in float64, with the factors of the mask as a matrix."""
    factors = keep_mask(*x.shape, drop, CPU).double() / (1 - drop.probability)
    x, down = (tensor.double().requires_grad_() for tensor in (x, down))
    ends = [len(x)] if offsets is None else offsets.tolist()
    matrices = down[None] if offsets is None else down
    parts = zip([0, *ends[:-1]], ends, matrices)
    low = torch.cat([(x * factors)[first:end] @ matrix.T for first, end, matrix in parts])
    low.backward(gradient.double())
    return low.detach(), x.grad, down.grad


def assert_close(found, expected, dtype):
    limit = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert found.shape == expected.shape
    error = (found.double() - expected).abs()
    assert (error <= limit * expected.abs().max().clamp(min=1e-9)).all() if len(error) else True


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    x, down, gradient, offsets = make(case)
    drop = Drop(0.3, SEED)
    found = (
        torch_kernels.low_forward(x, down, drop, offsets),
        torch_kernels.low_backward_input(gradient, down, drop, offsets),
        torch_kernels.low_backward_weight(gradient, x, drop, offsets),
    )
    assert [tensor.dtype for tensor in found] == [x.dtype, x.dtype, torch.float32]
    for ours, wanted in zip(found, reference(x, down, gradient, offsets, drop)):
        assert_close(ours, wanted, x.dtype)
    if offsets is None:
        for tensor in (x, down):
            tensor.requires_grad_()
        low = low_product(x, down, drop)
        low.backward(gradient)
        for by_autograd, ours in zip((low.detach(), x.grad, down.grad), found):
            assert torch.equal(by_autograd, ours)


def test_without_dropout_and_of_three_dimensions():
    x, down, gradient, _ = make("dense, rows of 40", torch.bfloat16)
    assert torch.equal(low_product(x, down, None), F.linear(x, down.bfloat16()))
    x, drop = x.view(5, 10, 40), Drop(0.3, SEED)
    assert torch.equal(
        low_product(x, down, drop).view(50, 8), low_product(x.view(50, 40), down, drop)
    )


def test_no_mask_is_saved():
    x, down, *_ = make("dense, three groups of columns")
    for tensor in (x, down):
        tensor.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes), lambda t: t):
        low_product(x, down, Drop(0.3, SEED))
    assert sorted(saved) == sorted((x.nbytes, down.nbytes))


def run_kernels(kernels, device, cases):
    """The three functions, and dL/dx added to what is there, of each case, with x alone and with x
    in longer rows; and a mask.
    """
    results = {}
    for case in cases:
        x, down, gradient, offsets = (
            tensor if tensor is None else tensor.to(device) for tensor in make(case)
        )
        drop = Drop(0.3, SEED)
        found = [kernels.low_backward_input(gradient, down, drop, offsets)]
        for x in (x, F.pad(x, (0, 8))[:, : x.shape[1]]):
            rows = F.pad(x, (0, 8 if x.stride(0) > x.shape[1] else 0))
            into = rows[:, : x.shape[1]]
            found += [
                kernels.low_forward(x, down, drop, offsets),
                kernels.low_backward_weight(gradient, x, drop, offsets),
                kernels.low_backward_input(gradient, down, drop, offsets, into=into),
                rows,
            ]
        results[case] = [tensor.cpu() for tensor in found]
    ones = torch.ones(40, 1, device=device)
    drop = Drop(0.05, SEED)
    results["mask"] = kernels.low_backward_input(
        ones, torch.ones(1, 300, device=device), drop
    ).cpu()
    return results


def run_triton(cases):
    from megatron_gkd.lora import triton_low_product

    triton_low_product.ENOUGH_PROGRAMS = 8  # rows of 70 in two parts, of which one is short
    return run_kernels(triton_low_product, "cuda" if CUDA else "cpu", cases)


IN_CI = ["dense, three groups of columns", "five experts, two without rows"]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(IN_CI, id="fp32"),
        pytest.param(
            [case for case in CASES if case not in IN_CI], id="others", marks=pytest.mark.extended
        ),
    ],
)
def test_triton_kernels(cases):
    """The mask bit for bit, numbers as closely as sums in another order allow."""
    found = in_a_process(run_triton, cases, interpret_triton=not CUDA)
    expected = run_kernels(torch_kernels, "cpu", cases)
    mask = found.pop("mask")
    assert torch.equal(mask != 0, keep_mask(40, 300, Drop(0.05, SEED), CPU))
    assert torch.equal(mask, expected["mask"])
    for case in found:
        for ours, theirs in zip(found[case], expected[case]):
            assert ours.dtype == theirs.dtype
            assert_close(ours, theirs.double(), CASES[case][4])


# rows, inputs, low numbers, experts, dtype; compute capability
BF16 = torch.bfloat16
SIZES = {
    "experts' gate and up": (65536, 2048, 16, 128, BF16),
    "qkv, rank 8": (8192, 2048, 24, 0, BF16),
    "qkv, rank 64": (8192, 2048, 192, 0, BF16),
    "o_proj, rank 64": (8192, 4096, 64, 0, BF16),
    "lm_head, rank 64": (512, 2048, 64, 0, torch.float32),
}
IN_CI_COMPILED = [("qkv, rank 64", 80), ("lm_head, rank 64", 89), ("experts' gate and up", 90)]
COMPILED = [
    pytest.param(
        name,
        capability,
        marks=() if (name, capability) in IN_CI_COMPILED else pytest.mark.extended,
    )
    for name in SIZES
    for capability in SHARED_MEMORY
]


def compile_kernels(num_rows, width, num_low, num_experts, dtype, capability):
    from megatron_gkd.lora import triton_low_product as kernels
    from tests.triton_launches import compile_launch, recorded_launches

    with torch.device("meta"):
        x, gradient = (torch.empty(num_rows, n, dtype=dtype) for n in (width, num_low))
        # of experts it is laid out in the activations' dtype
        down = torch.empty(
            *[num_experts] * (num_experts > 0), num_low, width, dtype=dtype if num_experts else None
        )
        offsets = torch.empty(num_experts, dtype=torch.int32) if num_experts else None
    with recorded_launches() as launches:
        kernels.low_forward(x, down, Drop(0.05, SEED), offsets)
        kernels.low_backward_input(gradient, down, Drop(0.05, SEED), offsets)
        kernels.low_backward_weight(gradient, x, Drop(0.05, SEED), offsets)
    return [
        (launch.function.__name__, kernel.metadata.shared, kernel.asm["ptx"])
        for launch, kernel in ((launch, compile_launch(launch, capability)) for launch in launches)
    ]


@pytest.mark.parametrize("sizes, capability", COMPILED)
def test_triton_kernels_compile_for_gpus_that_are_not_here(sizes, capability):
    kernels = compile_kernels(*SIZES[sizes], capability)
    assert [name for name, *_ in kernels] == [
        "forward_kernel",
        "backward_input_kernel",
        "backward_weight_kernel",
    ]
    for name, shared, ptx in kernels:
        assert shared <= SHARED_MEMORY[capability], name
        assert not re.search(r"\b(atom|red)\.|tf32", ptx)
        assert "mma" in ptx or SIZES[sizes][-1] == torch.float32


def test_the_second_product_is_added_in_place():
    """The formula's gradients by finite differences; where the sum lies; that a backward which
    needs the base's output after all says so.
    """
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    output, low, up = (draw(*size).requires_grad_() for size in ((2, 3, 5), (2, 3, 4), (5, 4)))
    add = lambda output, low, up: add_up_product(output.clone(), low, up, 1.7)
    assert torch.autograd.gradcheck(add, (output, low, up))
    expected = output + 1.7 * low @ up.T
    base = output.clone()
    total = add_up_product(base, low, up, 1.7)
    torch.testing.assert_close(total, expected)
    assert total.data_ptr() == base.data_ptr()
    x, linear = draw(2, 3, 6), torch.nn.Linear(6, 5, dtype=torch.float64)  # its output is a view
    add_up_product(linear(x), low, up, 1.0).square().sum().backward()
    ours = linear.weight.grad.clone()
    linear.zero_grad()
    (linear(x) + low @ up.T).square().sum().backward()
    torch.testing.assert_close(ours, linear.weight.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        add_up_product(output.exp(), low, up, 1.0).sum().backward()


def test_the_blocks_of_a_fused_linear():
    """Two groups of q (3 rows), k (1) and v (1), without LoRA on k, and v's rows from its second
    on, of three: the matrix row by row, and gradients by finite differences.
    """
    q, v = torch.randn(6, 2), torch.randn(3, 2)
    segments = (("q", 0, 3), ("k", 0, 1), ("v", 1, 1), ("q", 3, 3), ("k", 0, 1), ("v", 2, 1))
    layout = block_layout(segments, (("q", 6), ("v", 3)), 2, CPU)
    of_q, of_v = F.pad(q, (0, 2)), F.pad(v, (2, 0))
    rows = [*of_q[:3], torch.zeros(4), of_v[1], *of_q[3:], torch.zeros(4), of_v[2]]
    assert torch.equal(lay_out((q, v), layout, 4), torch.stack(rows))
    inputs = [matrix.double().requires_grad_() for matrix in (q, v)]
    assert torch.autograd.gradcheck(lambda *ups: lay_out(ups, layout, 4), inputs)
