"""The planner's bytes of activations against what autograd saves and what tensors are alive, on
ranks at ten layouts.
"""

import gc
import random
from contextlib import contextmanager
from dataclasses import replace

import pytest

from megatron_gkd.config import flag_targets, parse_config
from megatron_gkd.lora_targets import ATTENTION, targets_in
from megatron_gkd.plan.activations import kept_by_layer
from megatron_gkd.plan.memory import standing_parts
from megatron_gkd.plan.shapes import Shapes
from megatron_gkd.plan.training_memory import moments
from megatron_gkd.plan.workload import workload
from tests.live_bytes import LiveBytes
from tests.processes import in_a_process
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
    pytest.param(
        2, (1, 2, 1, 1), ("1.q_proj", "1.down_proj", "3.v_proj"), id="PP2, uneven", marks=extended
    ),
    pytest.param(2, (1, 1, 1, 2), None, id="CP2", marks=extended),
    pytest.param(2, (1, 1, 1, 1), None, id="DP2", marks=extended),
    pytest.param(4, (2, 1, 4, 2), None, id="TP2 CP2 EP4"),
]
IN_CI = ("1 rank", "TP2 CP2 EP4")  # with recomputation too
CASES = [
    pytest.param(
        *layout.values,
        recompute,
        id=f"{layout.id}, {recompute}",
        marks=extended if recompute == "full" and layout.id not in IN_CI else layout.marks,
    )
    for layout in LAYOUTS
    for recompute in ("none", "full")
]


def samples(number, seed=0, one_length=False):
    """Rows of other lengths, or of one; the teacher's view another than the student's."""
    from megatron_gkd.data import Sample, View

    draw = random.Random(seed)
    length = lambda low, high: high if one_length else draw.randint(low, high)
    ids = lambda low, high: [draw.randrange(VOCABULARY) for _ in range(length(low, high))]
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
    """Lists of what each layer's forward with a gradient saves, without parameters and what all
    layers share, and of the rows of its experts.
    """
    import torch

    known = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
    found, rows, hooks = [], [], []

    def begin(layer, arguments, keywords):
        storages = {}
        if not torch.is_grad_enabled():
            return

        def pack(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks[:] = [torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), storages]
        hooks[0].__enter__()

    def end(layer, arguments, keywords, output):
        if not torch.is_grad_enabled():
            return
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


def counted_layers(parts, config, batch, rows, number_bytes, device):
    """`kept_by_layer` of this rank's layers."""
    targets, counted = flag_targets(config.lora, parts.model_args), []
    for layer, of_layer in zip(parts.model.decoder.layers, rows, strict=True):
        shapes = Shapes(
            parts.model_args,
            config.parallel,
            batch.student.size,
            number_bytes=number_bytes,
            device=device,
            routed_rows=of_layer,
        )
        names = targets_in(targets, layer.layer_number - 1)
        drops = config.lora.lora_dropout > 0
        counted.append(kept_by_layer(shapes, names, RANK, drops=drops))
    return [sum(kinds.values()) for kinds in counted]


def _saved(rank, world_size, argv, number_bytes):
    from megatron_gkd.forward import student_forward_backward, teacher_forward
    from tests.test_forward import pack

    parts, config = build_parts(argv), parse_config(argv)
    batch = pack(samples(8), parts.parallel)
    teacher = teacher_forward(parts.model, [batch], parts.parallel)
    with saved_bytes(parts.model.decoder.layers, _of_all_layers) as (saved, rows):
        student_forward_backward(parts.ddp, [batch], teacher, parts.loss, parts.parallel)
    return saved, counted_layers(parts, config, batch, rows, number_bytes, "cpu")


