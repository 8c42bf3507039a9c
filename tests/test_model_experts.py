"""A layer of experts: values and gradients against float64 at every layout, equal bits, what is
saved, launched and sent.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from megatron_gkd import parallel
from megatron_gkd.lora.slots import STUDENT, TEACHER
from megatron_gkd.model.dispatcher import NumbersOnHost
from megatron_gkd.model.tensor_slice import ParameterSlice, TensorSlice
from tests.expert_layers import (
    SEEDS,
    Case,
    add_slot,
    lora_parameters,
    make_layer,
    reference,
    run,
    run_cases,
    tokens,
    weights,
)
from tests.gpu import DEVICE
from tests.processes import in_a_process
from tests.ranks import run_ranks

CASES = {
    "top 2": Case(),
    "top 1": Case(top_k=1),
    "top 8, every expert": Case(top_k=8),
    "top 3, empty experts": Case(top_k=3, shunned=(0, 3, 7)),
    "one expert has all": Case(top_k=1, shunned=(0, 1, 2, 3, 4, 6, 7)),
    "odd sizes": Case(hidden=20, intermediate=12, rank=1, num_tokens=5),
    "one token": Case(num_tokens=1),
    "gate alone": Case(targets=("gate_proj",)),
    "down alone": Case(targets=("down_proj",), rank=9),
    "no LoRA": Case(targets=()),
    "room for LoRA": Case(spare_columns=(8, 16)),
    "bfloat16": Case(top_k=4, dtype=torch.bfloat16),
    "bfloat16, odd sizes": Case(hidden=36, intermediate=20, dtype=torch.bfloat16),
}


def check(case, results, num_ranks):
    """Each rank's result against the reference; gradients of LoRA summed over the ranks that hold
    an expert.
    """
    outputs, of_tokens, of_lora = reference(case, num_ranks)
    tolerance = 2e-5 if case.dtype == torch.float32 else 3e-2

    def close(value, wanted, what):
        error = (value.double() - wanted).norm() / wanted.norm()
        assert error < tolerance, f"{what}: {error}"

    found = {name: torch.zeros_like(value) for name, value in of_lora.items()}
    for rank, (output, of_x, gradients, own, _) in enumerate(results):
        close(output, outputs[rank], "output")
        close(of_x, of_tokens[rank], "gradient of the tokens")
        for name, value in gradients.items():
            found[name][own] += value
    for name, value in found.items():
        close(value, of_lora[name], name)
        for expert in case.shunned:
            assert not value[expert].any()


@pytest.mark.parametrize(
    "world_size, tp, ep, kind",
    [
        pytest.param(1, 1, 1, "LocalDispatcher", id="one rank"),
        pytest.param(2, 2, 2, "GatherDispatcher", id="TP2 EP2"),
        pytest.param(2, 1, 2, "ExchangeDispatcher", id="EP2 over DP2"),
        pytest.param(4, 4, 2, "GatherDispatcher", id="TP4 EP2", marks=pytest.mark.extended),
        pytest.param(4, 4, 4, "", id="TP4 EP4", marks=pytest.mark.extended),
        pytest.param(4, 2, 4, "ExchangeDispatcher", id="TP2 EP4", marks=pytest.mark.smoke),
    ],
)
def test_values_and_gradients(world_size, tp, ep, kind):
    by_rank = run_ranks(run_cases, world_size, tp, ep, list(CASES.values()))
    for number, case in enumerate(CASES.values()):
        results = [of_rank[number] for of_rank in by_rank]
        expected = kind
        if expected != "LocalDispatcher" and tp % ep == 0:
            expected = "GatherDispatcher" if ep <= case.top_k else "ExchangeDispatcher"
        assert {result[-1] for result in results} == {expected}
        check(case, results, world_size)


LARGE = Case(
    top_k=8,
    num_tokens=70,
    num_experts=16,
    hidden=256,
    intermediate=128,
    rank=8,
    shunned=(0, 3, 15),
    dropout=0.3,
)
WITH_DROPOUT = {
    "float32": LARGE,
    "bfloat16": replace(LARGE, dtype=torch.bfloat16),
    "bfloat16, odd sizes": replace(LARGE, hidden=36, intermediate=20, dtype=torch.bfloat16),
    "bfloat16, down alone": replace(LARGE, targets=("down_proj",), dtype=torch.bfloat16),
}


def test_dropout_is_that_of_its_masks(monkeypatch):
    """On the GPU where there is one. The entries that another seed drops give other numbers."""
    cases = list(WITH_DROPOUT.values())
    if DEVICE == "cuda":
        results = in_a_process(run_cases, 0, 1, 1, 1, cases, DEVICE)
    else:
        (results,) = run_ranks(run_cases, 1, 1, 1, cases)
    for case, result in zip(cases, results):
        check(case, [result], 1)
    for name, seed in SEEDS.items():
        with monkeypatch.context() as patch, pytest.raises(AssertionError, match="output"):
            patch.setitem(SEEDS, name, seed + 1)
            check(cases[0], [results[0]], 1)


def backward_twice(rank, world_size, tp, ep, cases):
    """Of each case, the results of two equal runs with dropout."""
    place = parallel.initialize(
        torch.device("cpu"), tensor_model_parallel_size=tp, expert_model_parallel_size=ep
    )
    found = []
    for case in cases:
        layer = make_layer(place, case)
        both = []
        for _ in range(2):
            parallel.seed_step(1, 0, place)
            both.append(run(layer, case, rank))
        found.append(both)
    return found


@pytest.mark.parametrize(
    "world_size, tp, ep",
    [
        (1, 1, 1),
        pytest.param(2, 2, 2, marks=pytest.mark.extended),
        pytest.param(2, 1, 2, marks=pytest.mark.extended),
    ],
)
def test_equal_inputs_give_equal_bits(world_size, tp, ep):
    """Dropout included; and dropout does something."""
    cases = [Case(top_k=4), Case(top_k=4, dropout=0.3)]
    for plain, dropped in run_ranks(backward_twice, world_size, tp, ep, cases):
        for first, second in (plain, dropped):
            assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
            assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])
        assert not torch.equal(plain[0][0], dropped[0][0])


def with_garbage(rank, world_size, case):
    """At TP 2, EP 2, results as they are; where the weight gradient of a group without rows is
    uninitialised memory, as on some GPUs; and in buffers for all pairs, with NaN where no row is.
    """
    place = parallel.initialize(
        torch.device("cpu"), tensor_model_parallel_size=2, expert_model_parallel_size=2
    )
    layer = make_layer(place, case)
    grouped_mm, wait = F.grouped_mm, NumbersOnHost.wait

    def result():
        parallel.seed_step(1, 0, place)
        return run(layer, case, rank)

    def garbage(x, weight, *, offs):
        product = grouped_mm(x, weight, offs=offs)
        if weight.dim() == 2:
            product[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        else:
            product[int(offs[-1]) :] = torch.nan
        return product

    def all_pairs(numbers):
        (own,) = wait(numbers)
        most = 2 * case.num_tokens * case.top_k
        assert own < most
        return [most]

    plain = result()
    F.grouped_mm = garbage
    garbled = result()
    NumbersOnHost.wait = all_pairs
    return plain, garbled, result()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_what_no_row_holds_reaches_nothing(dropout):
    """Rows that no expert has, and gradients of experts that have no row."""
    case = Case(top_k=2, shunned=(1, 5), dropout=dropout)
    for plain, *others in run_ranks(with_garbage, 2, case):
        assert plain[0].isfinite().all()
        for output, of_x, gradients in others:
            torch.testing.assert_close((output, of_x), plain[:2])
            for name, value in gradients.items():
                torch.testing.assert_close(value, plain[2][name])
                assert not value[1].any() and value[[0, 2]].any()


def two_adapters(rank, world_size):
    """Outputs of a layer whose teacher has LoRA of its own, while the student's changes."""
    place = parallel.initialize(torch.device("cpu"))
    case = Case()
    base = make_layer(place, replace(case, targets=()))
    x = tokens(case, 0)[0][:, None]
    layer = make_layer(place, case)
    linears = (layer.experts.gate_up, layer.experts.down)
    own = layer.local_expert_indices

    @torch.no_grad()
    def output(slot, of=layer):
        for linear in linears:
            linear.active = slot
        return of(x)[0]

    found = {"base": output(None, base), "off": output(None), "student alone": output(STUDENT)}
    values = weights(replace(case, rank=2))
    add_slot(linears[0], TEACHER, ["up_proj"], case, values, own, rank=2)
    found |= {slot: output(slot) for slot in (TEACHER, STUDENT)} | {"off again": output(None)}
    teacher = make_layer(place, replace(case, rank=2, targets=("up_proj",)))
    found["teacher alone"] = output(None, teacher)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for number in range(2):  # an update, and a loaded adapter
        if number == 0:
            for parameter in lora_parameters(layer).values():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        else:
            for linear in linears:
                for name, up in linear.slots[STUDENT].up.items():
                    index = (slice(None),)
                    part = ParameterSlice(TensorSlice(name, index), up, index)
                    part.view.mul_(-1)
        found[f"student {number}"] = output(STUDENT)
        fresh = make_layer(place, case)
        with torch.no_grad():
            for name, parameter in lora_parameters(fresh).items():
                parameter.copy_(lora_parameters(layer)[name])
        found[f"fresh {number}"] = fresh(x)[0]
        found[f"teacher {number}"] = output(TEACHER)
    weight = linears[1].base.weight
    found["untouched"] = torch.equal(weight, weights(case).down)
    found["bytes"] = [of.base.rows.nbytes / of.base.weight.nbytes for of in linears]
    return found


