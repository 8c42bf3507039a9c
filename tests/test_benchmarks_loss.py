"""The benchmark's contenders compute the same thing, and its meter sees memory."""

import importlib.util
import time

import pytest
import torch
import torch.distributed as dist

from benchmarks import contenders, loss, loss_parallel
from benchmarks.loss_bounds import bounds
from benchmarks.loss_parallel import parallel_table
from benchmarks.loss_tables import OTHER, REAL, hidden_tensors, logit_tensors
from benchmarks.meter import Meter, Result, measure
from benchmarks.step_memory import all_logits
from megatron_gkd.loss import Divergence, linear_divergence
from tests.ranks import run_ranks
from tests.reference_loss import relative_error

SETTINGS = dict(beta=0.3, temperature=2.0)


def test_contenders_agree():
    student, teacher = logit_tensors(70, 301, torch.float32, "cpu")
    ours, trl, plain = (
        make(student, teacher, SETTINGS)()[0]
        for make in (contenders.run_ours, contenders.run_trl, contenders.run_plain)
    )
    assert relative_error(ours, trl) < 1e-5 and relative_error(plain, trl) < 1e-5
    tensors = hidden_tensors(70, 8, 301, torch.float32, "cpu")
    ours, trl = (
        make(*tensors, SETTINGS) for make in (contenders.run_linear, contenders.run_linear_trl)
    )
    assert relative_error(ours()[0], trl()[0]) < 1e-5


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None,
    reason="Liger-Kernel runs on CUDA, where `pip install -e .[benchmarks]` has put it",
)
def test_liger_agrees():
    """Its loss is the mean over the rows, ours the sum."""
    student, teacher = logit_tensors(70, 301, torch.float32, "cuda")
    ours, liger = (
        make(student, teacher, SETTINGS)()[0]
        for make in (contenders.run_ours, contenders.run_liger)
    )
    assert relative_error(70 * liger, ours) < 1e-4
    tensors = hidden_tensors(70, 64, 301, torch.float32, "cuda")
    ours, liger = (
        make(*tensors, SETTINGS)()[0]
        for make in (contenders.run_linear, contenders.run_linear_liger)
    )
    assert relative_error(70 * liger, ours) < 1e-4


def test_the_step_before_computes_the_same():
    """What benchmarks/step_memory.py puts in the place of linear_jsd, padded head rows included."""
    student, teacher, weight = hidden_tensors(9, 8, 40, torch.float32, "cpu")
    inputs = (student, teacher, weight)
    ours, other = (
        function(*inputs, Divergence(**SETTINGS), vocab_size=37)
        for function in (linear_divergence, all_logits)
    )
    assert relative_error(other.loss, ours.loss) < 1e-4
    gradients = [torch.autograd.grad(output.loss.sum(), student)[0] for output in (ours, other)]
    assert relative_error(gradients[1], gradients[0]) < 1e-5


def parallel_gradients(rank, world_size):
    student, teacher = logit_tensors(70, 20, torch.float32, "cpu", seed=rank)
    runs = (
        make(student, teacher, SETTINGS, dist.group.WORLD)
        for make in (contenders.run_ours, contenders.run_plain)
    )
    return [run()[0] for run in runs]


def test_contenders_agree_on_ranks():
    for ours, plain in run_ranks(parallel_gradients, 2):
        assert relative_error(ours, plain) < 1e-5


def test_meter_sees_the_peak_of_a_run():
    meter = Meter("cpu")
    _, small = meter(lambda: torch.ones(2**20))
    _, large = meter(lambda: [torch.ones(2**25) for _ in range(2)].clear())
    assert small < 2**25 and 0.95 * 2**28 < large < 1.2 * 2**28


def test_what_fails_is_a_row_and_not_the_end():
    def missing():
        import a_module_that_nobody_has  # noqa: F401

    def broken():
        raise RuntimeError("no kernel image\nand more")

    runs = {"TRL": lambda: None, "Liger": missing, "plain torch": broken, "huge": lambda: None}
    found = {r.name: r.failure for r in measure((), runs, "cpu", 1, 0, 0, expected={"huge": 2**60})}
    assert found["TRL"] == "" and found["Liger"] == "not installed: a_module_that_nobody_has"
    assert (
        found["plain torch"] == "failed: RuntimeError: no kernel image"
        and "does not fit" in found["huge"]
    )
    with pytest.raises(RuntimeError, match="no kernel image"):
        measure((), {"linear_jsd": broken}, "cpu", 1, 0, 0)


def test_bounds_are_computed():
    """Every case that a bound speaks of is in the sweep, and a miss is called one."""
    logit_sizes, linear_sizes, _ = loss.cases("cpu", small=False)
    logits = [
        Result(case, name, seconds, peak)
        for case in logit_sizes
        for name, seconds, peak in (("TRL", 6.1, 600), ("vocab_parallel_jsd", 1, 120))
    ]
    linear = [
        Result(case[:4], name, seconds, above_outputs=100)
        for case in linear_sizes
        for name, seconds in (
            ("linear_jsd", 1.19 if case[0] < 2048 else 1.21),
            ("three GEMMs", 1.0),
        )
    ]
    words = [
        line.split(" | ")[-1].strip(" |") for line in bounds(logits, linear, None).splitlines()[2:]
    ]
    assert words == ["held"] * 3 + ["missed"] + ["held"] + ["held", "missed"] * 2
    assert "not measured" in bounds([], [], 1e12)
    sizes = {case[:3] for case in logit_sizes}
    assert {case[0] for case in sizes} >= {256, 8192} and {case[1] for case in sizes} == {
        OTHER,
        REAL,
    }


def failing_rank(rank, *_):
    if rank == 1:
        raise RuntimeError("rank 1 is broken")
    time.sleep(600)  # the others wait for it


def test_a_rank_that_fails_ends_the_table(monkeypatch):
    monkeypatch.setattr(loss_parallel, "parallel_rank", failing_rank)
    with pytest.raises(Exception, match="rank 1 is broken"):
        parallel_table([(2, 4, 8, 8)], rounds=1)
