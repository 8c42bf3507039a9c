"""The memory that a run needs by its sizes and flags, against what an H100 showed, and what is
refused before weights are read.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.real_decoder import REAL_SHAPE
from megatron_gkd.config import parse_config
from megatron_gkd.layout import ParallelConfig
from megatron_gkd.lora.grouped import LoraGrouped
from megatron_gkd.lora.slots import lora_modules
from megatron_gkd.lora_targets import LINEARS
from megatron_gkd.loss import torch_kernels
from megatron_gkd.loss.linear import WEIGHT_BLOCK_ROWS, _chunk_rows
from megatron_gkd.model.args import read_model_args
from megatron_gkd.plan import passes
from megatron_gkd.plan.memory import (
    COMMUNICATOR_BYTES,
    CONTEXT_BYTES,
    GIB,
    Estimate,
    check_memory,
    estimate,
    kept_layers_that_fit,
    num_communicators,
    standing_parts,
)
from megatron_gkd.plan.parameters import (
    base_parameters,
    expert_column_parameters,
    laid_out_parameters,
    lora_parameters,
)
from megatron_gkd.plan.rollout_memory import rollout_parts
from megatron_gkd.plan.towers import read_towers
from megatron_gkd.plan.training_memory import moments, training_parts
from megatron_gkd.plan.workload import workload
from tests.plans import GUIDE_STEP, REAL
from tests.ranks import run_ranks
from tests.test_forward import micro_batches, pass_through
from tests.train_runs import SMALL, arguments, build_parts, layout_flags, make_rows, write_rows

ONE = ParallelConfig()
CARD = round(78.6 * GIB)  # free on an H100 of 80 GB once CUDA is there


@pytest.mark.parametrize(
    "layers, built, with_optimizer, peaks",
    [(48, 60.0, 66.5, (69.2, 70.3)), (8, 11.0, 12.1, (14.8,))],
)
def test_a_step_is_what_a_gpu_showed(layers, built, with_optimizer, peaks):
    """Of an earlier commit, whose dispatcher held the input of each layer's experts and its
    gradient until the next forward, and whose products had no columns for LoRA: docs/memory.md.
    """
    args = replace(REAL_SHAPE, num_layers=layers).model_args()
    held = layers * 2 * GUIDE_STEP.micro_batch_tokens * args.hidden_size * 2
    found = estimate(args, ONE, GUIDE_STEP)
    base, lora = base_parameters(args, ONE) * 2, lora_parameters(args, ONE, GUIDE_STEP)
    columns = found.always["LoRA inside the experts' products"]
    assert (base + 8 * lora) / GIB == pytest.approx(built, rel=0.01)
    assert (base + 16 * lora + held) / GIB == pytest.approx(with_optimizer, rel=0.01)
    for peak in peaks:
        assert (found.allocated - columns + held) / GIB == pytest.approx(peak, rel=0.1)


def test_the_loss_counts_with_its_own_sizes():
    """passes.py repeats them: it imports no torch."""
    for rows, columns, own, device in (
        (2048, 152064, True, "cuda"),
        (700, 2003, False, "cpu"),
        (100, 152064, False, "cuda"),
    ):
        expected = _chunk_rows(rows, columns, torch.device(device), has_own_gradient=own)
        assert passes.chunk_rows(rows, columns, 10 if own else 8, device) == expected
    assert passes.BLOCK_ENTRIES == torch_kernels.BLOCK_ENTRIES["cpu"]
    assert passes.WEIGHT_BLOCK_ROWS == WEIGHT_BLOCK_ROWS


def _bytes_of_ranks(rank, world_size, argv):
    """Numbers of this rank and its estimates: base, LoRA, LoRA laid out for decoding, and as the
    experts' products read it.
    """
    from megatron_gkd.rollout.weights import StageWeights

    parts, config = build_parts(argv), parse_config(argv)
    parallel, model, args = parts.parallel, parts.model, parts.model_args
    layout, lora = config.parallel, [p for p in model.parameters() if p.requires_grad]
    batches = micro_batches(parts, parallel, (8,))
    load = workload(config, args, micro_batch_tokens=batches[0].student.size)
    pass_through(parts, parallel, batches)
    laid_out = [
        matrix
        for layer in StageWeights(model, args, parallel).layers
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)
        for matrix in linear[1:]
    ]
    products = [
        layout.down[:, :, 0].numel() * (layout.down.shape[2] + module.base.weight.shape[1])
        for module in lora_modules(model)
        if isinstance(module, LoraGrouped)
        for layout in module._layouts.values()
    ]
    found = (
        sum(p.numel() for p in model.parameters() if not p.requires_grad),
        sum(p.numel() for p in lora),
        sum(matrix.numel() for matrix in laid_out),
        sum(products),
    )
    estimates = (
        base_parameters(args, layout),
        lora_parameters(args, layout, load),
        laid_out_parameters(args, layout, load),
        expert_column_parameters(args, layout, load),
    )
    return found, estimates


@pytest.mark.parametrize(
    "world_size, tp, pp, ep, cp",
    [
        pytest.param(2, 2, 1, 2, 1, id="TP2 EP2"),
        pytest.param(1, 1, 1, 1, 1, id="1 rank", marks=pytest.mark.extended),
        pytest.param(2, 1, 2, 1, 1, id="PP2", marks=pytest.mark.extended),
        pytest.param(4, 2, 1, 4, 2, id="TP2 CP2 EP4", marks=pytest.mark.extended),
    ],
)
def test_sizes_are_those_of_a_built_model(world_size, tp, pp, ep, cp, tiny_folder, tmp_path):
    """Of the rank that has most."""
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(8))
    flags = dict(model=tiny_folder(**SMALL), dataset=rows, output_dir=tmp_path)
    argv = arguments(**flags, **layout_flags(tp, pp, ep, cp), lora_rank=8)
    ranks = run_ranks(_bytes_of_ranks, world_size, argv)
    for number in range(4):
        most = max(found[number] for found, _ in ranks)
        (estimated,) = {estimates[number] for _, estimates in ranks}
        assert estimated == pytest.approx(most, rel=0.002), number  # the final norm


def refused(load, available=CARD, layout=ONE):
    with pytest.raises(ValueError) as error:
        check_memory(REAL_SHAPE.model_args(), layout, load, available)
    return str(error.value)


def test_an_evaluation_that_writes_takes_the_memory_of_a_rollout(tiny_folder):
    config = parse_config(arguments(model=tiny_folder(**SMALL), dataset="d", lmbda=0))
    args = read_model_args(config.model.model)
    assert workload(config, args).completion_tokens == 0
    assert workload(config, args, writes=True).completion_tokens == 512


def test_what_does_not_fit_is_refused_with_flags_that_make_it_fit():
    """The flags that are named do: alone or together."""
    args, rollouts = REAL_SHAPE.model_args(), dict(completion_tokens=512, prefill_tokens=8192)
    assert check_memory(args, ONE, GUIDE_STEP, CARD).total < CARD
    # 32 rows of a rollout beside the model
    step = replace(GUIDE_STEP, accumulation=8, **rollouts)
    assert check_memory(args, ONE, step, CARD).total > 0.93 * CARD

    message = refused(replace(GUIDE_STEP, recompute=False))
    assert "78.6 GiB" in message and "--recompute auto needs less" in message
    assert "base 56.9" in message and "LoRA, gradients, AdamW 6.3" in message

    step = replace(step, accumulation=32)
    message = refused(step)
    assert "--gradient_accumulation_steps 8 needs less" in message
    assert "keys and values" in message
    assert check_memory(args, ONE, replace(step, accumulation=8), CARD)

    step = replace(GUIDE_STEP, micro_batch_tokens=65536, recompute=False)
    message = refused(step)
    assert "--recompute auto --max_tokens_per_micro_batch 32768 needs less" in message
    assert check_memory(args, ONE, replace(step, recompute=True, micro_batch_tokens=32768), CARD)

    message = refused(GUIDE_STEP, available=CARD // 2)
    assert "left. --expert_model_parallel_size 2 on 2 or more ranks" in message
    assert "left. use more ranks" in refused(GUIDE_STEP, available=GIB)
    assert estimate(args, ParallelConfig(8, 1, 8, 1), GUIDE_STEP).total < 12 * GIB


def test_a_row_is_never_cut(tiny_folder):
    """A micro-batch has room for a row, whatever the flag; and no smaller one is proposed."""
    argv = arguments(model=tiny_folder(**SMALL), dataset="d", max_tokens_per_micro_batch=100)
    config = parse_config([*argv, "--max_length", "2048"])
    load = workload(config, read_model_args(config.model.model))
    assert load.micro_batch_tokens == 2048
    step = replace(GUIDE_STEP, micro_batch_tokens=65536, prompt_tokens=32768)
    needs = lambda tokens: (
        estimate(
            REAL_SHAPE.model_args(),
            ONE,
            replace(step, micro_batch_tokens=tokens),
            whole_card=False,
        ).total
    )
    assert "--max_tokens_per_micro_batch 32768 needs less" in refused(step, needs(32768))
    assert "use more ranks" in refused(step, needs(32768) - 1)


def test_layers_keep_activations_as_far_as_they_fit():
    """As many more as another layer's activations go into the memory that is added."""
    args = REAL_SHAPE.model_args()
    fits = lambda size: kept_layers_that_fit(args, ONE, GUIDE_STEP, size, whole_card=False)
    total = lambda number: (
        estimate(args, ONE, GUIDE_STEP, kept_layers=number, whole_card=False).total
    )
    assert fits(total(0) - 1) is None and fits(total(0)) == 0 and fits(2**60) == 48
    assert fits(total(20)) == 20 and fits(total(21) - 1) == 20
    unlimited = replace(GUIDE_STEP, recompute=False)
    assert total(48) == estimate(args, ONE, unlimited, whole_card=False).total