def changed_before_backward(rank, world_size):
    place = parallel.initialize(torch.device("cpu"))
    layer = make_layer(place, Case())
    output, _ = layer(tokens(Case(), 0)[0][:, None])
    with torch.no_grad():
        lora_parameters(layer)["down_proj", "B"].add_(1)
    output.sum().backward()


def test_a_change_between_forward_and_backward_raises():
    with pytest.raises(RuntimeError, match="changed between a forward and its backward"):
        run_ranks(changed_before_backward, 1)


def test_adapters_have_columns_of_their_own():
    """The toggle changes nothing in memory, an update and a loaded adapter are seen, the base's
    columns never change.
    """
    (found,) = run_ranks(two_adapters, 1)
    assert torch.equal(found["base"], found["off"]) and torch.equal(
        found["off"], found["off again"]
    )
    torch.testing.assert_close(found["student alone"], found[STUDENT], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[TEACHER], found["teacher alone"], rtol=1e-5, atol=1e-5)
    assert (found[TEACHER] - found["off"]).abs().max() > 0.1
    for number in range(2):
        now = found[f"student {number}"]
        torch.testing.assert_close(now, found[f"fresh {number}"], rtol=1e-6, atol=1e-6)
        assert (now - found["student alone"]).abs().max() > 0.1
        torch.testing.assert_close(found[f"teacher {number}"], found[TEACHER], rtol=1e-5, atol=1e-5)
    assert found["untouched"]
    # 2 x 3 numbers and the teacher's 2, each in 8 columns of 32; 3 in 8 of 16
    assert found["bytes"] == [1 + 16 / 32, 1 + 8 / 16]
