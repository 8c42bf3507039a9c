"""The planner's bytes of a rollout against those of all tensors that are alive in one, on ranks."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.real_decoder import REAL_SHAPE
from megatron_gkd.config import parse_config
from megatron_gkd.layout import ParallelConfig
from megatron_gkd.plan.memory import GIB, estimate
from megatron_gkd.plan.rollout_memory import (
    BUCKETS,
    CAPACITY,
    LEAST_ROOM,
    SORT_BYTES,
    draw_bytes,
    places,
    rollout_moments,
)
from megatron_gkd.plan.workload import workload
from megatron_gkd.rollout import cache, engine
from megatron_gkd.rollout.sampling import top_p_cut_off
from tests.live_bytes import LiveBytes
from tests.plans import GUIDE_STEP
from tests.ranks import run_ranks
from tests.rollouts import make_engine, make_sampling
from tests.test_plan_measured import SIZES, VOCABULARY, flags_of
from tests.train_runs import build_parts

LENGTH, WRITTEN, SAMPLES = 60, 24, 2
REAL_POSITION = 48 * 2 * 4 * 128 * 2  # bytes of a token's keys and values on one rank


def _rollout(rank, world_size, argv, number):
    """(measured, counted) bytes of the prompts' forward in a rollout, and of all of it; weights and
    LoRA included.
    """
    from megatron_gkd.rollout.generate import generate
    from megatron_gkd.rollout.row_batch import RowBatch

    parts, config, memory = build_parts(argv), parse_config(argv), LiveBytes()
    parallel, model, args = parts.parallel, parts.model, parts.model_args
    draw = random.Random(parallel.dp_rank)
    prompts = [
        [draw.randrange(VOCABULARY) for _ in range(LENGTH - row % 3)] for row in range(number)
    ][parallel.cp_rank :: parallel.cp_size]  # as a run shares them
    tensors = [*model.parameters(), *model.buffers()]
    memory.ignore(tensors)
    storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}
    rows = []
    count = lambda module, inputs: rows.append(len(inputs[1].pairs))
    for layer in model.decoder.layers:
        layer.mlp.experts.register_forward_pre_hook(count)
    sampling = make_sampling(temperature=0.9, top_p=0.9, top_k=20, repetition_penalty=1.1)
    settings = dict(sampling=sampling, max_new_tokens=WRITTEN, prefill_tokens=150)
    measured, read_prompts = {}, RowBatch._prefill

    def prefill(*arguments):
        hidden = read_prompts(*arguments)
        measured["prompts"] = memory.peak()
        return hidden

    RowBatch._prefill = prefill
    with memory:
        writer = make_engine(model, args, parallel, **settings)
        for _ in range(2):
            memory.begin()
            generate(writer, prompts, seed=0, row_ids=range(len(prompts)), num_samples=SAMPLES)
    load = replace(
        workload(config, args),
        batch_size=number,
        accumulation=1,
        num_generations=SAMPLES,
        prompt_tokens=LENGTH,
        completion_tokens=WRITTEN,
        prefill_tokens=118,  # two rows of those lengths, of less than 150 tokens
        num_laid_out=1,
    )
    always = estimate(args, config.parallel, load, device="cpu").always
    # neither gradients nor AdamW's moments are there
    always["LoRA, gradients, AdamW"] //= 4
    measured["all"] = memory.peak()
    moments = list(
        rollout_moments(
            args, config.parallel, load, parallel.pp_rank, device="cpu", routed_rows=max(rows)
        )
    )
    sums = [sum(parts.values()) + sum(always.values()) for parts in moments]
    weights = sum(storage.nbytes() for storage in storages.values())
    of_all = {name: weights + found for name, found in measured.items()}
    return of_all, {"prompts": sums[0], "all": max(sums)}


@pytest.mark.parametrize(
    "world_size, layout, number",
    [
        pytest.param(1, (1, 1, 1, 1), 6, id="1 rank"),
        pytest.param(1, (1, 1, 1, 1), 40, id="1 rank, 40 prompts", marks=pytest.mark.extended),
        pytest.param(2, (2, 1, 2, 1), 6, id="TP2 EP2", marks=pytest.mark.extended),
        pytest.param(2, (1, 1, 2, 1), 6, id="DP2 EP2", marks=pytest.mark.extended),
        pytest.param(2, (1, 1, 1, 2), 11, id="CP2", marks=pytest.mark.extended),
    ],
)
def test_a_rollout_holds_what_the_planner_counts(world_size, layout, number, tiny_folder, tmp_path):
    argv = flags_of(tiny_folder(**SIZES), tmp_path, layout, None)
    ranks = run_ranks(_rollout, world_size, argv, number)
    for name in ("prompts", "all"):
        measured, counted = (max(rank[which][name] for rank in ranks) for which in (0, 1))
        assert counted == pytest.approx(measured, rel=0.02), name


def test_places_are_the_engines():
    assert (CAPACITY, BUCKETS) == (cache.CAPACITY, engine.BUCKETS)
    assert LEAST_ROOM == engine.LEAST_ROOM
    for rows in (1, 3, 17, 100, 129, 200, 1000):
        for tp, ep in ((1, 1), (2, 2), (2, 4), (8, 8)):
            layout = ParallelConfig(tp, 1, ep, 1)
            multiple = 1 if tp % ep == 0 else tp
            found = places(layout, replace(GUIDE_STEP, batch_size=rows))
            assert found == engine.bucket(rows, multiple)


def test_context_parallel_ranks_share_a_rollout():
    """Its prompts, with all their samples: of five prompts over two ranks one writes three."""
    load = replace(GUIDE_STEP, batch_size=5, num_generations=4, prompt_tokens=1536)
    load = replace(load, completion_tokens=512, prefill_tokens=1536)
    two, keys = ParallelConfig(context_parallel_size=2), "keys and values"
    alone = replace(load, batch_size=3)
    assert places(two, load) == places(ParallelConfig(), alone) == 16
    shared, own = (
        estimate(REAL_SHAPE.model_args(), layout, of).rollout
        for layout, of in ((two, load), (ParallelConfig(), alone))
    )
    assert shared[keys] == own[keys]


@pytest.mark.parametrize("written", [512, 600, 1030, 2100, 4200, 16384])
def test_room_grows_as_the_cache_does(written):
    """The room before and after, at the last time it grows: those of the cache itself."""
    table = cache.CacheTable.on(torch.device("meta"), torch.bfloat16)
    sizes = dict(num_layers=2, num_prompts=1, num_rows=3, num_groups=1, head_dim=8)
    keys = cache.KeyValueCache(table, **sizes, prompt_width=1, max_new_tokens=written)
    slots, room = torch.arange(3, dtype=torch.int32, device="meta"), [0]
    for number in range(1, written + 1, cache.LOOK):
        keys.reserve(min(number + cache.LOOK, written), slots)
        if keys.response.shape[4] != room[-1]:
            room.append(keys.response.shape[4])
    assert room[-1] == written
    args, load = REAL_SHAPE.model_args(), replace(GUIDE_STEP, prompt_tokens=100)
    load = replace(load, completion_tokens=written, prefill_tokens=100, batch_size=1)
    moments = list(rollout_moments(args, ParallelConfig(), load, 0))
    most = max(parts["keys and values"] for parts in moments)
    of_prompts = REAL_POSITION * load.prompts_of_rank(ParallelConfig()) * 100
    growing = sum(room[-2:])
    assert most - of_prompts == REAL_POSITION * places(ParallelConfig(), load) * growing


@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [2]])
def test_growth_holds_the_room_before_and_of_the_rows_that_stay(slots):
    """The measured peak, but for the copy of a layer."""
    table = cache.CacheTable.on(torch.device("cpu"), torch.float32)
    layers, rows, of_row = 8, 4, 2 * 3 * 16 * 4  # keys and values, groups, head size, bytes
    sizes = dict(num_layers=layers, num_rows=rows, num_groups=3, head_dim=16)
    memory = LiveBytes()
    with memory:
        memory.begin()
        keys = cache.KeyValueCache(
            table, **sizes, num_prompts=1, prompt_width=1, max_new_tokens=600
        )
        keys.reserve(513, torch.tensor(slots, dtype=torch.int32))
    before, after = (layers * n * of_row for n in (rows * 512, len(slots) * 600))
    copied = len(slots) * 512 * of_row
    assert memory.peak() == pytest.approx(before + after + copied, rel=0.01)


def test_sorting_all_scores_is_counted():
    """Where --top_p is alone: what it takes besides the scores."""
    memory, scores = LiveBytes(), torch.randn(4, 20_000)
    with memory:
        memory.begin()
        top_p_cut_off(scores, 0.9, None)
    assert memory.peak() == pytest.approx(SORT_BYTES * scores.numel(), rel=0.1)
    load = replace(GUIDE_STEP, completion_tokens=8)
    args, one = REAL_SHAPE.model_args(), ParallelConfig()
    plain, sorting = (draw_bytes(args, one, replace(load, sorts_scores=on)) for on in (False, True))
    columns = args.padded_vocab_size(1)
    assert plain == 4 * columns * 8 and sorting == plain + 4 * columns * SORT_BYTES
    flags = ["--model", "m", "--dataset", "d", "--top_p", "0.9"]
    for top_k, sorts in (("50", False), ("0", True)):
        assert workload(parse_config([*flags, "--top_k", top_k]), args).sorts_scores is sorts


RECORDS = Path(__file__).parents[1] / "docs" / "benchmarks" / "rollout_h100.jsonl"
WITHOUT_LORA = 20.506  # milliseconds a token of the one measurement of the teacher


def _peaks_of_a_gpu():
    """(rows, positions of a prompt, of a response, whether LoRA is on, GiB) of each."""
    for line in RECORDS.read_text().splitlines():
        record = json.loads(line)
        if "peak_gib" not in record:
            continue
        length, written = 256, 512
        if record["what"].startswith("token"):
            timed = 16 if "without a graph" in record["what"] else 64
            length, written = record["keys"] - timed - 4, timed + 8
        is_student = record.get("ms_a_token") != WITHOUT_LORA
        yield record["rows"], length, written, is_student, record["peak_gib"]


@pytest.mark.parametrize("rows, length, written, is_student, peak", list(_peaks_of_a_gpu()))
def test_a_rollout_is_what_a_gpu_showed(rows, length, written, is_student, peak):
    """The benchmark holds no gradients, and at that commit the experts' products had no columns for
    LoRA; docs/memory.md has the table.
    """
    args, one = REAL_SHAPE.model_args(), ParallelConfig()
    sizes = dict(prompt_tokens=length, completion_tokens=written, prefill_tokens=8192)
    load = replace(GUIDE_STEP, batch_size=rows, **sizes)
    found = estimate(args, one, load)
    held = found.always["base"] + found.always["LoRA, gradients, AdamW"] // 4
    held += found.always["LoRA laid out"] * is_student + found.always["sampler"]
    held += found.always["rollouts' graphs"]
    assert (held + sum(found.rollout.values())) / GIB == pytest.approx(peak, rel=0.05)
