"""The loss on 2, 4 and 8 ranks: values and gradients against the dense float64 reference,
collectives counted.
"""

from collections import Counter

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.loss import linear_jsd, logits_jsd
from tests.ranks import run_ranks
from tests.reference_loss import (
    hidden_pair,
    labels_for,
    logit_pair,
    reference_linear,
    reference_results,
    relative_error,
    student_gradient,
)

# rows, vocabulary, gap of the logits, settings; the vocabulary is padded to what the ranks divide,
# or further
LOGIT_CASES = [
    (7, 1003, 1.0, dict(divergence="jsd", beta=0.3, temperature=1.0, sft_alpha=0.25)),
    (7, 1003, 0.01, dict(divergence="jsd", beta=0.7, temperature=0.5, sft_alpha=0.0)),
    (5, 1271, 1.0, dict(divergence="forward_kl", temperature=4.0, sft_alpha=0.5)),
    (5, 1271, 3.0, dict(divergence="reverse_kl", temperature=2.0, sft_alpha=0.0)),
    (6, 1003, 1.0, dict(divergence="jsd", beta=0.3, temperature=2.0, sft_alpha=0.25, top_k=20)),
    (5, 1003, 2.0, dict(divergence="reverse_kl", temperature=1.0, top_k=1)),
    (5, 1003, 2.0, dict(divergence="forward_kl", temperature=1.5, top_k=7, clip=2e-2)),
    (3, 9, 1.0, dict(divergence="jsd", temperature=1.0, top_k=4)),
    (3, 9, 1.0, dict(divergence="jsd", temperature=1.0, top_k=12)),
    (1, 151936, 0.5, dict(divergence="jsd", beta=0.5, temperature=2.0, sft_alpha=0.1)),
    (
        3,
        9,
        1.0,
        dict(divergence="jsd", beta=0.5, temperature=1.0, sft_alpha=0.5),
    ),  # padded to 16 or more: some ranks own nothing
]
LINEAR_CASES = [
    (7, 1003, torch.float32, dict(divergence="jsd", beta=0.3, temperature=2.0, sft_alpha=0.25)),
    (6, 401, torch.float32, dict(divergence="reverse_kl", temperature=1.0, sft_alpha=0.0)),
    (6, 401, torch.bfloat16, dict(divergence="forward_kl", temperature=4.0, sft_alpha=0.5)),
    (6, 1003, torch.float32, dict(divergence="jsd", beta=0.3, temperature=2.0, top_k=20)),
    (6, 401, torch.bfloat16, dict(divergence="reverse_kl", sft_alpha=0.5, top_k=5)),
    (4, 9, torch.float32, dict(divergence="jsd", beta=0.5, temperature=1.0, sft_alpha=0.5)),
]
HIDDEN_SIZE, CHUNK_ROWS = 16, 4


