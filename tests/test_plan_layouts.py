"""The layouts that the planner enumerates: possible where a run is, refused with its reasons; the
same samples in a step at each of them.
"""

import re

import pytest

from benchmarks.real_decoder import REAL_SHAPE
from megatron_gkd.model.args import read_model_args
from megatron_gkd.plan.layouts import (
    Sizes,
    choice_of,
    config_of,
    cut,
    data_parallel_size,
    grid,
    load_of,
    make_plan,
)
from megatron_gkd.plan.memory import estimate
from megatron_gkd.plan.reasons import grouped
from megatron_gkd.plan.settings import parse_plan
from megatron_gkd.plan.step_time import step_time
from megatron_gkd.plan.workload import workload
from tests.plans import REAL, job_of
from tests.ranks import run_ranks
from tests.train_runs import SMALL, arguments, layout_flags


def planned(job) -> dict[Sizes, str]:
    """Layout -> the reason that it is impossible, empty where it divides."""
    found = {}
    for sizes in grid(job):
        try:
            data_parallel_size(job, sizes)
            found[sizes] = ""
        except ValueError as error:
            found[sizes] = str(error)
    return found


def _built(rank, world_size, argument_lists):
    """What a run's start makes of each list of flags: an error's text, or nothing where the
    model stands with its LoRA and its optimizer.
    """
    import torch.distributed as dist

    from megatron_gkd.config import layout_line, parse_config
    from megatron_gkd.model.args import read_model_args
    from tests.train_runs import build_parts

    found = []
    for argv in argument_lists:
        try:
            config = parse_config(argv)
            layout_line(config, world_size, read_model_args(config.model.model))
            build_parts(argv, again=dist.is_initialized() and bool(found))
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize(
    "world_size", [2, pytest.param(4, marks=pytest.mark.extended)], ids=lambda size: f"{size} ranks"
)
@pytest.mark.parametrize("attn_impl", ["flash", "te"])
def test_a_layout_is_possible_where_a_run_builds_it(world_size, attn_impl, tiny_folder, tmp_path):
    """The whole grid of a world, and sizes that divide nothing: what is refused is refused with the
    run's own words, what is not is built.
    """
    model = tiny_folder(**SMALL)
    job = job_of("--model", model, "--gpus", str(world_size), "--attn_impl", attn_impl)
    reasons = planned(job)
    assert len(reasons) == len([n for n in (1, 2, 4) if n <= world_size]) ** 4
    runs = {
        sizes: arguments(
            model=model,
            dataset="d",
            output_dir=tmp_path,
            attn_impl=attn_impl,
            **layout_flags(sizes.tp, sizes.pp, sizes.ep, sizes.cp),
        )
        for sizes in reasons
    }
    if attn_impl == "te":  # is not installed: only what it does not know is compared
        runs = {sizes: argv for sizes, argv in runs.items() if sizes.cp > 1}
    for built in run_ranks(_built, world_size, list(runs.values())):
        assert dict(zip(runs, built)) == {sizes: reasons[sizes] for sizes in runs}
    possible = [sizes for sizes, reason in reasons.items() if not reason]
    assert len(possible) > 4


@pytest.mark.parametrize("gpus", [1, 8, 24, 1024])
def test_all_layouts_of_the_real_sizes(gpus):
    """By brute force over the rules that a layout must keep."""
    job = job_of("--gpus", str(gpus))
    reasons = planned(job)
    for (tp, ep, pp, cp), reason in reasons.items():
        divides = gpus % (tp * pp * cp) == 0 and gpus // pp % ep == 0 and 128 % ep == 0
        divides = divides and 32 % tp == 0 and (tp % 4 == 0 or 4 % tp == 0) and 48 % pp == 0
        divides = divides and cp <= 8  # chunks of 128 tokens
        assert divides == (not reason), (tp, ep, pp, cp, reason)


