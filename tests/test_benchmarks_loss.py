"""The benchmark's contenders compute the same thing, and its meter sees memory."""

import torch
import torch.distributed as dist

from benchmarks import contenders
from benchmarks.loss import Meter, hidden_tensors, logit_tensors
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
    ours, trl = (make(*tensors, SETTINGS) for make in (contenders.run_linear, contenders.run_linear_trl))
    assert relative_error(ours()[0], trl()[0]) < 1e-5


def parallel_gradients(rank, world_size):
    student, teacher = logit_tensors(70, 20, torch.float32, "cpu", seed=rank)
    runs = (make(student, teacher, SETTINGS, dist.group.WORLD) for make in (contenders.run_ours, contenders.run_plain))
    return [run()[0] for run in runs]


def test_contenders_agree_on_ranks():
    for ours, plain in run_ranks(parallel_gradients, 2):
        assert relative_error(ours, plain) < 1e-5


def test_meter_sees_the_peak_of_a_run():
    meter = Meter("cpu")
    _, small = meter(lambda: torch.ones(2**20))
    _, large = meter(lambda: [torch.ones(2**25) for _ in range(2)].clear())
    assert small < 2**25 and 0.95 * 2**28 < large < 1.2 * 2**28
