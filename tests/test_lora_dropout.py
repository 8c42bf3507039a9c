"""LoRA's dropout: its masks over ranks and steps, and copies of weights that stay equal."""

from types import SimpleNamespace

import pytest
import torch

from megatron_gkd import parallel
from megatron_gkd.lora import as_teacher
from megatron_gkd.lora.dropout import keep_mask
from megatron_gkd.lora.slots import TEACHER
from tests.adapters import ALL, make_batches
from tests.lora_runs import (
    FOLDERS,
    VOCAB_SIZE,
    build,
    gather,
    in_reducer,
    initialize,
    make_optimizer,
    run_schedule,
    share,
)
from tests.ranks import run_ranks
from tests.test_lora import DROPOUT


def equal_on_all(values, group):
    flat = torch.cat([value.flatten() for value in values])
    return all(torch.equal(flat, part) for part in gather(flat[None], group, 0))


def check_copies(place, model, get):
    """Bit-equal copies of get(parameter): replicated weights over TP, attention's over DP, experts'
    over their own data-parallel group.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    experts = [
        get(parameter) for parameter in trainable if not getattr(parameter, "allreduce", True)
    ]
    attention = [get(parameter) for parameter in trainable if getattr(parameter, "allreduce", True)]
    replicated = [
        get(parameter)
        for parameter in trainable
        if not getattr(parameter, "tensor_model_parallel", False)
    ]
    assert len(replicated) == 4 * len(
        model.decoder.layers
    )  # W_down of q, k, v and W_up of o in each layer
    assert (
        equal_on_all(replicated, place.groups.tp)
        and equal_on_all(attention, place.groups.dp)
        and equal_on_all(experts, place.groups.expt_dp)
    )


def train_with_dropout(rank, world_size, tp, pp, ep, folder):
    place = initialize(tp, pp, ep)
    _, model = build(place, folder, rank=3, alpha=6, targets=ALL, seed=0, dropout=DROPOUT)
    ddp, batches = in_reducer(model), share(make_batches(VOCAB_SIZE), place)
    base = run_schedule(place, ddp, batches, backward=False, forward_slot=TEACHER)
    start = [
        parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad
    ]
    optimizer = make_optimizer(ddp.train(), place)
    for step in range(20):
        parallel.seed_step(42, step, place)
        optimizer.zero_grad()
        run_schedule(place, ddp, batches)
        check_copies(place, model, lambda parameter: parameter.main_grad)
        assert optimizer.step(1e-2, 0.0).applied
        check_copies(place, model, lambda parameter: parameter.data)
    now = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all((after - before).abs().max() > 1e-3 for before, after in zip(start, now)), (
        "a weight was never trained"
    )
    off = run_schedule(place, ddp, batches, backward=False, forward_slot=TEACHER)
    assert all(torch.equal(*pair) for pair in zip(off, base)), "LoRA off is no longer the base"


@pytest.mark.parametrize(
    "world_size, tp, pp, ep",
    [
        pytest.param(4, 2, 1, 2, id="TP2 DP2 EP2, experts twice"),
        pytest.param(4, 4, 1, 1, id="TP4, experts four times", marks=pytest.mark.extended),
        pytest.param(4, 2, 2, 2, id="TP2 PP2 EP2"),
    ],
)
def test_copies_stay_bit_equal_over_20_steps_with_dropout(tiny_folder, world_size, tp, pp, ep):
    run_ranks(train_with_dropout, world_size, tp, pp, ep, tiny_folder(**FOLDERS["4 KV heads"]))


def dropout_masks(rank, world_size, folder):
    """At TP 2, DP 2: masks of the first layer's linears, and what dropout does to one linear and in
    evaluation.
    """
    place = initialize(2, 1, 2)
    model_args, model = build(place, folder, rank=4, alpha=8, targets=ALL, seed=0, dropout=DROPOUT)
    for parameter in model.parameters():
        if parameter.requires_grad:  # W_up too; equal on all ranks, which does not matter here
            parameter.data.normal_(generator=torch.Generator().manual_seed(9), std=0.1)
    layer = model.decoder.layers[0]
    linears = dict(
        qkv=layer.self_attention.linear_qkv,
        o=layer.self_attention.linear_proj,
        down=layer.mlp.experts.down,
    )
    model.train()
    masks = []
    for step in (0, 0, 1):
        parallel.seed_step(42, step, place)
        masks.append({name: drawn_mask(linear) for name, linear in linears.items()})

    x = torch.randn(8, model_args.moe_intermediate_size)

    def down():
        matrices = linears["down"].matrices()
        behind = matrices.weight.shape[2] - x.shape[1]
        rows = torch.nn.functional.pad(x, (0, behind))
        return matrices.product(rows, torch.tensor([1, 3, 6, 8], dtype=torch.int32))[0]

    with torch.no_grad():
        model.eval()
        evaluated = down()
        model.train()
        average = sum(down() for _ in range(1000)) / 1000
        with as_teacher(model):
            base = down()

    evaluations = []
    for dropout in (0.0, DROPOUT):
        _, model = build(place, folder, rank=4, alpha=8, targets=ALL, seed=0, dropout=dropout)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05)
        evaluations.append(
            run_schedule(
                place, in_reducer(model.eval()), make_batches(VOCAB_SIZE)[:1], backward=False
            )[0]
        )
    return SimpleNamespace(
        masks=masks, averaged=(average - base, evaluated - base), evaluations=evaluations
    )


def drawn_mask(linear):
    """The factors of one call's dropout, fp32 [64, 64]."""
    drop = linear.drop_of(linear.slot)
    return keep_mask(64, 64, drop, torch.device("cpu")) * drop.scale


def test_dropout(tiny_folder):
    """Masks: seeded by the step, different on sequence shards, feature shards, experts and
    data-parallel ranks; scaled so that the mean is kept; none in evaluation.
    """
    results = run_ranks(dropout_masks, 4, tiny_folder(**FOLDERS["4 KV heads"]))
    for name in ("qkv", "o", "down"):
        first, again, next_step = (
            [result.masks[step][name] for result in results] for step in range(3)
        )
        for rank in range(4):
            assert torch.equal(first[rank], again[rank])
            others = [next_step[rank], *(first[other] for other in range(4) if other != rank)]
            assert not any(torch.equal(first[rank], other) for other in others), (
                f"{name}: rank {rank} shares a mask"
            )
        values = torch.stack(first)
        kept = values != 0
        torch.testing.assert_close(values[kept], torch.full_like(values[kept], 1 / (1 - DROPOUT)))
        assert kept.float().mean().item() == pytest.approx(1 - DROPOUT, abs=0.02)
    for result in results:
        average, exact = result.averaged
        assert (average - exact).norm() < 0.1 * exact.norm() and exact.norm() > 0.1
        assert torch.equal(*result.evaluations)
