"""The loss from hidden states on one rank: values and gradients against the dense float64
reference, chunks, memory, threads.
"""

import itertools
import time

import pytest
import torch

from benchmarks.meter import Meter
from megatron_gkd.loss import linear, linear_jsd, vocab_parallel_jsd
from megatron_gkd.loss.divergence import KINDS
from megatron_gkd.loss.linear import CHUNK_BYTES, _chunk_rows
from megatron_gkd.loss.torch_kernels import BLOCK_ENTRIES
from tests.live_bytes import LiveBytes
from tests.ranks import run_ranks
from tests.reference_loss import (
    hidden_pair,
    labels_for,
    reference_linear,
    relative_error,
    student_gradient,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_linear_jsd_equals_reference(kind, dtype):
    for temperature, beta, sft_alpha in [(1.0, 0.5, 0.25), (2.0, 0.3, 0.0), (4.0, 0.7, 0.5)]:
        student, teacher, weight = hidden_pair(
            9, 24, 9001, 0.1, dtype=dtype
        )  # more vocabulary rows than one widened block
        labels = labels_for(9, 9001)
        student.requires_grad_()
        settings = dict(beta=beta, temperature=temperature, divergence=kind, sft_alpha=sft_alpha)
        output = linear_jsd(student, teacher, weight, labels=labels, chunk_rows=4, **settings)
        expected, expected_gradient = reference_linear(student, teacher, weight, labels, settings)
        for name in output._fields:
            assert relative_error(getattr(output, name), expected[name]) < 5e-5, name
        gradient = student_gradient(output.loss, student)
        assert gradient.dtype == dtype
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        assert relative_error(gradient, expected_gradient) < 5e-6 + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_jsd_of_equal_hidden_states_is_exactly_nothing(dtype):
    for kind, rows in itertools.product(KINDS, (1, 5, 64)):
        student, _, weight = hidden_pair(rows, 40, 5003, 0.0, dtype=dtype)
        student.requires_grad_()
        output = linear_jsd(
            student, student.detach().clone(), weight, divergence=kind, temperature=2.0
        )
        assert torch.count_nonzero(output.loss) == 0
        assert torch.count_nonzero(student_gradient(output.loss, student)) == 0


def test_young_lora_signal_survives_a_bfloat16_model():
    """Logits 0.01 apart: rounded to bfloat16 they have lost the direction of the gradient,
    linear_jsd keeps it.
    """
    student, teacher, weight = hidden_pair(16, 32, 2000, 0.005)
    weight = weight.bfloat16()
    student.requires_grad_()
    _, expected = reference_linear(student, teacher, weight, None, {})

    def cosine(gradient):
        return torch.cosine_similarity(gradient.double().flatten(), expected.flatten(), 0).item()

    fine = student_gradient(linear_jsd(student, teacher, weight).loss, student)
    logits = (student @ weight.float().t()).bfloat16()
    coarse = vocab_parallel_jsd(logits, (teacher @ weight.float().t()).bfloat16())
    assert cosine(fine) > 0.999999
    assert cosine(student_gradient(coarse, student)) < 0.9


def test_chunks_do_not_matter():
    student, teacher, weight = hidden_pair(37, 16, 1003, 0.3)
    labels = labels_for(37, 1003)
    student.requires_grad_()
    outputs = [
        linear_jsd(
            student, teacher, weight, labels=labels, sft_alpha=0.3, temperature=2.0, chunk_rows=rows
        )
        for rows in (None, 37, 36, 5, 1, 1000)
    ]
    gradients = [student_gradient(output.loss, student) for output in outputs]
    for output, gradient in zip(outputs[1:], gradients[1:]):
        torch.testing.assert_close(
            torch.stack(output), torch.stack(outputs[0]), rtol=2e-5, atol=2e-6
        )
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-7)


