"""The Triton kernels through the loss functions, against the dense float64 reference.

Where there is no CUDA, Triton's interpreter runs the same kernels. It must be switched on before triton is first
imported, hence the one process of its own that computes all cases.
"""

import multiprocessing
import os
import pickle
import traceback

import pytest
import torch

from tests.reference_loss import (
    hidden_pair,
    labels_for,
    logit_pair,
    reference_linear,
    reference_results,
    relative_error,
    student_gradient,
)

CUDA = torch.cuda.is_available()
KINDS = ("jsd", "forward_kl", "reverse_kl")
# name: rows, vocabulary, padded columns, largest block, dtype, gap of the logits, settings
LOGIT_CASES = {
    "one row": (1, 1003, 0, 4096, torch.float32, 1.0, dict(beta=0.3)),
    "one column": (3, 1, 0, 4096, torch.float32, 1.0, dict()),
    "several blocks": (5, 1003, 21, 256, torch.float32, 1.0, dict(beta=0.3, temperature=2.0, sft_alpha=0.25)),
    "float16": (4, 401, 7, 4096, torch.float16, 1.0, dict(temperature=0.5, beta=0.7)),
    "bfloat16": (4, 1271, 9, 512, torch.bfloat16, 1.0, dict(temperature=4.0, sft_alpha=0.5)),
    "near": (3, 1271, 0, 1024, torch.float32, 1e-3, dict(beta=0.7)),
    "far": (3, 401, 0, 128, torch.float32, 1e3, dict(beta=0.3)),
    "equal": (3, 1003, 0, 512, torch.float32, 0.0, dict(temperature=2.0)),
    "clipped": (3, 401, 5, 4096, torch.float32, 1.5, dict(temperature=2.0, beta=0.3, clip=1e-4)),
}
LINEAR_CASE = (5, 401, torch.float32, dict(beta=0.3, temperature=2.0, sft_alpha=0.25))


def padded(logits, num_columns):
    return torch.cat([logits, logits.new_full((len(logits), num_columns), 50.0)], 1)


def run_logits_case(kernels, kind, case):
    num_rows, vocab_size, padding, kernels.BLOCK, dtype, gap, settings = case
    student, teacher = logit_pair(num_rows, vocab_size, gap, dtype=dtype)
    device = "cuda" if CUDA else "cpu"
    student, teacher = padded(student, padding).to(device).requires_grad_(), padded(teacher, padding).to(device)
    from megatron_gkd.loss import logits_jsd

    labels = labels_for(num_rows, vocab_size).to(device)
    output = logits_jsd(student, teacher, labels=labels, divergence=kind, vocab_size=vocab_size, **settings)
    return {name: value.detach().cpu() for name, value in output._asdict().items()}, gradient_on_cpu(
        output.loss, student
    )


def gradient_on_cpu(loss, inputs):
    return student_gradient(loss, inputs).cpu()


def run_linear_case(kind):
    from megatron_gkd.loss import linear_jsd

    num_rows, vocab_size, dtype, settings = LINEAR_CASE
    device = "cuda" if CUDA else "cpu"
    student, teacher, weight = (tensor.to(device) for tensor in hidden_pair(num_rows, 16, vocab_size, 0.2, dtype=dtype))
    student.requires_grad_()
    labels = labels_for(num_rows, vocab_size).to(device)
    output = linear_jsd(student, teacher, weight, labels=labels, divergence=kind, chunk_rows=3, **settings)
    return {name: value.detach().cpu() for name, value in output._asdict().items()}, gradient_on_cpu(
        output.loss, student
    )


def run_cases(connection):
    """In the process of its own: every case with the kernels in place of the torch passes."""
    try:
        from megatron_gkd.loss import kernels, linear, logits
        from megatron_gkd.loss.divergence import passes_for

        linear.passes_for = logits.passes_for = lambda device: kernels
        results = {"chosen": [passes_for(torch.device(name)).__name__ for name in ("cpu", "cuda")]}
        for kind in KINDS:
            for name, case in LOGIT_CASES.items():
                results[name, kind] = run_logits_case(kernels, kind, case)
            results["linear", kind] = run_linear_case(kind)
        connection.send(pickle.dumps(results))
    except Exception:
        connection.send(pickle.dumps(traceback.format_exc()))
    connection.close()


@pytest.fixture(scope="module")
def computed():
    """(case's name, kind) -> (the output's fields, the gradient)."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    before = os.environ.get("TRITON_INTERPRET")
    try:
        if not CUDA:
            os.environ["TRITON_INTERPRET"] = "1"
        process = context.Process(target=run_cases, args=(sender,))
        process.start()
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    sender.close()
    results = pickle.loads(receiver.recv())
    process.join()
    if isinstance(results, str):
        pytest.fail(results)
    return results


def check_fields(output, expected, tolerance):
    for name, value in output.items():
        assert relative_error(value, expected[name]) < tolerance, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in LOGIT_CASES if name not in ("equal", "near")])
def test_kernels_equal_reference(computed, name, kind):
    num_rows, vocab_size, padding, _, dtype, gap, settings = LOGIT_CASES[name]
    student, teacher = logit_pair(num_rows, vocab_size, gap, dtype=dtype)
    exact_student = student.double().requires_grad_()
    expected = reference_results(exact_student, teacher, labels_for(num_rows, vocab_size), divergence=kind, **settings)
    expected_gradient = student_gradient(expected["loss"], exact_student)
    output, gradient = computed[name, kind]
    check_fields(output, expected, 1e-4 if name == "far" else 1e-5)
    assert torch.count_nonzero(gradient[:, vocab_size:]) == 0
    # the interpreter truncates to bfloat16 where the device rounds
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    difference = (gradient[:, :vocab_size].double() - expected_gradient).norm()
    assert difference <= (2e-5 + rounding) * expected_gradient.norm() + (1e-5 if name == "far" else 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_keep_the_gradient_of_nearly_equal_logits(computed, kind):
    num_rows, vocab_size, _, _, _, gap, settings = LOGIT_CASES["near"]
    student, teacher = logit_pair(num_rows, vocab_size, gap)
    exact_student = student.double().requires_grad_()
    expected = reference_results(exact_student, teacher, labels_for(num_rows, vocab_size), divergence=kind, **settings)
    output, gradient = computed["near", kind]
    check_fields(output, expected, 2e-3)
    assert relative_error(gradient, student_gradient(expected["loss"], exact_student)) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_give_exactly_nothing_at_equality(computed, kind):
    output, gradient = computed["equal", kind]
    assert torch.count_nonzero(output["loss"]) == 0 and torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_linear_jsd_with_kernels(computed, kind):
    """The gradient is written over the teacher's logits, in place."""
    num_rows, vocab_size, dtype, settings = LINEAR_CASE
    expected, expected_gradient = reference_linear(
        *hidden_pair(num_rows, 16, vocab_size, 0.2, dtype=dtype),
        labels_for(num_rows, vocab_size),
        dict(settings, divergence=kind),
    )
    output, gradient = computed["linear", kind]
    check_fields(output, expected, 2e-5)
    assert relative_error(gradient, expected_gradient) < 5e-6


def test_triton_is_chosen_on_cuda_only(computed):
    assert computed["chosen"] == ["megatron_gkd.loss.blocked", "megatron_gkd.loss.kernels"]
