"""The experts' Triton kernels against their torch functions (which test_model_experts.py compares
with float64), and what a compiler makes of them.

Where there is no CUDA, Triton's interpreter runs the kernels, in a process that switches it on
before triton is imported.
"""

import re

import pytest
import torch

from megatron_gkd.model import expert_torch
from tests.processes import in_a_process

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# tokens, experts of the layer, experts a token, first and number of this rank's, H, I, dtype
CASES = {
    "all experts here": (70, 6, 3, 0, 6, 24, 8, torch.float32),
    "some here": (67, 16, 4, 5, 6, 16, 16, torch.float32),
    "one expert a token": (65, 5, 1, 0, 5, 20, 12, torch.float32),
    "none chosen here": (3, 8, 2, 6, 2, 8, 4, torch.float32),
    "bfloat16": (9, 12, 8, 4, 8, 40, 24, torch.bfloat16),
}
if CUDA:
    CASES["real sizes"] = (4096, 128, 8, 16, 32, 2048, 768, torch.bfloat16)


def draw(case, device):
    """(routing map, probabilities, tokens [T, H], gate_up [P, 2 I], a gradient [P, I + 8])"""
    num_tokens, num_experts, top_k, first, _, hidden, width, dtype = case
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    if first + 2 == num_experts:  # the last two experts get nothing
        scores[:, -2:] -= 2
    probabilities, ids = scores.topk(top_k, dim=1)
    routing_map = torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter_(1, ids, True)
    probabilities = torch.zeros_like(scores).scatter_(1, ids, probabilities)
    num_rows = num_tokens * top_k
    rest = [
        torch.randn(*size, generator=generator).to(dtype)
        for size in ((num_tokens, hidden), (num_rows, 2 * width), (num_rows, width + 8))
    ]
    return [value.to(device) for value in (routing_map, probabilities, *rest)]


def run_case(kernels, case, device):
    """Every function of the module; of the rows those that exist."""
    num_tokens, num_experts, top_k, first, num_local, hidden, width, dtype = case
    routing_map, dense, x, gate_up, gradient = draw(case, device)
    ids, probabilities = kernels.chosen(routing_map, dense, top_k)
    spread = kernels.spread(probabilities, ids, num_experts)
    is_partial = num_local < num_experts
    order = kernels.order_pairs(ids, first, num_local, is_partial=is_partial)
    size, exist = len(order.pairs), int(order.offsets[-1])
    gathered = kernels.gather_rows(x, order, hidden + 8)
    behind = gathered.clone()
    behind[exist:] = float("nan")  # nobody may read what no row has
    gate_up, gradient = gate_up[:size].clone(), gradient[:size].clone()
    gate_up[exist:], gradient[exist:] = float("nan"), float("nan")
    activated = kernels.activation(gate_up, probabilities, order, width + 8)
    of_gate_up, of_probabilities, again = kernels.activation_backward(
        gate_up, probabilities, gradient, order
    )
    found = dict(
        ids=ids,
        probabilities=probabilities,
        spread=spread,
        pairs=order.pairs[:exist],
        rows=order.rows,
        offsets=order.offsets,
        gathered=gathered[:exist],
        summed=kernels.sum_rows(behind, order, hidden),
        activated=activated[:exist],
        of_gate_up=of_gate_up[:exist],
        of_probabilities=of_probabilities,
        again=again[:exist],
    )
    return {name: value.cpu() for name, value in found.items()}


