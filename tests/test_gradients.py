"""The reduction of LoRA's gradients: many buckets, which start in the backward, give what one sum
after it gives, and what the float64 reference says; in whatever step a run may have.
"""

import re
import shutil
from functools import partial
from math import prod
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gkd.gradients import GradientReducer, smallest_bucket
from megatron_gkd.lora_targets import HEAD
from tests.collectives import Collectives
from tests.media_rows import write_rows as write_media_rows
from tests.ranks import run_ranks
from tests.reference_step import ATTENTION, EXPERTS, reference_gradients, write_adapter
from tests.test_forward import make_samples, pack
from tests.train_runs import (
    SMALL,
    arguments,
    build_parts,
    layout_flags,
    make_rows,
    read_lines,
    stable,
    write_rows,
)

SMALL_BUCKET = 6000  # bytes: several buckets in each of a small model's two buffers
SIZES = (3, 0, 1)  # rows of a rank's micro-batches


@pytest.fixture(scope="module")
def flags(tiny_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("gradients")
    return dict(
        model=tiny_folder(**SMALL),
        dataset=write_rows(root / "rows.jsonl", make_rows(2)),
        output_dir=root,
    )


def sizes_of(replica, idle):
    """Rows of each micro-batch of this data-parallel rank."""
    return (0,) * len(SIZES) if replica in idle else SIZES


def watched_pass(parts, sizes):
    """One step's passes over rows of the data-parallel rank's own. The reductions of gradients,
    each (group, bytes, gradients that came before it in the student's backward, ... and after it);
    then this rank's gradients.
    """
    from megatron_gkd.forward import student_forward_backward, teacher_forward
    from megatron_gkd.lora.adapter import adapter_slices

    parallel = parts.parallel
    samples, batches = make_samples(sum(sizes), seed=parallel.dp_rank), []
    for size in sizes:
        batches.append(pack(samples[:size] or [None], parallel))
        del samples[:size]
    teacher = teacher_forward(parts.model, batches, parallel)
    parts.optimizer.zero_grad()
    with Collectives(parallel.groups) as seen:
        handles = [
            node.register_hook(lambda *_: seen.calls.append("gradient"))
            for node in parts.ddp.grad_accs
        ]
        student_forward_backward(parts.ddp, batches, teacher, parts.loss, parallel)
    for handle in handles:
        handle.remove()
    reductions = [
        (
            call.group,
            call.given,
            calls.count("gradient"),
            seen.calls[len(calls) :].count("gradient"),
        )
        for index, call in enumerate(seen.calls)
        if call != "gradient" and call.name == "all_reduce" and call.is_async
        for calls in [seen.calls[:index]]
    ]
    return reductions, [
        (piece.stored.name, piece.stored.index, piece.parameter.main_grad[piece.where].clone())
        for piece in adapter_slices(parts.model, parts.model_args, parallel)
    ]


def both_ways(rank, world_size, argv, idle):
    """With one bucket a buffer, with many, then a step without a row; and bytes of the buffers."""
    whole = build_parts(argv)
    sizes = sizes_of(whole.parallel.dp_rank, idle)
    found = dict(whole=watched_pass(whole, sizes))
    cut = build_parts(argv, again=True, bucket_bytes=SMALL_BUCKET)
    found |= dict(cut=watched_pass(cut, sizes), nothing=watched_pass(cut, (0, 0, 0)))
    of_groups = dict(dp_cp=cut.ddp.buffers, expt_dp=cut.ddp.expert_parallel_buffers)
    num_bytes = {
        group: sum(buffer.grad_data.nbytes for buffer in buffers)
        for group, buffers in of_groups.items()
        if buffers and buffers[0].data_parallel_group.size() > 1
    }
    return found, num_bytes, len(cut.ddp.grad_accs)


def check_gradients(found, expected, grad_norm):
    """A rank's slices of the gradients are the reference's."""
    for name, index, gradient in found:
        wanted = expected[name][index]
        error = (gradient - wanted).norm().item()
        assert error <= 1e-3 * wanted.norm().item() + 1e-6 * grad_norm, name


@pytest.mark.parametrize(
    "world_size, layout, targets, more",
    [
        pytest.param(
            *(4, dict(tp=2, ep=2), ATTENTION + EXPERTS, dict(recompute="full")),
            id="TP2 EP2 DP2, recompute",
            marks=pytest.mark.smoke,
        ),
        pytest.param(4, dict(ep=2), ATTENTION + EXPERTS, {}, id="DP4 EP2"),
        pytest.param(
            *(4, dict(pp=2), ATTENTION + EXPERTS, dict(recompute="full")),
            id="PP2 DP2, recompute",
            marks=pytest.mark.extended,
        ),
        pytest.param(2, {}, ATTENTION, {}, id="DP2, attention", marks=pytest.mark.extended),
        pytest.param(4, {}, EXPERTS, {}, id="DP4, experts", marks=pytest.mark.extended),
        pytest.param(2, dict(cp=2), ATTENTION + EXPERTS, {}, id="CP2", marks=pytest.mark.extended),
        pytest.param(
            *(8, dict(tp=2, ep=4), ATTENTION + EXPERTS, {}),
            id="TP2 EP4 DP4",
            marks=pytest.mark.extended,
        ),
    ],
)
def test_buckets_that_start_early(flags, tmp_path, world_size, layout, targets, more):
    """The gradients, which are the reference's; every byte of a buffer reduced once, the first
    buckets before the last micro-batch has all its gradients, none before it has begun.
    """
    adapter = write_adapter(tmp_path / "adapter", flags["model"], rank=3, alpha=5, targets=targets)
    argv = arguments(**flags, **more, adapter=adapter, **layout_flags(**layout))
    replica = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1)
    num_replicas = world_size // replica
    rows = [row for rank in range(num_replicas) for row in make_rows(sum(SIZES), seed=rank)]
    means, expected = reference_gradients(flags["model"], adapter, rows)
    for found, num_bytes, num_parameters in run_ranks(both_ways, world_size, argv, ()):
        reductions = {name: seen for name, (seen, _) in found.items()}
        assert [(group, size) for group, size, *_ in reductions["whole"]] == [
            (group, num_bytes[group]) for group in ("expt_dp", "dp_cp") if group in num_bytes
        ]
        assert all(after == 0 for *_, after in reductions["whole"])
        assert reductions["cut"] == reductions["nothing"]
        for group, size in num_bytes.items():
            parts = [part for name, part, *_ in reductions["cut"] if name == group]
            assert sum(parts) == size and min(parts) > SMALL_BUCKET / 3
        assert len(reductions["cut"]) > len(num_bytes)
        assert all(before > 2 * num_parameters for _, _, before, _ in reductions["cut"])
        assert reductions["cut"][0][3] > num_parameters / 3  # still to come
        check_gradients(found["cut"][1], expected, means["grad_norm"])
        errors = [
            float((whole - cut).abs().max())
            for (_, _, whole), (_, _, cut) in zip(found["whole"][1], found["cut"][1])
        ]
        # of two ranks' numbers there is one sum; of four, gloo's order depends on the place
        assert max(errors) <= (0 if num_replicas <= 2 else 1e-6 * means["grad_norm"])
        assert not any(gradient.any() for *_, gradient in found["nothing"][1])