def _step(rank, world_size, argv, device="cpu", number=8, memory=None):
    """Of the second step of a run, measured and counted: bytes that each layer saves, the most that
    is alive in the teacher's forward, in the forward with the loss and in the backward beside what
    is counted to stand always; and this. number: of rows. device: whose kernels run.
    """
    from megatron_gkd import forward
    from megatron_gkd.parallel import seed_step
    from tests.test_forward import pack

    parts, config, memory = build_parts(argv), parse_config(argv), memory or LiveBytes()
    parallel, model, args = parts.parallel, parts.model, parts.model_args
    batch = pack(samples(number, parallel.dp_rank, device == "cuda"), parallel)
    tensors = [*model.parameters(), *model.buffers()]
    memory.ignore(tensors)
    storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}
    weights, measured = sum(storage.nbytes() for storage in storages.values()), {}
    of_micro_batch = forward.micro_batch_loss

    def loss(*arguments):
        result = of_micro_batch(*arguments)
        measured["loss"] = memory.peak()
        memory.begin()
        return result

    forward.micro_batch_loss = loss

    def step(number, memory):
        seed_step(0, number, parallel)
        with memory, saved_bytes(model.decoder.layers, _of_all_layers) as (saved, rows):
            parts.optimizer.zero_grad()
            memory.begin()
            teacher = forward.teacher_forward(model, [batch], parallel)
            measured["teacher"] = memory.peak()
            of_teacher = len(rows)
            memory.begin()
            forward.student_forward_backward(parts.ddp, [batch], teacher, parts.loss, parallel)
            measured["backward"] = memory.peak()
            parts.optimizer.step(1e-3, 0.5)
        return saved, rows[:of_teacher], rows[of_teacher:]

    step(0, memory)
    saved, of_teacher, rows = step(1, memory)
    layers, size = len(model.decoder.layers), batch.student.size
    kept = counted_layers(parts, config, batch, rows[:layers], 4, device)
    load = replace(
        workload(config, args, micro_batch_tokens=size),
        batch_size=1,
        row_tokens=size,
        teacher_row_tokens=batch.teacher.size,
        response_tokens=len(batch.student.targets),
        completion_tokens=0,
    )
    stands = standing_parts(args, config.parallel, load, parallel.pp_rank)
    always = sum(stands.values())

    def of_stage(routed_rows):
        stage = (args, config.parallel, load, parallel.pp_rank)
        found = moments(*stage, device=device, routed_rows=routed_rows)
        return {name: sum(parts.values()) for name, parts in found.items()}

    counted = {"teacher": of_stage([max(of_teacher)] * layers)["teacher's forward"]}
    of_student = of_stage(rows[:layers])
    counted |= {name: of_student[name] for name in ("loss", "backward") if name in of_student}
    measured = {name: weights + found - always for name, found in measured.items()}
    return (saved, measured), (kept, counted), always


def flags_of(folder, tmp_path, layout, targets, **more):
    rows = write_rows(tmp_path / "rows.jsonl", [dict(input_ids=[1], labels=[1])])
    flags = dict(model=folder, dataset=rows, output_dir=tmp_path, lora_rank=RANK, **more)
    words = ["--lora_target_modules", *targets] if targets else []
    return arguments(**flags, **layout_flags(*layout)) + words


def compare(ranks, recompute, rel=None):
    """Of each layer what it saves; of each moment, for the rank that has most, what it holds with
    weights and LoRA within 2 %, and where `rel` is given beside them within that.
    """
    for (saved, _), (kept, _), _ in ranks:
        if recompute == "none":
            assert kept == pytest.approx(saved, rel=0.001)
    for name in ("teacher", "loss", "backward"):
        own, counted = (
            max(rank[which][1].get(name, 0) + rank[2] for rank in ranks) for which in (0, 1)
        )
        assert counted == pytest.approx(own, rel=0.02), name
        if rel is not None:
            ((_, _, always),) = ranks
            assert counted - always == pytest.approx(own - always, rel=rel), name


@pytest.mark.parametrize("world_size, layout, targets, recompute", CASES)
def test_a_step_holds_what_the_planner_counts(
    world_size, layout, targets, recompute, tiny_folder, tmp_path
):
    """At each of its moments, with as many routed rows as there were."""
    argv = flags_of(tiny_folder(**SIZES), tmp_path, layout, targets, recompute=recompute)
    compare(run_ranks(_step, world_size, argv), recompute, 0.01 if world_size == 1 else None)


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_a_layer_in_bfloat16_keeps_what_autograd_saves(dropout, tiny_folder, tmp_path):
    flags = dict(torch_dtype="bfloat16", lora_dropout=dropout)
    argv = flags_of(tiny_folder(**SIZES), tmp_path, (1, 1, 1, 1), None, **flags)
    ((saved, kept),) = run_ranks(_saved, 1, argv, 2)
    assert kept == pytest.approx(saved, rel=0.001)


class Collected(LiveBytes):
    """Without what Triton's interpreter holds in reference cycles."""

    def _let_threads_finish(self):
        gc.collect()


def _with_gpu_kernels(argv):
    """`_step` with the kernels that a GPU runs, in Triton's interpreter."""
    import torch.distributed as dist

    from megatron_gkd.lora import low_product
    from megatron_gkd.loss import passes
    from megatron_gkd.model import experts, norm_rotary

    for module in (passes, low_product, experts, norm_rotary):
        module.runs_triton = lambda device: True
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    gc.freeze()
    return _step(0, 1, argv, "cuda", number=2, memory=Collected())


@extended
def test_a_step_with_the_kernels_of_a_gpu_holds_what_the_planner_counts(tiny_folder, tmp_path):
    """With dropout, which those draw in registers. Attention and norms are a CPU's."""
    folder = tiny_folder(**SIZES | dict(num_hidden_layers=2))
    argv = flags_of(folder, tmp_path, (1, 1, 1, 1), None, lora_dropout=0.1)
    compare([in_a_process(_with_gpu_kernels, argv, interpret_triton=True)], "none", 0.02)
