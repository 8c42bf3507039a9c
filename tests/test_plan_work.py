"""The planner's counted work is that of the code: products and attention by a dispatch mode,
collectives and messages by a recorder, on real decoders at several layouts; launches against those
that docs/training_step.md's counter sees.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.real_decoder import Shape
from megatron_gkd.layout import ParallelConfig
from megatron_gkd.lora_targets import LINEARS
from megatron_gkd.plan import step_work
from megatron_gkd.plan.work import Attention, Collective, Launches, Product, repeated
from megatron_gkd.plan.workload import Workload
from tests.ranks import run_ranks

SHAPE = Shape(
    num_layers=2,
    num_experts=8,
    num_experts_per_tok=2,
    hidden_size=64,
    moe_intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=512,
)
RANK, ROWS, LENGTH, RESPONSE, MICRO_BATCHES = 8, 2, 32, 8, 2
LOAD = Workload(
    number_bytes=4,
    lora_rank=RANK,
    targets=LINEARS,
    recompute=False,
    micro_batch_tokens=ROWS * LENGTH,
    batch_size=ROWS,
    accumulation=MICRO_BATCHES,
    prompt_tokens=LENGTH - RESPONSE,
    completion_tokens=0,
    row_tokens=LENGTH,
    teacher_row_tokens=LENGTH,
    response_tokens=RESPONSE,
)


class Products(TorchDispatchMode):
    """FLOPs of what is multiplied, by kind, from the operands' shapes."""

    def __init__(self):
        super().__init__()
        self.flops = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:] if name == "mm" else args[1:3]
            self.flops["dense"] += 2 * left.numel() * right.shape[1]
        elif name == "_grouped_mm":
            left, right = args[:2]
            offsets = args[2] if len(args) > 2 else kwargs["offs"]
            number = int(offsets[-1])  # rows; of a product over them, those that take part
            if right.dim() == 3:
                self.flops["grouped"] += 2 * number * right.shape[1] * right.shape[2]
            else:
                self.flops["grouped"] += 2 * number * left.shape[0] * right.shape[1]
        elif name.startswith("_scaled_dot_product"):
            backward = "backward" in name
            query, key = args[1:3] if backward else args[:2]
            products = 5 if backward else 2
            self.flops["attention"] += 2 * products * query.numel() * key.shape[2]
        else:
            assert not any(word in name for word in ("bmm", "matmul", "linear", "einsum")), name
        return function(*args, **(kwargs or {}))


def count(rank, world_size, sizes, recompute):
    """phase -> (FLOPs, collectives (kind, group) -> (calls, bytes), launches) of this rank."""
    from benchmarks.real_decoder import random_batch, random_decoder
    from benchmarks.training_step import Training
    from megatron_gkd.forward import student_forward_backward, teacher_forward
    from tests.collectives import Collectives
    from tests.counting import Counting, kernels_counted

    parallel, model_args, model = random_decoder(
        SHAPE,
        device="cpu",
        dtype=torch.float32,
        lora_rank=RANK,
        lora_dropout=0.0,
        recompute=recompute,
        **sizes,
    )
    training = Training(parallel, model_args, model)
    data = dict(num_rows=ROWS, length=LENGTH, response=RESPONSE)
    batches = [
        random_batch(SHAPE.vocab_size, parallel, **data, seed=seed) for seed in range(MICRO_BATCHES)
    ]
    found = {}

    def measure(phase, function, *args):
        products, seen, counting = Products(), Collectives(parallel.groups), Counting()
        with products, seen, counting, kernels_counted(counting):
            result = function(*args)
        collectives = {}
        for call in seen.of():
            if call.num_ranks == 1:
                continue
            size = call.given if call.name == "all_to_all" else call.num_bytes
            calls, total = collectives.get((call.name, call.group), (0, 0))
            collectives[call.name, call.group] = (calls + 1, total + size)
        found[phase] = dict(products.flops), collectives, counting.num_launches
        return result

    for _ in range(2):  # the step before makes what only the first one makes
        teacher = measure("teacher", teacher_forward, model, batches, parallel)
        training.optimizer.zero_grad()
        of_student = (training.reduced, batches, teacher, training.loss, parallel)
        sums = measure("student", student_forward_backward, *of_student)
        training.optimizer.step(1e-3, sums.means(parallel)["loss"])
    return found