def padded_size(vocab_size, world_size):
    return -(-(vocab_size + 7) // world_size) * world_size


def own_columns(rank, world_size, full, dim):
    """This rank's slice of `full` padded with values that must not matter."""
    size = padded_size(full.shape[dim], world_size)
    shape = list(full.shape)
    shape[dim] = size - full.shape[dim]
    return torch.cat([full, full.new_full(shape, 50.0)], dim).chunk(world_size, dim)[rank].clone()


def count_collectives(calls):
    """Wrap torch.distributed's collectives so that `calls` counts them by name."""
    for name in (
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "reduce",
        "broadcast",
        "all_to_all_single",
    ):
        original = getattr(dist, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            calls[_name] += 1
            return _original(*args, **kwargs)

        setattr(dist, name, counted)


def logits_rank(rank, world_size):
    """Per case: the output's fields, this rank's gradient, collectives in forward and backward."""
    calls, results = Counter(), []
    count_collectives(calls)
    for num_rows, vocab_size, gap, settings in LOGIT_CASES:
        student, teacher = (
            own_columns(rank, world_size, full, 1) for full in logit_pair(num_rows, vocab_size, gap)
        )
        labels = labels_for(num_rows, vocab_size)
        student.requires_grad_()
        calls.clear()
        output = logits_jsd(
            student,
            teacher,
            labels=labels,
            group=dist.group.WORLD,
            vocab_size=vocab_size,
            **settings,
        )
        forward = dict(calls)
        calls.clear()
        gradient = student_gradient(output.loss, student)
        results.append(([field.detach() for field in output], gradient, forward, dict(calls)))
    calls.clear()
    empty = torch.zeros(0, 4, requires_grad=True)
    logits_jsd(empty, empty.detach(), group=dist.group.WORLD).loss.sum().backward()
    return results, dict(calls)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_logits_jsd_on_ranks(world_size):
    ranks = run_ranks(logits_rank, world_size)
    assert all(calls_without_rows == {} for _, calls_without_rows in ranks)
    for number, (num_rows, vocab_size, gap, settings) in enumerate(LOGIT_CASES):
        student, teacher = logit_pair(num_rows, vocab_size, gap)
        exact_student = student.double().requires_grad_()
        expected = reference_results(
            exact_student, teacher, labels_for(num_rows, vocab_size), **settings
        )
        expected_gradient = student_gradient(expected["loss"], exact_student)
        outputs, gradients, forward, backward = zip(*(cases[number] for cases, _ in ranks))
        gathers = 2 if "top_k" in settings else 1
        assert set(map(str, forward)) == {f"{{'all_gather': {gathers}, 'all_reduce': 1}}"}
        assert set(map(str, backward)) == {"{}"}
        for name, fields in zip(["loss", "jsd", *FIELDS_AFTER_JSD], zip(*outputs)):
            assert all(torch.equal(field, fields[0]) for field in fields), name
            assert relative_error(fields[0], expected[name]) < 1e-4, (name, settings)
        gradient = torch.cat(gradients, 1)
        assert torch.count_nonzero(gradient[:, vocab_size:]) == 0
        assert relative_error(gradient[:, :vocab_size], expected_gradient) < 2e-6, settings


FIELDS_AFTER_JSD = [
    "kl_forward",
    "kl_reverse",
    "entropy_student",
    "entropy_teacher",
    "top1_agreement",
    "sft_loss",
    "token_correct",
    "label_logprob_student",
    "label_logprob_teacher",
]


def linear_rank(rank, world_size, reduce_hidden_grad):
    calls, results = Counter(), []
    count_collectives(calls)
    for num_rows, vocab_size, dtype, settings in LINEAR_CASES:
        student, teacher, full_weight = hidden_pair(
            num_rows, HIDDEN_SIZE, vocab_size, 0.2, dtype=dtype
        )
        weight = own_columns(rank, world_size, full_weight, 0)
        labels = labels_for(num_rows, vocab_size)
        student.requires_grad_()
        calls.clear()
        output = linear_jsd(
            student,
            teacher,
            weight,
            labels=labels,
            group=dist.group.WORLD,
            vocab_size=vocab_size,
            chunk_rows=CHUNK_ROWS,
            reduce_hidden_grad=reduce_hidden_grad,
            **settings,
        )
        forward = dict(calls)
        calls.clear()
        gradient = student_gradient(output.loss, student)
        results.append(([field.detach() for field in output], gradient, forward, dict(calls)))
    calls.clear()
    empty = torch.zeros(0, 4, requires_grad=True)
    linear_jsd(
        empty, empty.detach(), torch.zeros(3, 4), group=dist.group.WORLD
    ).loss.sum().backward()
    return results, dict(calls)


@pytest.mark.parametrize(
    "world_size, reduce_hidden_grad", [(2, True), (2, False), (4, True), (8, True)]
)
def test_linear_jsd_on_ranks(world_size, reduce_hidden_grad):
    ranks = run_ranks(linear_rank, world_size, reduce_hidden_grad)
    assert all(calls_without_rows == {} for _, calls_without_rows in ranks)
    for number, (num_rows, vocab_size, dtype, settings) in enumerate(LINEAR_CASES):
        labels = labels_for(num_rows, vocab_size)
        expected, expected_gradient = reference_linear(
            *hidden_pair(num_rows, HIDDEN_SIZE, vocab_size, 0.2, dtype=dtype), labels, settings
        )
        outputs, gradients, forward, backward = zip(*(cases[number] for cases, _ in ranks))
        chunks = -(-num_rows // CHUNK_ROWS)
        gathers = chunks * (2 if "top_k" in settings else 1)
        assert set(map(str, forward)) == {f"{{'all_gather': {gathers}, 'all_reduce': {chunks}}}"}
        assert set(map(str, backward)) == {"{'all_reduce': 1}" if reduce_hidden_grad else "{}"}
        for name, fields in zip(["loss", "jsd", *FIELDS_AFTER_JSD], zip(*outputs)):
            assert all(torch.equal(field, fields[0]) for field in fields), name
            assert relative_error(fields[0], expected[name]) < 1e-4, (name, settings)
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        if reduce_hidden_grad:
            assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
            assert relative_error(gradients[0], expected_gradient) < 5e-6 + rounding
        else:
            assert (
                relative_error(sum(gradient.double() for gradient in gradients), expected_gradient)
                < 5e-6 + rounding
            )


def tie_rank(rank, world_size):
    student, teacher = torch.zeros(2, 3), torch.zeros(2, 3)
    student[0, 1] = (
        4.0  # the same largest logit on every rank: the lowest column, 1, is the student's choice
    )
    if rank == 0:
        teacher[0, 1] = 4.0
    if rank == world_size - 1:  # the largest logit of the second row is this rank's alone
        student[1, 2] = teacher[1, 2] = 9.0
    labels = torch.tensor([1, 3 * world_size - 1])
    output = logits_jsd(student, teacher, labels=labels, group=dist.group.WORLD)
    return output.top1_agreement, output.token_correct


def test_ties_across_ranks_go_to_the_lowest_column():
    for agreement, correct in run_ranks(tie_rank, 4):
        assert agreement.tolist() == [1.0, 1.0] and correct.tolist() == [1.0, 1.0]


def tied_logits():
    """Both sides' logits [40, 48] of few values: the top K is cut among equal ones, in columns of
    one rank, of several, and of all.
    """
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(40, 48, generator=generator)
    return student, torch.randint(0, 3, (40, 48), generator=generator).float()


def top_k_tie_rank(rank, world_size):
    student, teacher = (side.chunk(world_size, 1)[rank].clone() for side in tied_logits())
    student.requires_grad_()
    output = logits_jsd(student, teacher, top_k=7, group=dist.group.WORLD)
    return output.jsd, student_gradient(output.loss, student)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_top_k_takes_the_lowest_of_equal_columns_at_every_layout(world_size):
    student, teacher = tied_logits()
    exact = student.double().requires_grad_()
    expected = reference_results(exact, teacher, top_k=7)
    ranks = run_ranks(top_k_tie_rank, world_size)
    for divergence, _ in ranks:
        torch.testing.assert_close(divergence.double(), expected["jsd"], rtol=1e-5, atol=1e-7)
    gradient = torch.cat([gradient for _, gradient in ranks], 1)
    assert relative_error(gradient, student_gradient(expected["loss"], exact)) < 2e-6


def equal_rank(rank, world_size):
    student, _ = logit_pair(5, 4001, 0.0)
    student = own_columns(rank, world_size, student, 1).requires_grad_()
    output = logits_jsd(
        student, student.detach().clone(), temperature=2.0, group=dist.group.WORLD, vocab_size=4001
    )
    return torch.count_nonzero(output.loss).item(), torch.count_nonzero(
        student_gradient(output.loss, student)
    ).item()


def test_equal_logits_give_exactly_nothing_on_ranks():
    assert run_ranks(equal_rank, 4) == [(0, 0)] * 4
