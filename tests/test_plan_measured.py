"""The planner's bytes of activations against what autograd saves and what tensors are alive, on
ranks at ten layouts.
"""

import random
from contextlib import contextmanager
from dataclasses import replace

import pytest

from megatron_gkd.config import flag_targets, parse_config
from megatron_gkd.lora_targets import ATTENTION, targets_in
from megatron_gkd.plan.activations import kept_by_layer
from megatron_gkd.plan.memory import estimate
from megatron_gkd.plan.shapes import Shapes
from megatron_gkd.plan.training_memory import moments
from megatron_gkd.plan.workload import workload
from tests.live_bytes import LiveBytes
from tests.ranks import run_ranks
from tests.train_runs import arguments, build_parts, layout_flags, write_rows

RANK, VOCABULARY = 8, 2003
SIZES = dict(num_hidden_layers=4, hidden_size=128, head_dim=16, moe_intermediate_size=96)
SIZES |= dict(num_experts_per_tok=4, vocab_size=VOCABULARY)

extended = pytest.mark.extended
LAYOUTS = [  # ranks, TP, PP, EP, CP, targets
    pytest.param(1, (1, 1, 1, 1), None, id="1 rank"),
    pytest.param(2, (2, 1, 1, 1), ATTENTION, id="TP2, attention"),
    pytest.param(4, (4, 1, 1, 1), None, id="TP4", marks=extended),
    pytest.param(2, (2, 1, 2, 1), None, id="TP2 EP2", marks=extended),
    pytest.param(2, (1, 1, 2, 1), None, id="DP2 EP2"),
    pytest.param(
        8, (4, 1, 8, 1), ("q_proj", "down_proj"), id="TP4 DP2 EP8, q and down", marks=extended
    ),
    pytest.param(2, (1, 2, 1, 1), None, id="PP2", marks=extended),
    pytest.param(2, (1, 1, 1, 2), None, id="CP2", marks=extended),
    pytest.param(2, (1, 1, 1, 1), None, id="DP2", marks=extended),
    pytest.param(4, (2, 1, 4, 2), None, id="TP2 CP2 EP4"),
]


def samples(number, seed=0):
    """Rows of other lengths, the teacher's view another than the student's."""
    from megatron_gkd.data import Sample, View

    draw = random.Random(seed)
    ids = lambda low, high: [draw.randrange(VOCABULARY) for _ in range(draw.randint(low, high))]
    found = []
    for row in range(number):
        prompts, response = (ids(20, 40), ids(20, 50)), ids(10, 30)
        student, teacher = (
            View(prompt + response, [-100] * len(prompt) + response, len(prompt))
            for prompt in prompts
        )
        found.append(Sample(student, teacher, "", row, 0))
    return found


@contextmanager
def saved_bytes(layers, shared):
    """Lists of what each layer's forward saves for autograd, without parameters and what all layers
    share, and of its experts' rows.
    """
    import torch

    known = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
    found, rows, hooks = [], [], []

    def begin(layer, arguments, keywords):
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks[:] = [torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), storages]
        hooks[0].__enter__()

    def end(layer, arguments, keywords, output):
        hooks[0].__exit__(None, None, None)
        skipped = known | {x.untyped_storage().data_ptr() for x in shared(keywords)}
        found.append(sum(size for key, size in hooks[1].items() if key not in skipped))

    handles = []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(layer.register_forward_hook(end, with_kwargs=True))
        count = lambda module, inputs: rows.append(len(inputs[1].pairs))
        handles.append(layer.mlp.experts.register_forward_pre_hook(count))
    try:
        yield found, rows
    finally:
        for handle in handles:
            handle.remove()


def _of_all_layers(keywords):
    """Rotations of the positions; of context-parallel parts masks and the order of positions."""
    rows = keywords["packed_seq_params"]
    return [keywords["rotary_pos_emb"], rows.order, *rows._masks.values()]


def _saved(rank, world_size, argv, number_bytes=4, drops=False):
    from megatron_gkd.forward import student_forward_backward, teacher_forward
    from tests.test_forward import pack

    parts, config = build_parts(argv), parse_config(argv)
    batch = pack(samples(8, parts.parallel.dp_rank), parts.parallel)
    teacher = teacher_forward(parts.model, [batch], parts.parallel)
    layers = parts.model.decoder.layers
    with saved_bytes(layers, _of_all_layers) as (found, rows):
        student_forward_backward(parts.ddp, [batch], teacher, parts.loss, parts.parallel)
    targets = flag_targets(config.lora, parts.model_args)
    counted = []
    for layer, of_layer in zip(layers, rows):
        shapes = Shapes(
            parts.model_args,
            config.parallel,
            batch.student.size,
            number_bytes=number_bytes,
            device="cpu",
            routed_rows=of_layer,
        )
        names = targets_in(targets, layer.layer_number - 1)
        counted.append(kept_by_layer(shapes, names, RANK, drops=drops))
    return found, counted