LAYOUTS = {
    "one rank": {},
    "TP2": dict(tensor_model_parallel_size=2),
    "EP2": dict(expert_model_parallel_size=2),
    "CP2": dict(context_parallel_size=2),
    "PP2": dict(pipeline_model_parallel_size=2),
    "TP2 EP2": dict(tensor_model_parallel_size=2, expert_model_parallel_size=2),
    "TP2 EP4 DP2": dict(tensor_model_parallel_size=2, expert_model_parallel_size=4),
    "TP4": dict(tensor_model_parallel_size=4),  # two ranks share a key/value head
}
WORLDS = {"one rank": 1, "TP2 EP4 DP2": 4, "TP4": 4}
QUICK = ("one rank", "TP2 EP2", "EP2")


@pytest.mark.parametrize(
    "name, recompute",
    [
        pytest.param(
            name,
            recompute,
            marks=() if name in QUICK and recompute else pytest.mark.extended,
            id=f"{name}{', recompute' * recompute}",
        )
        for name in LAYOUTS
        for recompute in (True, False)
    ],
)
def test_counted_work_is_that_of_the_code(name, recompute):
    layout, world_size = ParallelConfig(**LAYOUTS[name]), WORLDS.get(name, 2)
    load = replace(LOAD, recompute=recompute)
    # the ranks' mean rows of experts: random weights spread them, which all ranks together do not
    step = step_work.Step(SHAPE.model_args(), layout, load, imbalance=1.0)
    assert step.micro_batches == MICRO_BATCHES
    ranks = run_ranks(count, world_size, LAYOUTS[name], recompute)
    last = ranks[world_size * (step.stages - 1) // step.stages :]
    for phase, work in (
        ("teacher", step_work.teacher(step)),
        ("student", step_work.student(step) + step_work.loss(step)),
    ):
        work = repeated(work, MICRO_BATCHES)
        _compare_flops(work, [found[phase][0] for found in last], layout)
        of_ranks = [found[phase][1] for found in last]
        reduced = step_work.reduction(step) if phase == "student" else []
        _compare_collectives([*work, *reduced], of_ranks)
        counted = max(found[phase][2] for found in last)
        launches = sum(item.times for item in work if isinstance(item, Launches))
        assert launches == pytest.approx(counted, rel=0.05)


def _compare_flops(work, found, layout):
    cp = layout.context_parallel_size
    mean = lambda kind: sum(flops.get(kind, 0) for flops in found) / len(found)
    of = lambda kind, **more: sum(item.flops for item in work if isinstance(item, kind))
    dense = sum(item.flops for item in work if isinstance(item, Product) and not item.groups)
    assert mean("dense") == pytest.approx(dense, rel=1e-6)
    assert mean("grouped") == pytest.approx(of(Product) - dense, rel=1e-6)
    # the counter takes the whole square; of a row cut in 2 C chunks up to a chunk's last key
    square = 2 if cp == 1 else (2 * cp + 1) / (2 * cp)
    assert mean("attention") == pytest.approx(square * of(Attention), rel=1e-6)


def _compare_collectives(work, found):
    counted: dict = {}
    for item in work:
        if isinstance(item, Collective):
            calls, total = counted.get((item.kind, item.group), (0, 0))
            key = item.kind, item.group
            counted[key] = (calls + item.times, total + item.times * item.num_bytes)
    sized = {  # what carries rows, keys or gradients; numbers of a few bytes are not counted
        key
        for ranks in found
        for key, (_, total) in ranks.items()
        if key[1] in ("tp", "ep", "cp", "pp", "dp_cp", "expt_dp") and total > 1000
    }
    assert sized <= {*counted, ("recv", "pp")}, (sized, counted)
    if ("send", "pp") in counted:  # of the last stage: what it receives and what it sends
        both = [[ranks.get((kind, "pp"), (0, 0)) for kind in ("send", "recv")] for ranks in found]
        assert both and {tuple(map(sum, zip(*one))) for one in both} == {counted["send", "pp"]}
    for kind, group in sized - {("recv", "pp"), ("send", "pp")}:
        (calls,) = {ranks[kind, group][0] for ranks in found}
        mean = sum(ranks[kind, group][1] for ranks in found) / len(found)
        assert mean == pytest.approx(counted[kind, group][1], rel=0.01), (kind, group, counted)
        assert calls == pytest.approx(counted[kind, group][0], abs=0.5), (kind, group)
