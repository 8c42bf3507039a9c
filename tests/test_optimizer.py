"""The learning rate's exact values; AdamW's guard against bad steps; its state; loss scaling. The
update itself is in test_step_parity.py.
"""

import math

import pytest
import torch

from megatron_gkd.optimizer import learning_rate
from tests.ranks import run_ranks
from tests.reference_step import write_adapter
from tests.train_runs import SMALL, arguments, build_parts, make_rows, write_rows


@pytest.fixture(scope="module")
def argv(tiny_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("optimizer")
    model = tiny_folder(**SMALL)
    adapter = write_adapter(root / "adapter", model, rank=2, alpha=4)
    return arguments(
        model=model,
        adapter=adapter,
        dataset=write_rows(root / "rows.jsonl", make_rows(4)),
        output_dir=root,
        max_grad_norm=2,
    )


def rates(total, kind, warmup_ratio):
    return [
        learning_rate(step, total, peak=8.0, warmup_ratio=warmup_ratio, kind=kind)
        for step in range(1, total + 1)
    ]


def test_learning_rates():
    assert rates(6, "linear", 0.3) == pytest.approx([4, 8, 8, 6, 4, 2])
    assert rates(6, "constant", 0.3) == pytest.approx([4, 8, 8, 8, 8, 8])
    assert rates(6, "cosine", 0.3) == pytest.approx(
        [4, 8] + [4 * (1 + math.cos(math.pi * x / 4)) for x in range(4)]
    )
    assert rates(4, "linear", 0) == pytest.approx([8, 6, 4, 2])
    assert rates(4, "cosine", 1) == pytest.approx([2, 4, 6, 8])
    assert rates(1, "cosine", 0.05) == [8]  # one step is at the peak, whatever the warm-up


def fill_gradients(parts, scale: float) -> None:
    """The same gradients at each call, `scale` times standard normal."""
    torch.manual_seed(0)
    parts.optimizer.zero_grad()
    for parameter in parts.optimizer.moments():
        parameter.main_grad.copy_(torch.randn(parameter.shape) * scale)


def state_of(parts) -> list[torch.Tensor]:
    found = []
    for parameter, moments in parts.optimizer.moments().items():
        found += [
            parameter.detach().clone(),
            moments["exp_avg"].clone(),
            moments["exp_avg_sq"].clone(),
        ]
    return found


def is_same(before, after) -> list[bool]:
    return [torch.equal(x, y) for x, y in zip(before, after, strict=True)]


def _guard(rank, world_size, argv):
    parts = build_parts(argv)
    optimizer, answers = parts.optimizer, []
    first = next(iter(optimizer.moments()))
    for loss, value in [
        (math.nan, 1.0),
        (math.inf, 1.0),
        (1.0, math.nan),
        (1.0, math.inf),
        (1.0, -math.inf),
    ]:
        before = state_of(parts)
        fill_gradients(parts, 1.0)
        first.main_grad.view(-1)[3] = value
        update = optimizer.step(0.1, loss)
        answers.append(
            (
                update.applied,
                update.overflowed,
                all(is_same(before, state_of(parts))),
                optimizer.num_updates,
            )
        )
    fill_gradients(parts, 1.0)
    update = optimizer.step(0.1, 1.0)
    return answers, update.applied, any(is_same(before, state_of(parts))), optimizer.num_updates


def test_nothing_moves_in_a_bad_step(argv):
    ((answers, applied, anything_stayed, num_updates),) = run_ranks(_guard, 1, argv)
    assert answers == [(False, False, True, 0)] * 5
    assert applied and not anything_stayed and num_updates == 1


def _norms_that_differ(rank, world_size, argv):
    """One update, where the norms of the data-parallel ranks differ in their last bits."""
    parts = build_parts(argv)
    find, replica = parts.optimizer._grad_norm, parts.parallel.dp_rank
    parts.optimizer._grad_norm = lambda: find() * (1 + replica * 2**-22)
    fill_gradients(parts, 1.0)
    update = parts.optimizer.step(0.1, 1.0)
    assert update.applied and update.grad_norm > 2.0  # clipped
    return update.grad_norm, [moment.numpy() for moment in state_of(parts)]


def test_replicas_stay_copies(argv):
    """Whatever the order in which their groups sum."""
    first, second = run_ranks(_norms_that_differ, 2, argv)
    assert first[0] == second[0]
    assert all((x == y).all() for x, y in zip(first[1], second[1], strict=True))


def _against_torch(rank, world_size, argv):
    """Three updates after a look at the moments, and torch's; the third through a fresh optimizer
    with the moments copied over.
    """
    parts, other = build_parts(argv), build_parts(argv, again=True)
    ours = list(parts.optimizer.moments())
    theirs = [parameter.detach().clone().requires_grad_() for parameter in ours]
    adam = torch.optim.AdamW(theirs, weight_decay=0.0)
    errors = []
    for step, (rate, scale) in enumerate([(0.1, 1.0), (0.2, 1e-3), (0.3, 1.0)]):
        if step == 2:
            copies = zip(
                parts.optimizer.moments().items(), other.optimizer.moments().items(), strict=True
            )
            for (source, moments), (target, target_moments) in copies:
                target.data.copy_(source)
                for name in moments:
                    target_moments[name].copy_(moments[name])
            other.optimizer.num_updates = parts.optimizer.num_updates
            parts, ours = other, list(other.optimizer.moments())
        fill_gradients(parts, scale)
        for mine, parameter in zip(ours, theirs):
            parameter.grad = mine.main_grad.clone()
        norm = float(torch.nn.utils.clip_grad_norm_(theirs, 2.0))
        adam.param_groups[0]["lr"] = rate
        adam.step()
        update = parts.optimizer.step(rate, 1.0)
        errors.append(max(float((x - y).abs().max()) for x, y in zip(ours, theirs)))
        errors.append(abs(update.grad_norm / norm - 1))
    return errors, parts.optimizer.num_updates


def test_updates_are_torchs(argv):
    ((errors, num_updates),) = run_ranks(_against_torch, 1, argv)
    assert max(errors) < 1e-5 and num_updates == 3


def _scaling(rank, world_size, argv):
    fp16, fp32 = build_parts(argv + ["--torch_dtype", "float16"]), build_parts(argv, again=True)
    optimizer, history = fp16.optimizer, []
    scale = float(optimizer.scaler.scale)
    scaled_loss = float(fp16.model.config.grad_scale_func(torch.tensor(3.0)))
    fill_gradients(fp16, 0.01 * scale)
    fill_gradients(fp32, 0.01)
    norms = [optimizer.step(0.1, 1.0).grad_norm, fp32.optimizer.step(0.1, 1.0).grad_norm]
    pairs = zip(optimizer.moments(), fp32.optimizer.moments(), strict=True)
    difference = max(float((x - y).abs().max()) for x, y in pairs)
    for loss, value in [(1.0, math.inf), (math.nan, 1.0), (1.0, 1.0)]:
        fill_gradients(fp16, 1.0)
        next(iter(optimizer.moments())).main_grad.view(-1)[0] = value
        update = optimizer.step(0.1, loss)
        history.append((update.applied, update.overflowed, float(optimizer.scaler.scale) / scale))
    fresh = build_parts(argv + ["--torch_dtype", "float16"], again=True).optimizer
    fresh.load_scaler_state(optimizer.scaler_state())
    optimizer.scaler.scale.fill_(1.0)
    fill_gradients(fp16, math.inf)
    lowest = optimizer.step(0.1, 1.0)
    dtypes = {parameter.dtype for parameter in optimizer.moments()}
    return (
        scaled_loss / scale,
        norms,
        difference,
        history,
        fresh.scaler_state(),
        (lowest.applied, lowest.overflowed),
        dtypes,
    )


def test_loss_scaling(argv):
    """An overflow halves the scale and is no bad step, as long as there is something to halve; NaN
    in the loss is one.
    """
    ((loss, norms, difference, history, resumed, lowest, dtypes),) = run_ranks(_scaling, 1, argv)
    assert loss == 3 and norms[0] == pytest.approx(norms[1], rel=1e-5) and difference < 1e-5
    assert history == [(False, True, 0.5), (False, False, 0.25), (True, False, 0.25)]
    assert resumed == {
        "scale": 2.0**14,
        "growth_tracker": 1,
        "hysteresis_tracker": resumed["hysteresis_tracker"],
    }
    assert lowest == (False, False) and dtypes == {torch.float32}
