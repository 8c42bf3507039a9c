"""Teacher and student passes: what the toggle, dropout, recomputation and empty micro-batches may
not change.
"""

import math

import pytest
import torch

from tests.ranks import run_ranks
from tests.reference_step import write_adapter
from tests.train_runs import SMALL, arguments, build_parts, layout_flags, make_rows, write_rows

LAYOUTS = [(1, 1, 1, 1, 1), (4, 2, 2, 2, 1), (4, 1, 1, 2, 4)]


@pytest.fixture(scope="module")
def flags(tiny_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("forward")
    model = tiny_folder(**SMALL)
    adapter = write_adapter(root / "adapter", model, rank=3, alpha=5)
    return dict(
        model=model,
        adapter=adapter,
        dataset=write_rows(root / "rows.jsonl", make_rows(8)),
        output_dir=root,
    )


def make_samples(number, seed=0):
    from megatron_gkd.data import Sample, View

    samples = []
    for row in make_rows(number, seed=seed):
        ids, labels, prompt = row["input_ids"], row["labels"], row["teacher_input_ids"]
        start = next(i for i, label in enumerate(labels) if label != -100)
        teacher = View(prompt + ids[start:], [-100] * len(prompt) + labels[start:], len(prompt))
        samples.append(Sample(View(ids, labels, start), teacher, "", len(samples), 0))
    return samples


def pack(samples, parallel):
    from megatron_gkd.data import collate
    from megatron_gkd.run import packing

    return collate(samples, packing(0, parallel))


def micro_batches(parts, parallel, sizes=(3, 0, 5), seed=0):
    """Micro-batches of these numbers of rows, the same on every rank; one of 0 holds only a
    padding sample.
    """
    samples, batches = make_samples(sum(sizes), seed), []
    for size in sizes:
        batches.append(pack(samples[:size] or [None], parallel))
        del samples[:size]
    return batches


def gradients(parts) -> list[torch.Tensor]:
    return [parameter.main_grad.clone() for parameter in parts.optimizer.moments()]


def pass_through(parts, parallel, batches, seed=7, settings=None):
    """One step's passes as the loop makes them: the sums and the gradients."""
    from megatron_gkd.forward import student_forward_backward, teacher_forward
    from megatron_gkd.parallel import seed_step

    seed_step(seed, 0, parallel)
    teacher = teacher_forward(parts.model, batches, parallel)
    parts.optimizer.zero_grad()
    sums = student_forward_backward(parts.ddp, batches, teacher, settings or parts.loss, parallel)
    return sums.means(parallel), gradients(parts), teacher


def _recompute(rank, world_size, argv):
    plain = build_parts(argv + ["--lora_dropout", "0.2"])
    recomputing = build_parts(argv + ["--lora_dropout", "0.2", "--recompute", "full"], again=True)
    parallel = plain.parallel
    batches = micro_batches(plain, parallel, (3, 5))
    first, second = (
        pass_through(plain, parallel, batches),
        pass_through(recomputing, parallel, batches),
    )
    other = pass_through(plain, parallel, batches, seed=8)
    assert any(gradient.any() for gradient in first[1])
    return (
        first[0] == second[0],
        max(float((x - y).abs().max()) for x, y in zip(first[1], second[1], strict=True)),
        max(float((x - y).abs().max()) for x, y in zip(first[1], other[1], strict=True)),
    )


@pytest.mark.parametrize("world_size, tp, pp, ep, cp", LAYOUTS)
def test_recompute_repeats_the_dropout(flags, world_size, tp, pp, ep, cp):
    """Same masks in the second forward: the same gradients, which another seed does not give."""
    for same_loss, error, other_error in run_ranks(
        _recompute, world_size, arguments(**flags, **layout_flags(tp, pp, ep, cp))
    ):
        assert same_loss and error < 1e-6 < 1e-3 < other_error


def _teacher_memory(rank, world_size, argv):
    from megatron_gkd.forward import response_share, teacher_forward

    parts = build_parts(argv)
    batches = micro_batches(parts, parts.parallel)
    shares = [response_share(batch.teacher, parts.parallel) for batch in batches]
    kept = teacher_forward(parts.model, batches, parts.parallel)
    size = parts.model.config.hidden_size
    expected = (
        [(share.stop - share.start, size) for share in shares]
        if parts.parallel.is_last_stage
        else []
    )
    return expected, [
        (tuple(hidden.shape), hidden.untyped_storage().nbytes(), hidden.requires_grad)
        for hidden in kept
    ]


@pytest.mark.parametrize("world_size, tp, pp, ep, cp", LAYOUTS)
def test_of_the_teacher_only_the_response_rows_are_kept(flags, world_size, tp, pp, ep, cp):
    """No view of a whole sequence's hidden states, which would keep their memory, and no graph."""
    for expected, kept in run_ranks(
        _teacher_memory, world_size, arguments(**flags, **layout_flags(tp, pp, ep, cp))
    ):
        assert kept == [((rows, size), rows * size * 4, False) for rows, size in expected]


def _modes(rank, world_size, argv):
    from megatron_gkd.forward import (
        TokenSums,
        student_forward,
        student_forward_backward,
        teacher_forward,
    )
    from megatron_gkd.lora.slots import lora_modules

    parts = build_parts(argv + ["--lora_dropout", "0.2"])
    parallel = parts.parallel
    batches = micro_batches(parts, parallel, (3, 5))
    modules = lora_modules(parts.model)

    def modes():
        return {(module.active, module.training) for module in modules} | {
            ("ddp", parts.ddp.training)
        }

    answers = [modes()]
    teacher = teacher_forward(parts.model, batches, parallel)
    answers.append(modes())
    again = teacher_forward(parts.model, batches, parallel)
    evaluations = []
    for _ in range(2):
        sums = TokenSums.zero(parallel.device)
        student_forward(parts.ddp, batches, again, parts.loss, parallel, sums)
        evaluations.append(sums.means(parallel))
    answers.append(modes())
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.fill_(math.nan)
    without = teacher_forward(parts.model, batches, parallel)
    broken = student_forward_backward(parts.ddp, batches, without, parts.loss, parallel).means(
        parallel
    )
    answers.append(modes())
    return (
        answers,
        [
            torch.equal(x, y) and torch.equal(x, z)
            for x, y, z in zip(teacher, again, without, strict=True)
        ],
        any(x.requires_grad for x in teacher),
        evaluations[0] == evaluations[1],
        math.isnan(broken["loss"]),
    )


@pytest.mark.parametrize("world_size, tp, pp, ep, cp", LAYOUTS)
def test_teacher_is_the_base_bit_for_bit(flags, world_size, tp, pp, ep, cp):
    """NaN in every LoRA weight does not reach it; evaluation has no dropout; every pass leaves
    flags and modes as it found them.
    """
    for answers, same_teacher, needs_grad, same_evaluation, broken in run_ranks(
        _modes, world_size, arguments(**flags, **layout_flags(tp, pp, ep, cp))
    ):
        assert answers == [{("student", True), ("ddp", True)}] * 4
        assert all(same_teacher) and not needs_grad and same_evaluation and broken


def _empty(rank, world_size, argv):
    parts = build_parts(argv)
    parallel = parts.parallel
    whole = pass_through(parts, parallel, micro_batches(parts, parallel, (8,)))
    chunks = pass_through(parts, parallel, micro_batches(parts, parallel, (3, 0, 5)))
    nothing = pass_through(parts, parallel, micro_batches(parts, parallel, (0,)))
    return (
        whole[0],
        chunks[0],
        max(float((x - y).norm() / x.norm()) for x, y in zip(whole[1], chunks[1]) if x.any()),
        nothing[0],
    )


@pytest.mark.parametrize("world_size, tp, pp, ep, cp", LAYOUTS)
def test_micro_batches_do_not_matter(flags, world_size, tp, pp, ep, cp):
    """One batch, or ragged chunks of it and one without any response token: the same means and
    gradients.
    """
    for whole, chunks, error, nothing in run_ranks(
        _empty, world_size, arguments(**flags, **layout_flags(tp, pp, ep, cp))
    ):
        assert error < 1e-4 and whole.keys() == chunks.keys()
        for name, value in whole.items():
            assert chunks[name] == pytest.approx(value, rel=1e-5), name
        assert nothing["num_tokens"] == 0 and math.isnan(nothing["loss"])


def _company(rank, world_size, argv):
    """Sum of the losses, number of tokens and gradients: of three rows one by one, and of the three
    in a micro-batch, in both orders.
    """
    from megatron_gkd.forward import student_forward_backward, teacher_forward

    parts = build_parts(argv)
    parallel = parts.parallel

    def summed(samples):
        """Of one micro-batch on each data-parallel rank; before the division by the tokens."""
        batches = [pack(samples, parallel)]
        teacher = teacher_forward(parts.model, batches, parallel)
        parts.optimizer.zero_grad()
        sums = student_forward_backward(parts.ddp, batches, teacher, parts.loss, parallel)
        means = sums.means(parallel)
        tokens = means["num_tokens"]
        return means["loss"] * tokens, tokens, [tokens * value for value in gradients(parts)]

    samples = make_samples(3)
    assert len({sample.num_tokens for sample in samples}) == 3
    alone = [summed([sample]) for sample in samples]
    of_alone = [sum(values) for values in zip(*(gradient for _, _, gradient in alone))]
    results = []
    for order in (samples, samples[::-1]):
        loss, tokens, of_order = summed(order)
        assert tokens == sum(number for _, number, _ in alone)
        differences = zip(of_order, of_alone, strict=True)
        errors = [float((x - y).norm() / y.norm()) for x, y in differences if y.any()]
        assert errors
        results.append((loss, max(errors)))
    return sum(loss for loss, _, _ in alone), results


@pytest.mark.parametrize("world_size, tp, pp, ep, cp", LAYOUTS)
def test_a_row_is_the_same_alone_and_in_company(flags, world_size, tp, pp, ep, cp):
    """No row sees what lies before or behind it in the packed sequence."""
    for alone, results in run_ranks(
        _company, world_size, arguments(**flags, **layout_flags(tp, pp, ep, cp))
    ):
        assert alone > 0
        for loss, error in results:
            assert loss == pytest.approx(alone, rel=1e-6) and error < 1e-5


def _on_policy(rank, world_size, argv):
    from dataclasses import replace

    parts = build_parts(argv + ["--sft_alpha", "0.5"])
    batches = micro_batches(parts, parts.parallel, (3, 5))
    written = [
        pack([replace(sample, is_written=True) for sample in batch.samples], parts.parallel)
        for batch in batches
    ]
    without = replace(parts.loss, sft_alpha=0.0)
    results = [
        pass_through(parts, parts.parallel, batches),
        pass_through(parts, parts.parallel, written),
    ]
    results.append(pass_through(parts, parts.parallel, batches, settings=without))
    same = all(torch.equal(x, y) for x, y in zip(results[1][1], results[2][1]))
    return [means for means, _, _ in results], same


def test_no_sft_on_written_text(flags):
    (((data, written, without), same_gradients),) = run_ranks(_on_policy, 1, arguments(**flags))
    assert (
        data["loss"] == pytest.approx(0.5 * data["jsd"] + 0.5 * data["sft_loss"], rel=1e-6)
        and data["sft_loss"] > 1
    )
    assert written == without and written["loss"] == written["jsd"] and same_gradients
