"""The loss on one rank: values and gradients against the dense float64 reference and TRL,
exactness, memory, errors.
"""

import math

import pytest
import torch
from trl.experimental.gkd import GKDTrainer
from trl.experimental.sdft.loss_utils import add_tail_bucket, compute_divergence

from megatron_gkd.loss import linear_jsd, logits_jsd, vocab_parallel_jsd
from megatron_gkd.loss.divergence import KINDS
from tests.reference_loss import (
    hidden_pair,
    labels_for,
    logit_pair,
    reference_results,
    relative_error,
    shifted_pair,
    student_gradient,
    upstream_for,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "gap, value_tolerance", [(1e-3, 2e-3), (1e-2, 2e-4), (1.0, 2e-6), (10.0, 2e-6)]
)
def test_logits_jsd_equals_reference(kind, gap, value_tolerance):
    for temperature, beta, sft_alpha in [
        (0.5, 0.3, 0.0),
        (1.0, 0.5, 0.25),
        (2.0, 0.7, 0.0),
        (4.0, 0.5, 0.5),
    ]:
        student, teacher = logit_pair(7, 1003, gap)
        labels = labels_for(7, 1003)
        student.requires_grad_()
        settings = dict(beta=beta, temperature=temperature, divergence=kind, sft_alpha=sft_alpha)
        output = logits_jsd(student, teacher, labels=labels, **settings)
        exact_student = student.detach().double().requires_grad_()
        expected = reference_results(exact_student, teacher, labels, **settings)
        for name in ("loss", "jsd", "kl_forward", "kl_reverse"):
            assert relative_error(getattr(output, name), expected[name]) < value_tolerance, name
        for name in (
            "entropy_student",
            "entropy_teacher",
            "sft_loss",
            "label_logprob_student",
            "label_logprob_teacher",
        ):
            assert relative_error(getattr(output, name), expected[name]) < 2e-6, name
        assert torch.equal(output.top1_agreement, expected["top1_agreement"].float())
        assert torch.equal(output.token_correct, expected["token_correct"].float())
        gradient = student_gradient(output.loss, student)
        # where both softmaxes have collapsed (gap 10, T 0.5) the jsd's gradient is a difference of
        # nearly equal numbers
        tolerance = 1e-4 if gap == 10.0 else 2e-6
        assert (
            relative_error(gradient, student_gradient(expected["loss"], exact_student)) < tolerance
        )


@pytest.mark.parametrize("kind", KINDS)
def test_clip_equals_reference(kind):
    """Entries above the clip count as the clip and give no gradient; a clip that nothing reaches
    changes no bit.
    """
    student, teacher = logit_pair(7, 401, 1.5)
    student.requires_grad_()
    largest = logits_jsd(student, teacher, divergence=kind, beta=0.3, clip=100.0)
    unclipped = logits_jsd(student, teacher, divergence=kind, beta=0.3)
    assert torch.equal(largest.loss, unclipped.loss)
    assert torch.equal(
        student_gradient(largest.loss, student), student_gradient(unclipped.loss, student)
    )
    for clip in (1e-3, 1e-4):
        output = logits_jsd(student, teacher, divergence=kind, beta=0.3, temperature=2.0, clip=clip)
        exact_student = student.detach().double().requires_grad_()
        expected = reference_results(exact_student, teacher, None, 0.0, 0.3, 2.0, kind, clip)
        # terms of either sign: 4.5e-6 where the CPU has no AVX2, 3.8e-6 elsewhere
        assert relative_error(output.loss, expected["loss"]) < 1e-5
        assert relative_error(output.kl_forward, expected["kl_forward"]) < 5e-6
        assert (
            expected["jsd"]
            < reference_results(exact_student, teacher, None, 0.0, 0.3, 2.0, kind)["jsd"]
        ).any()
        assert (
            relative_error(
                student_gradient(output.loss, student),
                student_gradient(expected["loss"], exact_student),
            )
            < 5e-6
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [None, 1e-2])
def test_top_k_equals_reference(kind, dtype, clip):
    """A kept between the passes and computed again, with a rest of much and of little mass."""
    for temperature, top_k, sft_alpha in [(0.5, 3, 0.25), (2.0, 40, 0.0)]:
        student, teacher = logit_pair(7, 1003, 1.5, dtype=dtype)
        labels = labels_for(7, 1003)
        settings = dict(beta=0.3, temperature=temperature, divergence=kind, sft_alpha=sft_alpha)
        settings |= dict(top_k=top_k, clip=clip)
        exact_student = student.double().requires_grad_()
        expected = reference_results(exact_student, teacher, labels, **settings)
        student.requires_grad_()
        output = logits_jsd(student, teacher, labels=labels, **settings)
        for name, value in output._asdict().items():
            assert relative_error(value, expected[name]) < 5e-6, name
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        gradient = student_gradient(output.loss, student)
        expected_gradient = student_gradient(expected["loss"], exact_student)
        assert relative_error(gradient, expected_gradient) < 5e-6 + rounding


