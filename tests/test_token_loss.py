"""What each response token counts: its weight, its importance, and the tokens that are left out.

`--loss_top_k`, `--skip_first_tokens` and `--token_weight` go through the command line in
test_step_parity.py.
"""

import random
from itertools import groupby
from typing import get_args

import pytest
import torch
from trl.experimental.sdft.loss_utils import apply_importance_sampling_clipping

from megatron_gkd.config import parse_config
from megatron_gkd.data import Packing, Sample, View, collate
from megatron_gkd.distillation import DistillConfig
from megatron_gkd.lora.adapter import adapter_slices
from megatron_gkd.loss import LinearJsdOutput
from megatron_gkd.loss.token_weights import WEIGHTS, TokenStatistics, WeightName
from megatron_gkd.token_loss import importance, places
from tests.ranks import run_ranks
from tests.reference_step import reference_gradients, write_adapter
from tests.train_runs import (
    SMALL,
    arguments,
    build_parts,
    layout_flags,
    make_rows,
    read_lines,
    run_training,
    write_rows,
)

CLIP = 1.5
SETTINGS = dict(top_k=6, skip=1, weight="entropy", importance_clip=CLIP)
FLAGS = dict(
    loss_top_k=6, skip_first_tokens=1, token_weight="entropy", importance_clip=CLIP, lmbda=1
)


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--loss_top_k", "0"], ["--loss_top_k 0", "1 or more"]),
        (["--importance_clip", "0"], ["--importance_clip 0.0", "above 0"]),
        (["--skip_first_tokens", "-1"], ["--skip_first_tokens -1", "0 or more"]),
        (["--skip_first_tokens", "512"], ["--skip_first_tokens 512", "length 512", "no token"]),
        (["--token_weight", "half"], ["token_weight", "half", "entropy"]),
    ],
)
def test_settings_are_checked(flags, parts):
    with pytest.raises(ValueError) as error:
        parse_config(["--model", "/m", "--dataset", "d", *flags])
    assert all(part in str(error.value) for part in parts), error.value


def test_the_line_at_the_start_says_what_the_loss_is():
    line = DistillConfig().loss_line()
    assert not any(word in line for word in ("weighted", "best", "first", "importance"))
    settings = dict(loss_top_k=7, skip_first_tokens=2, token_weight="entropy", importance_clip=2.5)
    for part in ("7 best", "first 2", "weighted by entropy", "importance, at most 2.5"):
        assert part in DistillConfig(**settings).loss_line()
    assert DistillConfig(**settings).loss_divergence.top_k == 7


def test_skipping_more_than_any_response_has_is_refused(tiny_folder, tmp_path):
    """Of rows of several turns the longest turn counts; not where the run writes all responses."""
    rows = make_rows(12, max_response=6)
    longest = max(
        len(list(run))
        for row in rows
        for trained, run in groupby(row["labels"], key=lambda label: label != -100)
        if trained
    )
    flags = dict(
        model=tiny_folder(**SMALL),
        dataset=write_rows(tmp_path / "rows.jsonl", rows),
        output_dir=tmp_path,
        max_steps=1,
        per_device_train_batch_size=len(rows),
        max_completion_length=longest + 3,
    )
    with pytest.raises(RuntimeError, match=rf"--skip_first_tokens {longest}: .* {longest} tokens"):
        run_training(1, arguments(**flags, skip_first_tokens=longest))
    runs = (dict(skip_first_tokens=longest - 1), dict(skip_first_tokens=longest, lmbda=1))
    for number, own in enumerate(runs):
        output = tmp_path / str(number)
        run_training(1, arguments(**flags | own | dict(output_dir=output)))
        assert read_lines(output / "metrics.jsonl")[0]["num_tokens"] > 0


def test_places_in_a_response():
    """Runs of neighbouring rows, of one token too."""
    rows = torch.tensor([3, 4, 5, 6, 9, 12, 13])
    assert places(rows).tolist() == [0.25, 0.5, 0.75, 1, 1, 0.5, 1]
    assert places(rows[:0]).shape == (0,) and places(rows[:1]).tolist() == [1]


def test_weights_are_those_of_their_sources():
    assert get_args(WeightName) == ("none", *WEIGHTS)
    place = torch.linspace(0.01, 1, 100)
    token = TokenStatistics(torch.rand(100), torch.rand(100), place)
    assert torch.equal(WEIGHTS["entropy"](token), token.entropy_student)
    position = WEIGHTS["position"](token)
    assert (position.diff() > 0).all() and 0.25 < position[0] < 0.3 and position[-1] > 0.99
    assert position[29].item() == pytest.approx((0.25 + 1) / 2)  # the middle of the rise


def test_importance_is_trls():
    generator = torch.Generator().manual_seed(0)
    loss, scored, drawn = (4 * torch.rand(3, 50, generator=generator)).unbind()
    output = LinearJsdOutput(*[loss] * 7, sft_loss=scored)
    found = importance(output, -drawn, CLIP)
    expected = apply_importance_sampling_clipping(loss, -scored, -drawn, CLIP)
    torch.testing.assert_close(loss * found.factor, expected)
    assert 0 < (found.ratio > CLIP).sum() < 50
    assert importance(output, torch.full((50,), -1e9), CLIP).ratio.isfinite().all()