FIRST_ATTENTION_THEN_EXPERTS = r"layers\.0\.mlp|layers\.1\.self_attn"


@pytest.mark.parametrize(
    "world_size, layout, left_out, idle, more",
    [
        pytest.param(*(4, dict(pp=2), FIRST_ATTENTION_THEN_EXPERTS, (1,), {}), id="PP2 DP2"),
        *(
            pytest.param(*case, id=name, marks=pytest.mark.extended)
            for name, case in {
                "TP4 EP2 DP2": (8, dict(tp=4, ep=2), "nothing", (), {}),
                "TP2 EP8 DP4": (8, dict(tp=2, ep=8), "nothing", (1,), {}),
                "TP2 CP2 EP2": (8, dict(tp=2, cp=2, ep=2), "nothing", (1,), dict(recompute="full")),
                "TP2 PP2 EP4": (
                    8,
                    dict(tp=2, pp=2, ep=4),
                    r"layers\.1\.",
                    (0,),
                    dict(recompute="full"),
                ),
                "DP4 EP4": (4, dict(ep=4), r"layers\.1\.self_attn\.[qko]", (0, 2), {}),
            }.items()
        ),
    ],
)
def test_where_some_have_nothing(flags, tmp_path, world_size, layout, left_out, idle, more):
    """LoRA on the lm_head and on some linears of some layers, so that a pipeline stage may have
    none of a kind; data-parallel ranks whose micro-batches of a step are all empty.
    """
    targets = (*ATTENTION, *EXPERTS, HEAD)
    adapter = write_adapter(tmp_path / "adapter", flags["model"], rank=3, alpha=5, targets=targets)
    weights = Path(adapter, "adapter_model.safetensors")
    tensors = load_file(weights)
    kept = {name: tensor for name, tensor in tensors.items() if not re.search(left_out, name)}
    save_file(kept, weights)
    argv = arguments(**flags, **more, adapter=adapter, **layout_flags(**layout))
    num_replicas = world_size // prod(layout.get(size, 1) for size in ("tp", "pp", "cp"))
    rows = [
        row
        for replica in range(num_replicas)
        for row in make_rows(sum(sizes_of(replica, idle)), seed=replica)
    ]
    means, expected = reference_gradients(flags["model"], adapter, rows)
    compared = set()
    for found, *_ in run_ranks(both_ways, world_size, argv, idle):
        for gradients in (found["whole"][1], found["cut"][1]):
            check_gradients(gradients, expected, means["grad_norm"])
            compared |= {name for name, *_ in gradients}
        assert not any(gradient.any() for *_, gradient in found["nothing"][1])
    assert compared == expected.keys()