def test_chunks_are_nearly_equal_and_fit():
    """Not 220 rows and 36: every chunk's GEMMs read the whole head."""
    for num_rows in (1, 255, 256, 257, 300, 2048, 8191):
        rows = _chunk_rows(num_rows, 151_936, torch.device("cpu"))
        chunks = -(-num_rows // rows)
        assert rows * 151_936 * 8 <= CHUNK_BYTES["cpu"]
        assert chunks == -(
            -num_rows * 151_936 * 8 // CHUNK_BYTES["cpu"]
        )  # no more chunks than the limit asks for
        assert rows * chunks - num_rows < chunks
    cuda = torch.device("cuda")
    for own, num_bytes in ((False, 8), (True, 10)):  # float32 twice; a bfloat16 gradient
        rows = _chunk_rows(4096, 151_936, cuda, has_own_gradient=own)
        assert rows % 128 == 0 and rows * 151_936 * num_bytes <= CHUNK_BYTES["cuda"]
        assert (rows + 128) * 151_936 * num_bytes > CHUNK_BYTES["cuda"]
    assert rows == 640
    assert _chunk_rows(100, 151_936, cuda) == 100
    assert _chunk_rows(4096, 2**30, cuda, has_own_gradient=True) == 128  # a tile
    assert _chunk_rows(5, 2**40, torch.device("cpu")) == 1


def memory_by_rows(rank, world_size):
    """{rows: least of two peaks above inputs and outputs}, in a process in which nothing else has
    been allocated.
    """
    CHUNK_BYTES["cpu"] = 2**24
    meter, extra = Meter("cpu"), {}
    for num_rows in (1024, 8192):
        student, teacher, weight = hidden_pair(num_rows, 32, 4096, 0.3)
        student.requires_grad_()
        runs = [
            lambda: torch.autograd.grad(linear_jsd(student, teacher, weight).loss.sum(), student)
        ] * 3
        extra[num_rows] = min([meter(run)[1] for run in runs][1:]) - student.nbytes
    return extra


@pytest.mark.parametrize("num_rows", [40, 3000])
def test_bytes_stay_within_the_budget(num_rows, monkeypatch):
    """Of all tensors that are alive: the budget, [N, H] in float32 once in forward and twice in
    backward, and numbers of rows. No pass over the head more than the budget asks for.
    """
    hidden_size, columns, budget = 16, 2048, 2**22
    monkeypatch.setitem(CHUNK_BYTES, "cpu", budget)
    student, teacher, weight = hidden_pair(num_rows, hidden_size, columns, 0.3)
    student.requires_grad_()
    products = []
    original = linear._chunk_logits
    monkeypatch.setattr(
        linear, "_chunk_logits", lambda *given: products.append(len(given[0])) or original(*given)
    )
    memory, state = LiveBytes(), num_rows * hidden_size * 4
    memory.ignore([student, teacher, weight])
    with memory:
        loss = linear_jsd(student, teacher, weight).loss
        forward = memory.peak()
        memory.begin()
        loss.sum().backward()
    # float64 statistics; the passes' blocks, seven float32 buffers that stay in a CPU's cache
    rows, scratch = num_rows * 8 * 80, 7 * 4 * BLOCK_ENTRIES["cpu"]
    assert forward <= budget + state + rows + scratch
    assert memory.peak() <= 3 * state + rows
    # both sides' logits of every chunk
    assert len(products) == 2 * -(-num_rows * columns * 8 // budget)
    assert sum(products) == 2 * num_rows


@pytest.mark.extended
def test_memory_does_not_grow_with_the_rows():
    """Above inputs and outputs: the chunk's logits and the passes' scratch, whatever N. All logits
    would be 256 MiB.
    """
    [extra] = run_ranks(memory_by_rows, 1)
    # 16 MiB: on a busy machine huge pages have added 10 to one of the two, code unchanged.
    assert extra[1024] < 2**26 and extra[8192] < extra[1024] + 2**24, extra


def test_the_callers_thread_count_is_kept_and_used():
    """One thread asked for: no more than one core's seconds a second."""
    student, teacher, weight = hidden_pair(64, 64, 30_000, 0.3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        linear_jsd(student.requires_grad_(), teacher, weight).loss.sum().backward()
        wall, cpu = time.perf_counter(), time.process_time()
        linear_jsd(student, teacher, weight).loss.sum().backward()
        loss = vocab_parallel_jsd((student @ weight.t()), teacher @ weight.t())
        loss.sum().backward()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert cpu < 1.1 * wall + 0.02


def test_linear_jsd_keeps_one_row_of_hidden_size_a_token():
    student, teacher, weight = hidden_pair(64, 16, 4096, 0.3)
    student.requires_grad_()
    saved = []

    def record(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output = linear_jsd(student, teacher, weight, chunk_rows=8)
    assert [tuple(tensor.shape) for tensor in saved] == [(64, 16)]
    twice = [
        torch.autograd.grad(output.loss.sum(), student, retain_graph=True)[0] for _ in range(2)
    ]
    assert torch.equal(*twice)


def test_forward_only_mode_leaves_the_gradient_out(monkeypatch):
    student, teacher, weight = hidden_pair(6, 8, 100, 0.3)
    student.requires_grad_()
    trained = linear_jsd(student, teacher, weight)
    monkeypatch.setattr(
        "megatron_gkd.loss.linear._chunk_hidden_gradient",
        lambda *_: pytest.fail("a third GEMM was made"),
    )
    with torch.no_grad():
        alone = linear_jsd(student, teacher, weight)
    assert not alone.loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(alone[:7], trained[:7]))


def test_linear_jsd_of_no_rows():
    student = torch.zeros(0, 4, requires_grad=True)
    output = linear_jsd(
        student, torch.zeros(0, 4), torch.zeros(8, 4), labels=torch.zeros(0, dtype=torch.int64)
    )
    assert all(field.shape == (0,) for field in output)
    output.loss.sum().backward()
    assert student.grad.shape == (0, 4)