def run_all():
    from megatron_gkd.model import expert_triton

    return {name: run_case(expert_triton, case, DEVICE) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def computed():
    return in_a_process(run_all, interpret_triton=not CUDA)


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_torch(computed, name):
    """Indices exactly; copies bit for bit; sums and activations to rounding."""
    expected = run_case(expert_torch, CASES[name], "cpu")
    tolerance = 1e-6 if CASES[name][-1] == torch.float32 else 1e-2
    for key, found in computed[name].items():
        wanted = expected[key]
        assert found.dtype == wanted.dtype and found.shape == wanted.shape, key
        if key in ("summed", "activated", "of_gate_up", "of_probabilities", "again"):
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(found, wanted), key


def test_torch_functions_equal_their_definition():
    """The order is stable and complete; the gradient of the activation is autograd's, in
    float64.
    """
    num_tokens, num_experts, top_k, first, num_local, hidden, width, _ = CASES["some here"]
    routing_map, dense, x, gate_up, gradient = draw(CASES["some here"], "cpu")
    ids, probabilities = expert_torch.chosen(routing_map, dense, top_k)
    assert all(
        chosen == row.nonzero().flatten().tolist() for chosen, row in zip(ids.tolist(), routing_map)
    )
    assert torch.equal(expert_torch.spread(probabilities, ids, num_experts), dense)
    order = expert_torch.order_pairs(ids, first, num_local, is_partial=True)
    pairs = [
        token * top_k + k
        for expert in range(first, first + num_local)
        for token in range(num_tokens)
        for k in range(top_k)
        if ids[token, k] == expert
    ]
    order = order._replace(pairs=order.pairs[: len(pairs)])
    assert order.pairs.tolist() == pairs
    flat = order.rows.flatten().tolist()
    assert all(flat[pair] == row for row, pair in enumerate(pairs))
    assert flat.count(-1) == len(flat) - len(pairs)

    x, gate_up = x.double(), gate_up[: len(pairs)].double().requires_grad_()
    tokens = torch.tensor(pairs) // top_k
    assert torch.equal(expert_torch.gather_rows(x, order, hidden), x[tokens])
    summed = torch.zeros_like(x).index_add_(0, tokens, x[tokens])
    actual = expert_torch.sum_rows(x[tokens].float(), order, hidden)
    torch.testing.assert_close(actual, summed.float())
    weights = probabilities.double().requires_grad_()
    gate, up = gate_up.chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up * weights.flatten()[pairs][:, None]
    wanted = torch.autograd.grad(
        expected, (gate_up, weights), gradient[: len(pairs), :width].double()
    )
    arguments = (gate_up.detach().float(), probabilities)
    value = expert_torch.activation(*arguments, order, width + 8)
    torch.testing.assert_close(value[:, :width], expected.detach().float())
    assert not value[:, width:].any()
    *actual, again = expert_torch.activation_backward(*arguments, gradient[: len(pairs)], order)
    torch.testing.assert_close(again, value[:, :width])
    for found, exact in zip(actual, wanted):
        torch.testing.assert_close(found, exact.float())


def compile_all():
    """What the kernels of a layer at the real sizes need of a GPU of compute capability 9.0."""
    from megatron_gkd.model import expert_triton
    from tests.triton_launches import compile_launch, recorded_launches

    num_tokens, top_k, hidden, width = 64, 8, 2048, 768
    bf16 = lambda *size: torch.zeros(*size, dtype=torch.bfloat16)
    with recorded_launches() as launches:
        ids, probabilities = expert_triton.chosen(
            torch.zeros(num_tokens, 128, dtype=torch.bool), torch.zeros(num_tokens, 128), top_k
        )
        order = expert_triton.order_pairs(ids, 0, 128, is_partial=False)
        rows = num_tokens * top_k
        expert_triton.gather_rows(bf16(num_tokens, hidden), order, hidden + 16)
        expert_triton.activation(bf16(rows, 2 * width), probabilities, order, width + 8)
        expert_triton.sum_rows(bf16(rows, hidden), order, hidden)
        expert_triton.activation_backward(
            bf16(rows, 2 * width), probabilities, bf16(rows, width + 8), order
        )
        expert_triton.sum_rows(bf16(rows, hidden + 16), order, hidden)
        expert_triton.spread(probabilities, ids, 128)
    results = []
    for launch in launches:
        kernel = compile_launch(launch)
        results.append((launch.function.__name__, kernel.metadata.shared, kernel.asm["ptx"]))
    return results


def test_kernels_compile_for_the_gpu():
    """No atomics; rows are read and written in 16 bytes."""
    compiled = in_a_process(compile_all)
    assert [name for name, _, _ in compiled] == [
        "chosen_kernel",
        "count_kernel",
        "place_kernel",
        "gather_kernel",
        "activation_kernel",
        "sum_kernel",
        "activation_backward_kernel",
        "sum_kernel",
        "spread_kernel",
    ]
    for name, shared, ptx in compiled:
        assert shared <= 100_000, name
        assert not re.search(r"\b(atom|red)\.", ptx), name
        if name in ("gather_kernel", "activation_kernel", "activation_backward_kernel"):
            assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx, name
