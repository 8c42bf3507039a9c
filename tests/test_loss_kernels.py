"""The Triton kernels through the loss functions, against the dense float64 reference.

Where there is no CUDA, Triton's interpreter runs the same kernels. It must be switched on before
triton is first imported, hence the one process of its own that computes all cases.
"""

import pytest
import torch

from benchmarks import kernel_instructions
from megatron_gkd.loss import torch_kernels
from megatron_gkd.loss.divergence import KINDS
from tests.processes import in_a_process
from tests.reference_loss import (
    hidden_pair,
    labels_for,
    logit_pair,
    reference_linear,
    reference_results,
    relative_error,
    shifted_pair,
    student_gradient,
)

CUDA = torch.cuda.is_available()
# name: rows, vocabulary, padded columns, largest block, dtype, gap of the logits, settings
LOGIT_CASES = {
    "one row": (1, 1003, 0, 4096, torch.float32, 1.0, dict(beta=0.3)),
    "one column": (3, 1, 0, 4096, torch.float32, 1.0, dict()),
    "one column, T 0.7": (3, 1, 0, 4096, torch.float32, 1.0, dict(temperature=0.7, beta=0.3)),
    "several blocks": (
        5,
        1003,
        21,
        256,
        torch.float32,
        1.0,
        dict(beta=0.3, temperature=2.0, sft_alpha=0.25),
    ),
    "float16": (4, 401, 7, 4096, torch.float16, 1.0, dict(temperature=0.5, beta=0.7)),
    "bfloat16": (4, 1271, 9, 512, torch.bfloat16, 1.0, dict(temperature=4.0, sft_alpha=0.5)),
    "near": (3, 1271, 0, 1024, torch.float32, 1e-3, dict(beta=0.7)),
    "far": (3, 401, 0, 128, torch.float32, 1e3, dict(beta=0.3)),
    "equal": (3, 1003, 0, 512, torch.float32, 0.0, dict(temperature=2.0)),
    "shifted": (3, 1003, 0, 512, torch.float32, None, dict(temperature=0.7)),
    "clipped": (3, 401, 5, 4096, torch.float32, 1.5, dict(temperature=2.0, beta=0.3, clip=1e-4)),
    "top 20": (4, 1003, 21, 256, torch.float32, 1.0, dict(temperature=2.0, beta=0.3, top_k=20)),
    "top 1": (3, 401, 0, 4096, torch.float32, 3.0, dict(top_k=1, sft_alpha=0.25)),
    # the rest is more than the clip allows, and some of the best are
    "top 3, clipped": (3, 401, 5, 4096, torch.float32, 1.5, dict(top_k=3, clip=1e-2)),
    "top 30, bfloat16": (4, 1271, 9, 512, torch.bfloat16, 1.0, dict(temperature=2.0, top_k=30)),
    "top more than all": (2, 40, 8, 16, torch.float32, 1.0, dict(top_k=50)),
    "top 5, sharp": (3, 401, 0, 128, torch.float32, 10.0, dict(top_k=5, beta=0.3)),
    "top 20, equal": (3, 1003, 0, 512, torch.float32, 0.0, dict(temperature=2.0, top_k=20)),
    "top 20, shifted": (3, 1003, 0, 512, torch.float32, None, dict(temperature=0.7, top_k=20)),
    "teacher's weight 0.9": (3, 401, 0, 256, torch.float32, 2.0, dict(beta=0.1)),
    "student's weight 0.9": (3, 401, 0, 256, torch.float32, 2.0, dict(beta=0.9)),
}
EQUAL_SOFTMAXES = (
    *("one column", "one column, T 0.7", "equal", "shifted"),
    *("top 20, equal", "top 20, shifted"),
)
# every case of the whole vocabulary in every kind; those of a top K in one each, two in all
IN_ALL_KINDS = {name for name in LOGIT_CASES if not name.startswith("top")}
IN_ALL_KINDS |= {"top 20", "top 3, clipped"}
LOGIT_RUNS = [
    (name, kind)
    for index, name in enumerate(LOGIT_CASES)
    for number, kind in enumerate(KINDS)
    if name in IN_ALL_KINDS or index % len(KINDS) == number
]
# name: rows, hidden size, vocabulary, largest block, dtype, settings
LINEAR_CASES = {
    f"{num_rows} x {hidden_size} x {vocab_size} {dtype}": (
        num_rows,
        hidden_size,
        vocab_size,
        block,
        dtype,
        settings,
    )
    for num_rows, hidden_size, vocab_size, block, settings in [
        (1, 16, 401, 4096, dict(temperature=2.0)),
        (18, 24, 1003, 512, dict(beta=0.3, temperature=2.0, sft_alpha=0.25)),
        (17, 401, 1271, 4096, dict(temperature=0.5)),
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}
LINEAR_RUNS = [
    (name, kind)
    for name, (*_, dtype, _) in LINEAR_CASES.items()
    for kind in {
        torch.float32: KINDS,
        torch.bfloat16: ("jsd", "reverse_kl"),
        torch.float16: ("jsd",),
    }[dtype]
]
# rank of 401 columns, of which the first so many are no padding
PASS_CASES = [(0, 401), (2, 401), (1, 37), (3, 0)]


def padded(logits, num_columns):
    return torch.cat([logits, logits.new_full((len(logits), num_columns), 50.0)], 1)


def run_logits_case(kernels, kind, case):
    num_rows, vocab_size, padding, kernels.BLOCK, dtype, gap, settings = case
    student, teacher = (
        shifted_pair(num_rows, vocab_size)
        if gap is None
        else logit_pair(num_rows, vocab_size, gap, dtype=dtype)
    )
    device = "cuda" if CUDA else "cpu"
    student, teacher = (
        padded(student, padding).to(device).requires_grad_(),
        padded(teacher, padding).to(device),
    )
    from megatron_gkd.loss import logits_jsd

    labels = labels_for(num_rows, vocab_size).to(device)
    output = logits_jsd(
        student, teacher, labels=labels, divergence=kind, vocab_size=vocab_size, **settings
    )
    return {
        name: value.detach().cpu() for name, value in output._asdict().items()
    }, gradient_on_cpu(output.loss, student)


def gradient_on_cpu(loss, inputs):
    return student_gradient(loss, inputs).cpu()


def run_linear_case(kernels, kind, case):
    from megatron_gkd.loss import linear_jsd

    num_rows, hidden_size, vocab_size, kernels.BLOCK, dtype, settings = case
    device = "cuda" if CUDA else "cpu"
    student, teacher, weight = (
        tensor.to(device)
        for tensor in hidden_pair(num_rows, hidden_size, vocab_size, 0.2, dtype=dtype)
    )
    student.requires_grad_()
    labels = labels_for(num_rows, vocab_size).to(device)
    output = linear_jsd(
        student, teacher, weight, labels=labels, divergence=kind, chunk_rows=16, **settings
    )
    return {
        name: value.detach().cpu() for name, value in output._asdict().items()
    }, gradient_on_cpu(output.loss, student)


def run_pass(passes, rank, num_columns, device, top_k=None):
    """The three passes of one module on a rank's own columns, the last of which are padding; with
    top_k after the statistics of the rest, of which other ranks have a part.
    """
    from megatron_gkd.loss import Divergence
    from megatron_gkd.loss.rows import GradientFactors, row_scalars

    first_column, temperature = rank * 401, 2.0
    student, teacher = (logits.to(device) for logits in logit_pair(6, 401, 1.0, seed=rank))
    columns = torch.tensor(
        [first_column + 3, 5, first_column + 399, -100, first_column, 2000], device=device
    )
    labels = torch.stack([columns, columns + 1], 1)[:, 0]  # not contiguous
    sides = [
        passes.statistics(logits, num_columns, temperature, first_column, labels, True)
        for logits in (student, teacher)
    ]
    whole = [
        side._replace(sum_exp=side.sum_exp + 2.0, unit_sum_exp=side.unit_sum_exp + 3.0)
        for side in sides
    ]  # of other ranks
    clip = None if top_k is None else 1e-3
    rows, divergence = (
        row_scalars(*whole, temperature),
        Divergence(beta=0.3, temperature=temperature, clip=clip, top_k=top_k),
    )
    rest = []
    if top_k is not None:
        lowest = teacher[:, :top_k].amin(1, keepdim=True)  # a tie at least, in the last column
        last = torch.linspace(-1, 401, 6, device=device).round()[:, None]
        rows = rows._replace(lowest=lowest, last_column=last)
        arguments = dict(labels=None, metrics=False, rest_of=(teacher, rows))
        rest = [
            passes.statistics(logits, num_columns, temperature, first_column, **arguments)
            for logits in (student, teacher)
        ]
        shift = torch.linspace(-2, 2, 6, device=device)[:, None]
        rows = rows._replace(rest_shift=shift, rest_mass=shift.abs() / 3)
    kept_a = torch.empty_like(student) if torch.float32 in passes.DTYPES_THAT_KEEP_A else None
    sums = passes.compare(student, teacher, num_columns, rows, divergence, True, a_out=kept_a)
    factor = torch.linspace(-1.0, 2.0, 6, device=device).unsqueeze(1)
    factors = GradientFactors(factor, factor * 0.1, 1.0 - factor, labels - first_column)
    gradient = torch.full_like(student, 50.0)
    second = teacher if kept_a is None else kept_a
    passes.write_gradient(gradient, student, second, num_columns, rows, divergence, factors)
    sides += rest
    return [
        tensor.cpu() for tensor in (*(field for side in sides for field in side), *sums, gradient)
    ]


def run_far_rows():
    """Gradient and loss of rows that lie further apart than 32 bits count, and of the same rows
    side by side.
    """
    from megatron_gkd.loss import logits_jsd

    device, stride = (
        "cuda" if CUDA else "cpu",
        2**30 + 16,
    )  # the last of three rows starts beyond 2^31
    close = [logits.to(device) for logits in logit_pair(3, 40, 1.0, dtype=torch.bfloat16)]
    far = []
    for logits in close:
        memory = torch.empty(
            2 * stride + 40, dtype=torch.bfloat16, device=device
        )  # a page is made where it is written
        far.append(torch.as_strided(memory, (3, 40), (stride, 1)).copy_(logits))
    results = []
    for student, teacher in (close, far):
        output = logits_jsd(
            student.requires_grad_(), teacher, labels=labels_for(3, 40).to(device), sft_alpha=0.2
        )
        results.append((output.loss.detach().cpu(), gradient_on_cpu(output.loss, student)))
    return results


def run_cases():
    """In the process of its own: every case with the kernels in place of the torch passes."""
    from megatron_gkd.loss import passes
    from megatron_gkd.loss import triton_kernels as kernels

    chosen = [passes.select_kernels(torch.device(name)) for name in ("cpu", "cuda")]
    passes.select_kernels = lambda device: kernels
    results = {"chosen": [module.__name__ for module in chosen]}
    for name, kind in LOGIT_RUNS:
        results[name, kind] = run_logits_case(kernels, kind, LOGIT_CASES[name])
    for name, kind in LINEAR_RUNS:
        results[name, kind] = run_linear_case(kernels, kind, LINEAR_CASES[name])
    device = "cuda" if CUDA else "cpu"
    for rank, num_columns in PASS_CASES:
        for top_k in (None, 9):
            found = run_pass(kernels, rank, num_columns, device, top_k)
            results["passes", rank, num_columns, top_k] = found
    results["far"] = run_far_rows()
    return results


@pytest.fixture(scope="module")
def computed():
    """(case's name, kind) -> (the output's fields, the gradient)."""
    return in_a_process(run_cases, interpret_triton=not CUDA)


def check_fields(output, expected, tolerance):
    for name, value in output.items():
        assert relative_error(value, expected[name]) < tolerance, name


@pytest.mark.parametrize(
    "name, kind", [run for run in LOGIT_RUNS if run[0] not in (*EQUAL_SOFTMAXES, "near")]
)
def test_kernels_equal_reference(computed, name, kind):
    num_rows, vocab_size, padding, _, dtype, gap, settings = LOGIT_CASES[name]
    student, teacher = logit_pair(num_rows, vocab_size, gap, dtype=dtype)
    exact_student = student.double().requires_grad_()
    expected = reference_results(
        exact_student, teacher, labels_for(num_rows, vocab_size), divergence=kind, **settings
    )
    expected_gradient = student_gradient(expected["loss"], exact_student)
    output, gradient = computed[name, kind]
    check_fields(output, expected, 1e-4 if name == "far" else 1e-5)
    assert torch.count_nonzero(gradient[:, vocab_size:]) == 0
    # the interpreter truncates to bfloat16 where the device rounds
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    difference = (gradient[:, :vocab_size].double() - expected_gradient).norm()
    assert difference <= (2e-5 + rounding) * expected_gradient.norm() + (
        1e-5 if name == "far" else 0.0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_keep_the_gradient_of_nearly_equal_logits(computed, kind):
    num_rows, vocab_size, _, _, _, gap, settings = LOGIT_CASES["near"]
    student, teacher = logit_pair(num_rows, vocab_size, gap)
    exact_student = student.double().requires_grad_()
    expected = reference_results(
        exact_student, teacher, labels_for(num_rows, vocab_size), divergence=kind, **settings
    )
    output, gradient = computed["near", kind]
    check_fields(output, expected, 2e-3)
    assert relative_error(gradient, student_gradient(expected["loss"], exact_student)) < 2e-6


@pytest.mark.parametrize("name, kind", [run for run in LOGIT_RUNS if run[0] in EQUAL_SOFTMAXES])
def test_kernels_give_exactly_nothing_at_equality(computed, name, kind):
    """Also where the logits differ: a fused multiply-add would subtract a rounded
    product from an exact one.
    """
    output, gradient = computed[name, kind]
    for field in ("loss", "jsd", "kl_forward", "kl_reverse"):
        assert torch.count_nonzero(output[field]) == 0, field
    assert torch.count_nonzero(gradient) == 0
    if LOGIT_CASES[name][1] == 1:
        num_rows, vocab_size, _, _, _, gap, settings = LOGIT_CASES[name]
        pair, labels = logit_pair(num_rows, vocab_size, gap), labels_for(num_rows, vocab_size)
        expected = reference_results(*pair, labels, divergence=kind, **settings)
        for field, value in output.items():
            torch.testing.assert_close(value.double(), expected[field], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name, kind", LINEAR_RUNS)
def test_linear_jsd_with_kernels(computed, name, kind):
    """The gradient is written over the teacher's logits, in place."""
    num_rows, hidden_size, vocab_size, _, dtype, settings = LINEAR_CASES[name]
    expected, expected_gradient = reference_linear(
        *hidden_pair(num_rows, hidden_size, vocab_size, 0.2, dtype=dtype),
        labels_for(num_rows, vocab_size),
        dict(settings, divergence=kind),
    )
    output, gradient = computed[name, kind]
    check_fields(output, expected, 2e-5)
    # at the end the hidden states' gradient is rounded to their dtype, on CUDA the logits' to
    # bfloat16 before
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * (2 if CUDA else 1)
    assert gradient.dtype == dtype and relative_error(gradient, expected_gradient) < 5e-6 + rounding


@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("rank, num_columns", PASS_CASES)
def test_kernels_equal_the_torch_passes_on_a_rank(computed, rank, num_columns, top_k):
    """Columns that start at first_column, ranks that own some columns or none, labels that are not
    contiguous.
    """
    expected_fields = run_pass(torch_kernels, rank, num_columns, "cpu", top_k)
    for found, expected in zip(
        computed["passes", rank, num_columns, top_k], expected_fields, strict=True
    ):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert relative_error(found, expected) < 2e-6


def test_offsets_have_64_bits(computed):
    (loss, gradient), (far_loss, far_gradient) = computed["far"]
    assert (
        torch.equal(loss, far_loss)
        and torch.equal(gradient, far_gradient)
        and gradient.isfinite().all()
    )


@pytest.mark.parametrize("dtype, top_k", [("fp32", None), ("bf16", None), ("fp16", 20)])
def test_kernels_compile_for_a_gpu_that_is_not_here(dtype, top_k):
    """The interpreter accepts programs that Triton's compiler does not."""
    counts = kernel_instructions.count_all(dtype, metrics=True, top_k=top_k)
    assert set(counts) == set(KINDS) and all(20 < count < 300 for count in counts.values())


def test_triton_is_chosen_on_cuda_only(computed):
    assert computed["chosen"] == [
        "megatron_gkd.loss.torch_kernels",
        "megatron_gkd.loss.triton_kernels",
    ]