def test_top_k_of_all_entries_is_the_whole_divergence():
    student, teacher = logit_pair(5, 401, 1.0)
    student.requires_grad_()
    whole = logits_jsd(student, teacher, beta=0.3)
    gradient = student_gradient(whole.loss, student)
    for top_k in (401, 500):
        output = logits_jsd(student, teacher, beta=0.3, top_k=top_k)
        assert torch.equal(output.loss, whole.loss)
        assert torch.equal(student_gradient(output.loss, student), gradient)
    # merging outcomes only loses what tells the sides apart
    fewer = logits_jsd(student, teacher, beta=0.3, top_k=20)
    assert (fewer.jsd < whole.jsd).all() and (fewer.kl_reverse < whole.kl_reverse).all()


@pytest.mark.parametrize("kind, alpha", [("jsd", 0.7), ("forward_kl", 0.0), ("reverse_kl", 1.0)])
def test_top_k_equals_trl(kind, alpha):
    """TRL's self-distillation with a bucket for the tail; its alpha is the weight of the side that
    it is given second.
    """
    student, teacher = logit_pair(5, 401, 1.0)
    chosen = teacher.topk(12).indices
    sides = [
        add_tail_bucket(side.double().log_softmax(-1).gather(-1, chosen))
        for side in (student, teacher)
    ]
    expected = compute_divergence(*sides, alpha)
    output = logits_jsd(student, teacher, divergence=kind, beta=1 - alpha or 0.5, top_k=12)
    assert relative_error(output.loss, expected) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_real_vocabulary(kind):
    student, teacher = logit_pair(3, 151936, 0.3)
    student.requires_grad_()
    loss = vocab_parallel_jsd(student, teacher, beta=0.3, temperature=2.0, divergence=kind)
    exact_student = student.detach().double().requires_grad_()
    expected = reference_results(exact_student, teacher, None, 0.0, 0.3, 2.0, kind)["loss"]
    assert relative_error(loss, expected) < 1e-5
    assert (
        relative_error(student_gradient(loss, student), student_gradient(expected, exact_student))
        < 2e-6
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_logits_give_exactly_nothing(dtype, temperature):
    for kind in KINDS:
        student, _ = logit_pair(5, 20011, 0.0, dtype=dtype)
        student.requires_grad_()
        output = logits_jsd(
            student, student.detach().clone(), divergence=kind, temperature=temperature, beta=0.3
        )
        for name in ("loss", "kl_forward", "kl_reverse"):
            assert torch.count_nonzero(getattr(output, name)) == 0, (name, kind)
        assert output.top1_agreement.eq(1).all()
        assert torch.count_nonzero(student_gradient(output.loss, student)) == 0, kind


def test_logits_that_differ_by_a_number_give_exactly_nothing():
    for num_columns, temperature in ((1, 0.7), (1003, 0.7), (1003, 1.0)):
        student, teacher = shifted_pair(4, num_columns)
        for kind in KINDS:
            output = logits_jsd(
                student.requires_grad_(), teacher, divergence=kind, temperature=temperature
            )
            assert torch.count_nonzero(output.loss) == torch.count_nonzero(output.kl_forward) == 0
            assert torch.count_nonzero(student_gradient(output.loss, student)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_compared_in_float32(dtype):
    student, teacher = logit_pair(6, 4099, 0.5, dtype=dtype)
    student.requires_grad_()
    loss = vocab_parallel_jsd(student, teacher, temperature=2.0)
    exact_student = student.detach().double().requires_grad_()
    expected = reference_results(exact_student, teacher, temperature=2.0)["loss"]
    assert loss.dtype == torch.float32 and relative_error(loss, expected) < 1e-5
    gradient = student_gradient(loss, student)
    rounded = student_gradient(expected, exact_student).to(dtype)
    assert gradient.dtype == dtype
    assert relative_error(gradient, rounded.double()) < torch.finfo(dtype).eps  # both round once


@pytest.mark.parametrize("kind", KINDS)
def test_far_apart_logits_stay_finite(kind):
    for temperature in (0.5, 1.0, 4.0):
        student, teacher = logit_pair(4, 501, 1e4)
        student.requires_grad_()
        output = logits_jsd(student, teacher, temperature=temperature, divergence=kind, beta=0.3)
        exact_student = student.detach().double().requires_grad_()
        expected = reference_results(exact_student, teacher, None, 0.0, 0.3, temperature, kind)
        # float32 logits near 1e4 are 1e-3 apart
        torch.testing.assert_close(output.loss, expected["loss"].float(), rtol=1e-6, atol=1e-2)
        gradient, exact = (
            student_gradient(output.loss, student),
            student_gradient(expected["loss"], exact_student),
        )
        assert gradient.isfinite().all()
        assert (gradient.double() - exact).norm() < 1e-5 * max(exact.norm().item(), 1.0)


def test_one_hot_opposites_reach_the_bound():
    student = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    loss = vocab_parallel_jsd(student, student.detach().flip(1), beta=0.3)
    assert loss.item() == pytest.approx(-0.3 * math.log(0.3) - 0.7 * math.log(0.7), rel=1e-6)
    assert student_gradient(loss, student).abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(
    "our_beta, kind, trl_beta",
    [(0.5, "jsd", 0.5), (0.3, "jsd", 0.7), (0.5, "forward_kl", 0.0), (0.5, "reverse_kl", 1.0)],
)
def test_equals_trl(our_beta, kind, trl_beta, temperature):
    student, teacher = (logits.double() for logits in logit_pair(6, 1271, 1.0))
    student.requires_grad_()
    upstream = upstream_for(6).double()
    per_entry = GKDTrainer.generalized_jsd_loss(
        student.unsqueeze(0),
        teacher.unsqueeze(0),
        beta=trl_beta,
        temperature=temperature,
        reduction="none",
    )
    expected = per_entry.sum(-1).squeeze(0)
    expected_gradient = torch.autograd.grad(expected, student, upstream)[0]
    ours = student.detach().float().requires_grad_()
    loss = vocab_parallel_jsd(
        ours, teacher.float(), beta=our_beta, temperature=temperature, divergence=kind
    )
    assert relative_error(loss, expected) < 2e-6
    assert relative_error(student_gradient(loss, ours), expected_gradient) < 2e-6


def test_padded_columns_have_no_mass():
    student, teacher = logit_pair(5, 401, 1.0)
    poison = torch.full((5, 39), float("nan"))
    padded = torch.cat([student, poison], 1).requires_grad_()
    loss = vocab_parallel_jsd(padded, torch.cat([teacher, poison], 1), vocab_size=401)
    plain = student.clone().requires_grad_()
    expected = vocab_parallel_jsd(plain, teacher)
    assert torch.equal(loss, expected)
    gradient = student_gradient(loss, padded)
    assert torch.equal(gradient[:, :401], student_gradient(expected, plain))
    assert torch.count_nonzero(gradient[:, 401:]) == 0


def test_a_tie_goes_to_the_lowest_column():
    student, teacher = torch.zeros(1, 6), torch.zeros(1, 6)
    student[0, [2, 4]] = 3.0
    teacher[0, 2] = 3.0
    output = logits_jsd(student, teacher, labels=torch.tensor([2]))
    assert output.top1_agreement.item() == 1 and output.token_correct.item() == 1


@pytest.mark.parametrize(
    "dtype, kept",
    [(torch.bfloat16, {"student", "teacher"}), (torch.float32, {"student", "gradient"})],
)
def test_what_is_kept_for_backward(dtype, kept):
    """Of the logits' size: 16-bit logits themselves; of float32 logits the student's and the
    gradient's memory.
    """
    student, teacher = (
        logits.requires_grad_() for logits in logit_pair(64, 1024, 1.0, dtype=dtype)
    )
    saved = []

    def record(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output = logits_jsd(
            student, teacher, labels=labels_for(64, 1024), sft_alpha=0.5, temperature=2.0
        )
    gradient = torch.autograd.grad(output.loss.sum(), student)[0]
    names = {
        student.data_ptr(): "student",
        teacher.data_ptr(): "teacher",
        gradient.data_ptr(): "gradient",
    }
    assert {names[tensor.data_ptr()] for tensor in saved if tensor.numel() >= 1024} == kept
    assert gradient.dtype == dtype


def test_a_second_backward_is_refused_where_the_gradient_took_its_input():
    student, teacher = logit_pair(3, 10, 1.0)
    loss = vocab_parallel_jsd(student.requires_grad_(), teacher)
    torch.autograd.grad(loss.sum(), student, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss.sum(), student)


@pytest.mark.parametrize(
    "function", [vocab_parallel_jsd, lambda *inputs: linear_jsd(*inputs, torch.eye(10)).loss]
)
def test_a_gradient_of_the_gradient_is_refused(function):
    """It would leave out how the gradient depends on the logits, and be wrong without a word."""
    student, teacher = logit_pair(3, 10, 1.0)
    loss = function(student.requires_grad_(), teacher)
    gradient = torch.autograd.grad(loss.square().sum(), student, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_masked_row_may_hold_anything(poison):
    labels = labels_for(5, 301)
    for temperature, sft_alpha in [(1.0, 0.0), (2.0, 0.3)]:
        settings = dict(labels=labels, temperature=temperature, sft_alpha=sft_alpha)
        student, teacher, weight = hidden_pair(5, 12, 301, 0.3)
        for function, inputs in [
            (lambda s, t: linear_jsd(s, t, weight, chunk_rows=2, **settings), (student, teacher)),
            (lambda s, t: logits_jsd(s, t, **settings), logit_pair(5, 301, 1.0)),
        ]:
            clean = inputs[0].clone().requires_grad_()
            expected = function(clean, inputs[1])
            dirty = [tensor.clone() for tensor in inputs]
            for tensor in dirty:
                tensor[1, 3:] = poison
            output = function(dirty[0].requires_grad_(), dirty[1])
            assert all(torch.equal(a, b) for a, b in zip(output, expected))
            gradient = student_gradient(output.loss, dirty[0])
            assert torch.equal(gradient, student_gradient(expected.loss, clean))
            assert torch.count_nonzero(gradient[1]) == 0


def test_a_trainable_head_takes_the_logits_path():
    """The gradient goes on through the logits to the head and the hidden states."""
    hidden, teacher_hidden, weight = hidden_pair(5, 12, 301, 0.3)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = vocab_parallel_jsd(
        hidden @ weight.t(), (teacher_hidden @ weight.t()).detach(), temperature=2.0
    )
    gradients = torch.autograd.grad(loss, (hidden, weight), upstream_for(5))
    exact_hidden, exact_weight = (
        tensor.detach().double().requires_grad_() for tensor in (hidden, weight)
    )
    teacher_logits = (teacher_hidden.double() @ exact_weight.t()).detach()
    expected = reference_results(exact_hidden @ exact_weight.t(), teacher_logits, temperature=2.0)[
        "loss"
    ]
    expected_gradients = torch.autograd.grad(
        expected, (exact_hidden, exact_weight), upstream_for(5).double()
    )
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert relative_error(gradient, expected_gradient) < 5e-6


def test_no_rows():
    student = torch.zeros(0, 8, requires_grad=True)
    output = logits_jsd(
        student, torch.zeros(0, 8), labels=torch.zeros(0, dtype=torch.int64), sft_alpha=0.5
    )
    assert all(field.shape == (0,) for field in output)
    output.loss.sum().backward()
    assert student.grad.shape == (0, 8)


def test_forward_only_mode_gives_the_same_values():
    student, teacher = logit_pair(5, 300, 1.0)
    labels = labels_for(5, 300)
    with torch.no_grad():
        alone = logits_jsd(student, teacher, labels=labels)
    trained = logits_jsd(student.requires_grad_(), teacher, labels=labels)
    assert not alone.loss.requires_grad and trained.loss.requires_grad
    assert not any(field.requires_grad for field in trained[1:])
    assert all(torch.equal(a, b) for a, b in zip(alone, trained))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"divergence": "kl"}, "divergence must be one of jsd, forward_kl, reverse_kl, got 'kl'"),
        ({"beta": 1.0}, "inside .0, 1. for divergence='jsd', got 1.0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"clip": 0.0}, "clip must be positive, or None for no limit, got 0.0"),
        ({"vocab_size": 9}, r"vocab_size must lie in 1 .. 8 .*, got 9"),
        ({"sft_alpha": 0.5}, "there are no labels"),
        ({"sft_alpha": 1.5}, r"sft_alpha must lie in \[0, 1\], got 1.5"),
        (
            {"labels": torch.tensor([1, 8])},
            "label 8 is not -100 and not below the vocabulary size 8",
        ),
        ({"labels": torch.tensor([1])}, "each of the 2 rows"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        logits_jsd(torch.zeros(2, 8), torch.zeros(2, 8), **change)
    with pytest.raises(ValueError, match=message):
        linear_jsd(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(8, 3), **change)


def test_settings_are_checked_without_rows_too():
    for change, message in [
        ({"divergence": "kl"}, "must be one of"),
        ({"temperature": -1.0}, "temperature must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_jsd(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(8, 3), **change)
        with pytest.raises(ValueError, match=message):
            logits_jsd(torch.zeros(0, 8), torch.zeros(0, 8), **change)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 8\) and \(2, 7\)"):
        vocab_parallel_jsd(torch.zeros(2, 8), torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(1, 3\)"):
        linear_jsd(torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(8, 3))
    with pytest.raises(
        ValueError, match=r"weight must be \[V/TP, 3\] like the hidden states, got \(8, 4\)"
    ):
        linear_jsd(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(8, 4))
    with pytest.raises(ValueError, match="freeze it, or use logits_jsd"):
        linear_jsd(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(8, 3, requires_grad=True))