def test_what_lies_outside_of_torch_counts_for_a_whole_card():
    """A group of ranks for each kind of parallelism, where it has several."""
    args, layout = REAL_SHAPE.model_args(), ParallelConfig(8, 1, 8, 1)
    assert num_communicators(ONE, 1) == 0 and num_communicators(ONE, 4) == 3
    assert num_communicators(layout) == 3 and num_communicators(layout, 64) == 5
    whole, left = (estimate(args, layout, GUIDE_STEP, whole_card=whole) for whole in (True, False))
    assert whole.total - left.total == CONTEXT_BYTES
    assert left.outside == {"CUDA context": 0, "communicators": 3 * COMMUNICATOR_BYTES}
    assert whole.allocated == left.allocated


def test_a_run_refuses_what_the_planner_does():
    """To the byte: communicators are not there yet when a run checks, the CUDA context is."""
    args, layout, ranks = REAL_SHAPE.model_args(), ParallelConfig(2, 1, 8, 1), 64
    needed = estimate(args, layout, GUIDE_STEP, world_size=ranks).total
    left = needed - CONTEXT_BYTES
    assert check_memory(args, layout, GUIDE_STEP, left, world_size=ranks)
    with pytest.raises(ValueError, match="communicators 1.2"):
        check_memory(args, layout, GUIDE_STEP, left - 1, world_size=ranks)