def _peaks(rank, world_size, argv):
    """(measured, counted) bytes of the teacher's forward, of the forward with the loss, of the
    backward and of the whole step, weights included: the second step's.
    """

    from megatron_gkd import forward
    from megatron_gkd.parallel import seed_step
    from tests.test_forward import pack

    parts, config, memory = build_parts(argv), parse_config(argv), LiveBytes()
    parallel, model, args = parts.parallel, parts.model, parts.model_args
    batch = pack(samples(8, parallel.dp_rank), parallel)
    tensors = [*model.parameters(), *model.buffers()]
    memory.ignore(tensors)
    weights = sum(
        {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values()
    )
    rows, measured = [], {}
    for layer in model.decoder.layers:
        count = lambda module, inputs: rows.append(len(inputs[1].pairs))
        layer.mlp.experts.register_forward_pre_hook(count)
    of_micro_batch = forward.micro_batch_loss

    def loss(*arguments):
        result = of_micro_batch(*arguments)
        measured["loss"] = memory.peak()
        memory.begin()
        return result

    forward.micro_batch_loss = loss
    for step in range(2):
        seed_step(0, step, parallel)
        with memory:
            rows.clear()
            parts.optimizer.zero_grad()
            memory.begin()
            teacher = forward.teacher_forward(model, [batch], parallel)
            measured["teacher"], of_teacher = memory.peak(), rows[:]
            rows.clear()
            memory.begin()
            forward.student_forward_backward(parts.ddp, [batch], teacher, parts.loss, parallel)
            measured["backward"] = memory.peak()
            memory.begin()
            parts.optimizer.step(1e-3, 0.5)
            measured["optimizer"] = memory.peak()
            del teacher
    size, layers = batch.student.size, len(model.decoder.layers)
    load = replace(
        workload(config, args, micro_batch_tokens=size),
        batch_size=1,
        row_tokens=size,
        teacher_row_tokens=batch.teacher.size,
        response_tokens=len(batch.student.targets),
        completion_tokens=0,
    )
    options = dict(device="cpu", routed_rows=rows[:layers])
    always = sum(estimate(args, config.parallel, load).always.values())
    of_stage = lambda **more: list(
        moments(args, config.parallel, load, parallel.pp_rank, **options | more)
    )
    counted = {"teacher": of_stage(routed_rows=[max(of_teacher)] * layers)[0]}
    counted["backward"] = of_stage()[-1]
    if parallel.is_last_stage:
        counted["loss"] = of_stage()[1]
    sums = {name: always + sum(of.values()) for name, of in counted.items()}
    measured = {name: weights + size for name, size in measured.items()}
    return measured, sums


def flags_of(folder, tmp_path, layout, targets, **more):
    rows = write_rows(tmp_path / "rows.jsonl", [dict(input_ids=[1], labels=[1])])
    flags = dict(model=folder, dataset=rows, output_dir=tmp_path, lora_rank=RANK, **more)
    words = ["--lora_target_modules", *targets] if targets else []
    return arguments(**flags, **layout_flags(*layout)) + words


@pytest.mark.parametrize("world_size, layout, targets", LAYOUTS)
def test_a_layer_keeps_what_autograd_saves(world_size, layout, targets, tiny_folder, tmp_path):
    argv = flags_of(tiny_folder(**SIZES), tmp_path, layout, targets)
    for saved, counted in run_ranks(_saved, world_size, argv):
        print(
            [f"{sum(of.values()) / x - 1:+.3%}" for x, of in zip(saved, counted)],
            saved[0],
            counted[0],
        )
        for of_layer, kinds in zip(saved, counted, strict=True):
            assert sum(kinds.values()) == pytest.approx(of_layer, rel=0.01), kinds


@pytest.mark.parametrize("drops", [True, False])
def test_a_layer_in_bfloat16_keeps_what_autograd_saves(drops, tiny_folder, tmp_path):
    flags = dict(torch_dtype="bfloat16", lora_dropout=0.1 if drops else 0)
    argv = flags_of(tiny_folder(**SIZES), tmp_path, (1, 1, 1, 1), None, **flags)
    ((saved, counted),) = run_ranks(_saved, 1, argv, 2, drops)
    print(
        [f"{sum(of.values()) / x - 1:+.3%}" for x, of in zip(saved, counted)], saved[0], counted[0]
    )
    for of_layer, kinds in zip(saved, counted, strict=True):
        assert sum(kinds.values()) == pytest.approx(of_layer, rel=0.01), kinds


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("world_size, layout, targets", LAYOUTS)
def test_a_step_peaks_where_the_planner_says(
    world_size, layout, targets, recompute, tiny_folder, tmp_path
):
    """At each moment, of the rank that has most."""
    argv = flags_of(tiny_folder(**SIZES), tmp_path, layout, targets, recompute=recompute)
    ranks = run_ranks(_peaks, world_size, argv)
    most = lambda which, name: max(rank[which].get(name, 0) for rank in ranks)
    for name in ("teacher", "loss", "backward"):
        assert most(1, name) == pytest.approx(most(0, name), rel=0.02), name
    whole = [max(max(rank[which].values()) for rank in ranks) for which in (0, 1)]
    assert whole[1] == pytest.approx(whole[0], rel=0.02)
