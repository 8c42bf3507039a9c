"""The planner's counted work is that of the code: products and attention by a dispatch mode,
collectives and messages by a recorder, on real decoders at several layouts; launches against those
that docs/training_step.md's counter sees. A layer of the 30B is counted by hand.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.real_decoder import REAL_SHAPE, Shape
from megatron_gkd.layout import ParallelConfig
from megatron_gkd.lora_targets import LINEARS
from megatron_gkd.plan import rollout_work, step_work
from megatron_gkd.plan.layer_work import Layer, forward
from megatron_gkd.plan.placement import placement
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


def count_token(rank, world_size, sizes):
    """(collectives (kind, group) -> (calls, bytes), operations) of a token on this rank."""
    from benchmarks.real_decoder import random_decoder
    from benchmarks.rollout_real import SAMPLED, RolloutBench
    from megatron_gkd.lora import as_student
    from megatron_gkd.rollout.row_batch import RowBatch
    from tests.collectives import Collectives
    from tests.counting import Counting

    parallel, model_args, model = random_decoder(
        SHAPE, device="cpu", dtype=torch.float32, lora_rank=RANK, lora_dropout=0.0, **sizes
    )
    bench = RolloutBench(parallel, model_args, model, SHAPE, lambda **_: None)
    number = ROWS * MICRO_BATCHES
    with as_student(model), torch.no_grad():
        engine = bench.engine(SAMPLED, RESPONSE, graphs=False)
        prompts = bench.prompts(number, LENGTH - RESPONSE)
        batch = RowBatch(engine, prompts, None, 1, number, 0, list(range(number)))
        batch.reserve(RESPONSE)
        batch.write_token(0)
        seen, counting = Collectives(parallel.groups), Counting()
        with seen, counting:
            batch.write_token(1)
    found = {}
    for call in seen.of():
        if call.num_ranks > 1:
            calls, total = found.get((call.name, call.group), (0, 0))
            found[call.name, call.group] = (calls + 1, total + call.num_bytes)
    return found, sum(counting.operations.values())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("TP2", "EP2") else pytest.mark.extended, id=name)
        for name in ("TP2", "EP2", "PP2", "TP2 EP2", "TP2 EP4 DP2")
    ],
)
def test_a_tokens_collectives_are_those_of_the_code(name):
    load = replace(LOAD, completion_tokens=RESPONSE, on_policy_share=1.0)
    step_of = lambda sizes: step_work.Step(SHAPE.model_args(), ParallelConfig(**sizes), load)
    step = step_of(LAYOUTS[name])
    ranks = run_ranks(count_token, WORLDS.get(name, 2), LAYOUTS[name])
    found, operations = ranks[-1]  # of the last stage
    work = rollout_work.token(step) + rollout_work.token_head(step)
    counted: dict = {}
    for item in work:
        if isinstance(item, Collective) and item.times >= 1:  # not those of a look at the texts
            key = item.kind, item.group
            calls, total = counted.get(key, (0, 0))
            counted[key] = (calls + item.times, total + item.times * item.num_bytes)
    if step.stages > 1:
        found["send", "pp"] = found.pop(("recv", "pp"))
    assert found == counted
    if step.stages > 1:
        return
    (_, alone), launches = run_ranks(count_token, 1, {})[0], []
    for of in (step, step_of({})):
        items = rollout_work.token(of) + rollout_work.token_head(of)
        launches.append(sum(item.times for item in items if isinstance(item, Launches)))
    assert launches[0] / launches[1] == pytest.approx(operations / alone, rel=0.1)


def test_a_layer_of_the_30b_by_hand():
    """4 rows of 2,048 tokens of a replica, the teacher's forward: FLOPs, bytes on the links."""
    args = REAL_SHAPE.model_args()
    of = lambda tokens, **sizes: Layer(tokens, 2048, args, ParallelConfig(**sizes), 2, 8)
    sent = lambda work: {
        (item.kind, item.group, item.num_bytes) for item in work if isinstance(item, Collective)
    }
    # 32 heads and 2 x 4 heads of keys and values, of 128; o_proj; the router; 8 of 128 experts
    dense = 2 * 8192 * 2048 * (40 * 128) + 2 * 8192 * 4096 * 2048 + 2 * 8192 * 2048 * 128
    experts = 2 * 8 * 8192 * 3 * 2048 * 768
    attention = 4 * (8192 * 2048 // 2) * 4096

    alone = forward(of(8192, expert_model_parallel_size=8))
    products = [item for item in alone if isinstance(item, Product)]
    assert sum(item.flops for item in products) == dense + experts
    assert sum(item.flops for item in alone if isinstance(item, Attention)) == attention
    grouped = [item for item in products if item.groups]
    weights = sum(item.groups * item.inner * item.columns for item in grouped)
    assert weights == 16 * 3 * 2048 * 768
    pairs, counts = 8192 * 8 * 2048 * 2, 128 * 4  # in bfloat16; int32 of all experts
    chances = 8192 * 8 * 4
    assert sent(alone) == {("all_to_all", "ep", size) for size in (pairs, chances, counts)}

    two = forward(of(8192, tensor_model_parallel_size=2, expert_model_parallel_size=8))
    # the router sees a shard, everything else of attention has half of the heads; as many pairs
    # come back to a rank as it has tokens' pairs
    flops = sum(item.flops for item in two if isinstance(item, Product))
    assert flops == (dense + experts) / 2
    shards = 8192 * 2048 * 2
    assert sent(two) == {
        ("all_gather", "tp", shards),
        ("reduce_scatter", "tp", shards),
        *(("all_to_all", "ep", size) for size in (pairs / 2, chances / 2, counts)),
    }

    layout = ParallelConfig(
        tensor_model_parallel_size=2, expert_model_parallel_size=8, pipeline_model_parallel_size=2
    )
    load = replace(LOAD, number_bytes=2, batch_size=4, accumulation=1, micro_batch_tokens=8192)
    load = replace(load, row_tokens=2048, teacher_row_tokens=2048, response_tokens=512)
    step = step_work.Step(args, layout, load)
    (messages,) = {
        item.num_bytes for item in step_work.teacher(step) if getattr(item, "group", "") == "pp"
    } - {step_work.SHAPE_BYTES}
    assert messages == shards / 2
    # gradients in fp32 of W_down and W_up, of rank 8, in 24 layers: q, o, k and v of half of the
    # heads on 16 replicas, 16 experts on 4
    of_heads = 2 * (2048 + 16 * 128) + 2 * (2048 + 2 * 128)
    of_experts = 16 * 3 * (2048 + 768)
    reduced = [(item.group, item.num_bytes) for item in step_work.reduction(step)]
    assert ("dp_cp", 24 * 8 * of_heads * 4) in reduced
    assert ("expt_dp", 24 * 8 * of_experts * 4) in reduced
    # of which W_down of q, k and v and W_up of o are partial sums
    assert ("tp", 24 * 8 * 4 * 2048 * 4) in reduced
    placed = placement(layout, 64, 8)
    assert {
        name: (placed[name].size, placed[name].nodes) for name in ("dp_cp", "expt_dp", "ep")
    } == {"dp_cp": (16, 4), "expt_dp": (4, 4), "ep": (8, 1)}