def test_what_is_worth_a_bucket():
    """The sizes that the docs name: one bucket for the guide's LoRA, four for rank 64 at EP 8."""
    mib = 2**20
    sizes = [smallest_bucket(ranks) for ranks in (2, 8, 128, 1024)]
    assert sizes == [64 * mib, 64 * mib, 64 * mib, 512 * mib]


def train_with(size, rank, world_size, argument_lists):
    from megatron_gkd import gradients
    from tests.train_runs import _train

    gradients.SMALLEST_BUCKET, gradients.BYTES_OF_A_RANK = size, 0
    made = []
    build = gradients.GradientReducer.__init__

    def keep(self, *arguments):
        build(self, *arguments)
        made.append(self)

    gradients.GradientReducer.__init__ = keep
    _train(rank, world_size, argument_lists)
    return [[bucket.starts_early for bucket in ddp.buckets] for ddp in made]


def check_runs(runs: dict[str, list[str]], tmp_path, world_size=2):
    """Each run with many buckets logs and saves, to the last bit, what it does with one for each
    kind of parameters.
    """
    kept = {}
    for name, size in (("whole", 2**40), ("cut", SMALL_BUCKET)):
        for of_rank in run_ranks(partial(train_with, size), world_size, list(runs.values())):
            for run, early in zip(runs, of_rank, strict=True):
                of_towers = [False] * (run == "towers")  # in front of the decoder: at the end
                assert early == [name == "cut"] * (len(early) - len(of_towers)) + of_towers
        kept[name] = tmp_path / name
        kept[name].mkdir()
        for run in runs:
            shutil.move(tmp_path / run, kept[name] / run)
    for run in runs:
        whole, cut = (kept[name] / run for name in ("whole", "cut"))
        for file in ("metrics.jsonl", "eval.jsonl"):
            assert stable(read_lines(cut / file)) == stable(read_lines(whole / file))
        norms = [line["grad_norm"] for line in read_lines(cut / "metrics.jsonl")]
        assert any(norms) and (None in norms) == (run == "empty")
        (weights,) = cut.glob("checkpoint-*/adapter_model.safetensors")
        saved, expected = load_file(weights), load_file(whole / weights.relative_to(cut))
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], expected[name]) for name in saved)


def test_runs_are_the_same_to_the_last_bit(flags, tiny_folder, tmp_path):
    """At DP 2: float16 with its loss scale, dropout, rollouts, --recompute auto, evaluation, steps
    without a token; and LoRA on towers, of which some steps and ranks have no media, and on the
    lm_head, whose gradients lie on the other side of theirs.
    """
    more = dict(max_steps=3, learning_rate=1e-3, per_device_train_batch_size=4, lora_dropout=0.1)
    more |= dict(lmbda="0:0,2:1", max_completion_length=4, recompute="auto", eval_steps=3)
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(16))
    text = dict(model=flags["model"], dataset=rows, val_dataset=rows, lora_rank=4) | more
    split = dict(gradient_accumulation_steps=2, max_tokens_per_micro_batch=60)
    media_model = tiny_folder(**SMALL | dict(num_hidden_layers=4, vocab_size=1024))
    (tmp_path / "media").mkdir()
    media_rows, _ = write_media_rows(tmp_path / "media", media_model)
    media = dict(model=media_model, dataset=media_rows, val_dataset=media_rows, lora_rank=4)
    media |= more | dict(lora_towers="true", per_device_train_batch_size=1, max_steps=4)
    media |= dict(lora_target_modules=",".join([*ATTENTION, *EXPERTS, HEAD]))
    runs = {
        "half": text | split | dict(torch_dtype="float16"),
        "empty": text | dict(skip_first_tokens=6, per_device_train_batch_size=1, lmbda=0),
        "towers": media,
    }
    check_runs(
        {name: arguments(output_dir=tmp_path / name, **run) for name, run in runs.items()}, tmp_path
    )