def test_first_tokens_are_left_out_of_each_run():
    """In both views, and of the log-probabilities of what was written."""
    labels = [-100, 2, 3, 4, -100, -100, 7, -100, 9, 10]
    student = View(list(range(1, 11)), labels, 8)
    teacher = View([50, 51, *student.input_ids], [-100, -100, *labels], 10)
    batch = collate([Sample(student, teacher, "", 0, 0), None], Packing(0, skip_first_tokens=1))
    for view, rows in ((batch.student, [1, 2, 8]), (batch.teacher, [3, 4, 10])):
        assert view.targets.tolist() == [3, 4, 10] and view.num_targets == [3, 0]
        assert view.response_rows.tolist() == rows
    assert batch.response_tokens == 6  # with those
    written = Sample(student, teacher, "", 0, 0).with_response([5, 6, 7], [-1.0, -2.0, -3.0])
    batch = collate([written], Packing(0, skip_first_tokens=2))
    assert batch.student.targets.tolist() == [7] and batch.log_probabilities.tolist() == [-3.0]
    none = collate([written], Packing(0, skip_first_tokens=5))
    assert none.student.num_targets == [0] and none.log_probabilities.tolist() == []


def written_samples():
    """Rows as a rollout would have written them, with log-probabilities that are not the
    student's: as rows of the reference, and as samples.
    """
    draw, rows, samples = random.Random(5), [], []
    for number, row in enumerate(make_rows(12, seed=3)):
        start = row["labels"].count(-100)
        if number % 3 == 2:
            continue  # two spans: no rollout writes them
        drawn = [draw.uniform(-8, -4) for _ in row["labels"][start:]]
        rows.append(row | {"drawn": drawn})
        prompt, response = row["teacher_input_ids"], row["input_ids"][start:]
        student = View(row["input_ids"], row["labels"], start)
        teacher = View(prompt + response, [-100] * len(prompt) + response, len(prompt))
        sample = Sample(student, teacher, "", number, 0)
        samples.append(sample.with_response(response, drawn))
    return rows, samples


def step_of_rank(rank, world_size, argv):
    """Of a step over micro-batches of 3, 0 and the remaining rows: means and gradient norm; the
    gradient of each slice of the adapter on this rank.
    """
    from megatron_gkd.forward import student_forward_backward, teacher_forward
    from megatron_gkd.run import packing

    parts = build_parts(argv)
    parallel = parts.parallel
    own = written_samples()[1][parallel.dp_rank :: parallel.dp_size]
    packed = packing(0, parallel, FLAGS["skip_first_tokens"])
    batches = [collate(samples, packed) for samples in (own[:3], [None], own[3:])]
    teacher = teacher_forward(parts.model, batches, parallel)
    parts.optimizer.zero_grad()
    sums = student_forward_backward(parts.ddp, batches, teacher, parts.loss, parallel)
    means = sums.means(parallel)
    gradients = [
        (piece.stored.name, piece.stored.index, piece.parameter.main_grad[piece.where].clone())
        for piece in adapter_slices(parts.model, parts.model_args, parallel)
    ]
    return means | {"grad_norm": parts.optimizer.step(0.0, means["loss"]).grad_norm}, gradients


@pytest.mark.parametrize(
    "world_size, tp, pp, ep, cp",
    [
        (1, 1, 1, 1, 1),
        pytest.param(2, 1, 1, 1, 1, marks=pytest.mark.extended),
        pytest.param(2, 2, 1, 2, 1, marks=pytest.mark.extended),
        (8, 2, 2, 2, 1),
        pytest.param(4, 1, 1, 1, 2, marks=pytest.mark.extended),
        pytest.param(8, 4, 1, 8, 2, marks=pytest.mark.extended),
        pytest.param(8, 8, 1, 8, 1, marks=pytest.mark.extended),
    ],
)
def test_a_step_with_all_options_is_the_reference(
    tiny_folder, tmp_path, world_size, tp, pp, ep, cp
):
    """At any layout and cut into micro-batches: the weighted mean of the loss, its gradient, and
    what is measured of the importance.
    """
    folder = tiny_folder(**SMALL)
    adapter = write_adapter(tmp_path / "adapter", folder, rank=3, alpha=5)
    expected, gradients = reference_gradients(folder, adapter, written_samples()[0], **SETTINGS)
    assert 0.1 < expected["importance_clipped"] < 0.9 and expected["importance_ratio"] > 1
    flags = FLAGS | layout_flags(tp, pp, ep, cp)
    argv = arguments(model=folder, adapter=adapter, dataset="none", output_dir=tmp_path, **flags)
    seen = set()
    for found, of_rank in run_ranks(step_of_rank, world_size, argv):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-4), name
        for name, index, gradient in of_rank:
            wanted = gradients[name][index]
            error = (gradient - wanted).norm().item()
            assert error <= 1e-3 * wanted.norm().item() + 1e-6 * expected["grad_norm"], name
            seen.add(name)
    assert seen == set(gradients)