def test_flags_that_are_given_stay():
    flags = ["--expert_model_parallel_size", "8", "--context_parallel_size", "1"]
    flags += ["--recompute", "full", "--max_tokens_per_micro_batch", "3000"]
    plan = make_plan(job_of("--gpus", "8", *flags))
    found = plan.choices + plan.too_large
    assert len({choice.sizes for choice in found}) > 3
    for choice in found:
        assert (choice.sizes.ep, choice.sizes.cp) == (8, 1)
        assert (choice.recompute, choice.micro_batch_tokens) == ("full", 3000)
        assert (choice.batch_size, choice.accumulation) == (1, 32 // choice.dp)


def test_every_layout_takes_the_same_samples_in_a_step():
    """And memory and time are those of the run that its flags start."""
    flags = ["--pipeline_model_parallel_size", "2", "--context_parallel_size", "1"]
    job = job_of("--gpus", "16", "--global_batch_size", "48", *flags)
    plan = make_plan(job)
    assert {c.batch_size * c.accumulation * c.dp for c in plan.choices + plan.too_large} == {48}
    assert max(choice.micro_batch_tokens for choice in plan.choices) > 8192
    for choice in plan.choices:
        assert choice.batch_size * 2048 <= choice.micro_batch_tokens
        assert choice.memory.total <= job.available and choice.time.seconds > 0
    for choice in plan.choices[:: len(plan.choices) // 20]:
        config = config_of(job, choice)
        load = workload(config, job.args)
        assert choice.memory == estimate(job.args, config.parallel, load, world_size=16)
        assert choice.time == step_time(job.args, config.parallel, load, 16, job.rates)


def test_samples_that_cannot_be_shared_are_a_reason():
    job = job_of("--gpus", "8", "--global_batch_size", "6")
    reasons = {reason for sizes, reason in planned(job).items() if reason and sizes.pp < 3}
    assert (
        "the 6 samples of a step (--global_batch_size) cannot be shared by 8 data-parallel ranks"
        in reasons
    )


@pytest.mark.parametrize(
    "flags, samples",
    [
        ("", 64),
        ("--per_device_train_batch_size 2 --gradient_accumulation_steps 3", 96),
        ("--tensor_model_parallel_size 4 --gradient_accumulation_steps 8", 128),
        ("--context_parallel_size 2 --pipeline_model_parallel_size 2", 16),
        ("--global_batch_size 40 --gradient_accumulation_steps 8", 40),
    ],
)
def test_samples_of_a_step(flags, samples):
    """Those that the given flags make with a model copy on as many ranks as they say."""
    assert job_of("--gpus", "16", *flags.split()).samples == (samples)


@pytest.mark.parametrize("samples", [1, 7, 12, 32])
@pytest.mark.parametrize("tokens", [1000, 2048, 6144, 8192, 2**20])
def test_a_rank_cuts_its_samples_whole(samples, tokens):
    batch, accumulation = cut(samples, tokens, 2048)
    assert batch * accumulation == samples and batch <= max(tokens // 2048, 1)
    larger = [n for n in range(batch + 1, samples + 1) if samples % n == 0]
    assert all(size > tokens // 2048 for size in larger)


def tokens_of(*flags: str) -> tuple[set[int], set[int]]:
    """Micro-batches of one layout that fit, and that do not."""
    sizes = ["--expert_model_parallel_size", "8", "--pipeline_model_parallel_size", "1"]
    plan = make_plan(job_of("--gpus", "8", *sizes, "--context_parallel_size", "1", *flags))
    assert len({choice.sizes for choice in plan.choices}) == 1
    of = lambda choices: {choice.micro_batch_tokens for choice in choices}
    return of(plan.choices), of(plan.too_large)


def test_the_micro_batches_that_are_tried():
    """Up to all rows of a rank, those that are written too; smaller ones than a quarter of a row
    for each rank that shares it only where that does not fit; none behind one that does not.
    """
    alone = ["--tensor_model_parallel_size", "1", "--gpu_memory", "1000"]
    assert tokens_of(*alone) == ({2048, 4096, 8192}, set())
    several = ["--num_generations", "2", "--per_device_train_batch_size", "3"]
    assert max(tokens_of(*alone, *several)[0]) == 8 * 2048
    shared = ["--tensor_model_parallel_size", "8", "--lmbda", "0", "--max_length", "32768"]
    shared += ["--per_device_train_batch_size", "16", "--gpu_memory"]
    assert tokens_of(*shared, "16") == ({65536}, {65536, 131072})  # with recomputation alone
    assert tokens_of(*shared, "13") == ({32768}, {32768, 65536})


def test_a_context_parallel_size_that_is_given_may_cut_small():
    flags = ["--gpus", "8", "--pipeline_model_parallel_size", "1", "--max_length", "1000"]
    assert max(sizes.cp for sizes, reason in planned(job_of(*flags)).items() if not reason) == 2
    given = planned(job_of(*flags, "--context_parallel_size", "8"))
    assert "" in given.values()


def test_reasons_are_counted_by_kind():
    """And what does not fit says how much it needs."""
    job = job_of("--gpus", "8", "--gpu_memory", "40", "--context_parallel_size", "1")
    plan = make_plan(job)
    groups = grouped(plan.refusals)
    sizes = [len(members) for _, members in groups]
    assert sum(sizes) == len(plan.refusals) and sizes == sorted(sizes, reverse=True)
    assert len(plan.refusals) + len(plan.layouts) == 4**3
    kinds = [re.sub(r"\d+", "N", smallest.reason)[:30] for smallest, _ in groups]
    assert len(kinds) == len(set(kinds)) == 3
    for smallest, members in groups:
        assert smallest in members
        assert sum(smallest.sizes) == min(sum(refusal.sizes) for refusal in members)
    (memory,) = (members for smallest, members in groups if "GiB or more" in smallest.reason)
    for refusal in memory:
        assert refusal.nearest.memory.total > 40 * 2**30
        smallest = choice_of(job, refusal.sizes, refusal.nearest.dp, "auto", 2048, {})
        assert smallest.memory.total == refusal.nearest.memory.total
        assert refusal.sizes.ep < 4 and f"{refusal.nearest.memory.total / 2**30:.1f}" in (
            refusal.reason
        )


def test_the_choices_of_a_layout_share_a_rollout():
    """Its time is that of each choice alone."""
    job = job_of("--gpus", "8", "--pipeline_model_parallel_size", "2", "--num_generations", "2")
    plan = make_plan(job)
    of_layout = [choice for choice in plan.choices if choice.sizes == plan.pick.sizes]
    assert len(of_layout) > 3
    for choice in of_layout:
        load = load_of(
            job,
            choice.recompute,
            choice.micro_batch_tokens,
            choice.batch_size,
            choice.accumulation,
        )
        assert choice.time == step_time(job.args, choice.sizes.parallel(), load, 8, job.rates)


def test_a_world_that_is_no_whole_nodes_is_refused():
    with pytest.raises(ValueError, match="--gpus 12 are no whole nodes of 8 GPUs"):
        job_of("--gpus", "12")
    assert job_of("--gpus", "12", "--gpus_per_node", "4").gpus == 12
    assert job_of("--gpus", "2").gpus == 2


def test_the_model_may_be_a_config_json_alone():
    of_file = parse_plan(["--model", f"{REAL}/config.json", "--gpus", "1"])[1]
    assert of_file.model.model == REAL
    assert read_model_args(REAL) == REAL_SHAPE.model_args()