def gradients_in_any_order(rank, world_size, argv, towers):
    """Steps in which the backward is a loop over the parameters, so that each gets what it gets
    when the test says so: in the model's order, then with some left out and in another order on
    each rank, then all again. Wrong sums; of each step the reductions in their order; how many had
    begun after each gradient of the first step, and how many could have.
    """
    # of a size at which buckets do not end in the order in which they start
    sizes = dict(audio=towers, visual=towers, bucket_bytes=SMALL_BUCKET // 2)
    ddp = build_parts(argv, **sizes).ddp
    trained = [parameter for parameter in ddp.parameters() if parameter.requires_grad][::-1]
    number = {parameter: place for place, parameter in enumerate(trained)}

    def order_on(rank, step):
        if step == 0:
            return trained
        drawn = Random(10 * step + rank)
        kept = [parameter for parameter in trained if step % 2 == 0 or drawn.random() < 0.6]
        return drawn.sample(kept, len(kept))

    def value(rank, parameter):
        return (rank + 1) * (number[parameter] + 1)  # whose sums are exact

    wrong, reductions, begun = [], [], []
    early = [bucket for bucket in ddp.buckets if bucket.starts_early]
    ends = sorted(max(map(number.get, bucket.parameters)) for bucket in early)
    for step in range(5):
        ddp.zero_grad_buffer()
        with Collectives() as seen:
            for parameter in order_on(rank, step):
                (parameter * value(rank, parameter)).sum().backward()
                if step == 0:
                    place = number[parameter]
                    begun.append((len(seen.of()), sum(end <= place for end in ends)))
            ddp.finish_grad_sync()
        reductions.append(seen.of())
        orders = [set(order_on(other, step)) for other in range(world_size)]
        for parameter in trained:
            expected = sum(value(r, parameter) for r, has in enumerate(orders) if parameter in has)
            if not (parameter.main_grad == expected).all():
                wrong.append((step, number[parameter]))
    for parameter in trained:
        parameter.sum().backward()
    with pytest.raises(RuntimeError, match="a LoRA parameter got a second gradient"):
        next(iter(early[0].parameters)).sum().backward()
    return wrong, reductions, begun


@pytest.mark.parametrize("towers", [False, True])
def test_whatever_order_gradients_come_in(flags, towers):
    """All ranks reduce in one order, each bucket as soon as it and those before it are complete,
    also with LoRA on towers and lm_head; a gradient that comes too late for its sum is refused.
    """
    argv = arguments(**flags, lora_rank=3)
    if towers:
        targets = ",".join([*ATTENTION, *EXPERTS, HEAD])
        argv = arguments(**flags, lora_rank=3, lora_towers=True, lora_target_modules=targets)
    of_ranks = run_ranks(gradients_in_any_order, 2, argv, towers)
    for wrong, reductions, begun in of_ranks:
        assert wrong == []
        assert reductions == of_ranks[0][1] and all(each == reductions[0] for each in reductions)
        assert len(reductions[0]) > 4
        assert all(number == expected for number, expected in begun)


def cut_into(rank, world_size, argv, shares):
    """For each smallest bucket, a share of the buffer's bytes: whether each bucket starts early."""
    model = build_parts(argv).model
    (whole,) = GradientReducer(model, lambda num_ranks: 2**40).buckets
    cuts = [
        GradientReducer(model, lambda _, n=share * whole.gradients.nbytes: n) for share in shares
    ]
    return [[bucket.starts_early for bucket in ddp.buckets] for ddp in cuts]


def test_what_is_cut(flags):
    """A buffer of two buckets or more; a smaller one is reduced at once, after the backward."""
    argv = arguments(**flags, lora_rank=3, lora_target_modules=",".join(ATTENTION))
    for cuts in run_ranks(cut_into, 2, argv, [0.9, 0.52, 0.48, 0.24]):
        assert cuts == [[False], [False], [True] * 2, [True] * 4]