def test_layers_with_lora_count_alone():
    """Of the stage that has most of them."""
    args = REAL_SHAPE.model_args()
    lora = lambda *targets: replace(GUIDE_STEP, targets=targets)
    parts = (lora_parameters, expert_column_parameters, laid_out_parameters)
    layers = [f"{layer}.{name}" for layer in range(12) for name in LINEARS]
    for part in parts:
        assert part(args, ONE, lora(*layers)) * 4 == part(args, ONE, GUIDE_STEP)
        in_stages = ParallelConfig(1, 4, 1, 1)
        assert part(args, in_stages, lora(*layers)) == part(args, in_stages, GUIDE_STEP)
    assert expert_column_parameters(args, ONE, lora("q_proj", "3.o_proj")) == 0
    assert laid_out_parameters(args, ONE, lora("router")) == 0


def test_towers_count_and_a_refusal_names_the_card(tmp_path, monkeypatch):
    from megatron_gkd import build

    said = []
    monkeypatch.setattr(build, "log_rank_0", lambda parallel, text: said.append(text))

    def check(available, *, audio=False, visual=False, **flags):
        argv = arguments(model=REAL, dataset="rows.jsonl", output_dir=tmp_path, **flags)
        data = dict(micro_batch_tokens=4096, media_tokens=4000, prompt_tokens=100, writes=True)
        config, ranks = parse_config(argv), SimpleNamespace(world_size=1)
        args, kinds = read_model_args(REAL), dict(audio=audio, visual=visual)
        build.check_fits(config, args, ranks, available, **data, **kinds)
        return said[-1]

    bf16 = dict(torch_dtype="bfloat16")
    assert "towers" not in check(2**40, **bf16)
    assert "towers 1.2" in check(2**40, audio=True, **bf16)
    both = dict(audio=True, visual=True, lora_towers="true", **bf16)
    with pytest.raises(
        ValueError, match="towers 2.2, .* in training .*, towers' activations 17.3"
    ) as error:
        check(70 * GIB, **both, recompute="full")
    assert "more than the 70.0 GiB" in str(error.value)


def test_lora_on_towers_counts_on_the_first_stage():
    """With gradient and moments, 16 bytes a number; and the towers' weights there alone."""
    args, layout = REAL_SHAPE.model_args(), ParallelConfig(pipeline_model_parallel_size=4)
    towers = read_towers(REAL, True, True)
    text = replace(GUIDE_STEP, accumulation=8)
    media = replace(text, towers=towers, media_share=0.5)
    with_lora = replace(media, lora_towers=True)
    lora, weights = "LoRA, gradients, AdamW", 2 * sum(tower.numbers for tower in towers)
    stands = lambda load, stage: standing_parts(args, layout, load, stage)
    assert stands(media, 0) == stands(text, 0) | {"towers": weights}
    numbers = sum(tower.lora_numbers for tower in towers)
    added = stands(with_lora, 0)[lora] - stands(media, 0)[lora]
    assert added == 8 * numbers * 16
    averaged = stands(replace(with_lora, has_teacher_adapter=True), 0)[lora]
    assert averaged == stands(with_lora, 0)[lora] // 16 * 20
    for load in (media, with_lora):
        for stage in (1, 2, 3):
            assert stands(load, stage) == stands(text, stage)
            parts = lambda load: moments(args, layout, load, stage)
            assert parts(load) == parts(text)


def test_the_stage_that_needs_most_counts():
    """Its own parts, not the most of any each; stages that are left out never need more."""
    args, layout = REAL_SHAPE.model_args(), ParallelConfig(1, 8, 1, 1)
    on = lambda *layers: [f"{layer}.{name}" for layer in layers for name in LINEARS]
    step = replace(GUIDE_STEP, accumulation=8, completion_tokens=512)
    needed = []
    for load in (
        step,
        replace(step, targets=[*on(*range(13, 18)), "40.q_proj"], micro_batch_tokens=2048),
        replace(step, targets=[*on(23), "lm_head"], recompute=False),
        replace(step, targets=on(*range(6, 12), *range(30, 48)), completion_tokens=0),
        replace(step, targets=[*on(20), "9.q_proj"], has_teacher_adapter=True),
        replace(step, targets=[*on(40, 47), "lm_head"], micro_batch_tokens=2048),
    ):
        parts = standing_parts, training_parts, rollout_parts
        of_stages = [
            Estimate(*(of(args, layout, load, stage) for of in parts)).allocated
            for stage in range(8)
        ]
        found = estimate(args, layout, load)
        assert found.allocated == max(of_stages)
        needed.append((of_stages.index(max(of_stages)), found.always))
    assert [stage for stage, _ in needed] == [0, 2, 0, 1, 0, 7]
    even, in_the_middle = needed[0][1], needed[1][1]
    vocabulary = args.padded_vocab_size(1) * args.hidden_size * 2
    assert in_the_middle["base"] == even["base"] - vocabulary
    lora = "LoRA, gradients, AdamW"
    assert in_the_middle[lora] * 6 == pytest.approx(even[lora] * 5, rel=1e-3)
