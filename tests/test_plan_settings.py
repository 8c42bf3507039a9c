"""What of a command line the planner plans with: lengths of rows, LoRA of an adapter."""

import json
from pathlib import Path

import pytest

from megatron_gkd.lora_targets import ATTENTION, LINEARS
from megatron_gkd.model.args import read_model_args
from megatron_gkd.plan.layouts import make_plan
from megatron_gkd.plan.settings import parse_plan, workload_of
from tests.adapters import random_adapter, write_adapter
from tests.plans import REAL, job_of
from tests.train_runs import SMALL


def load_of(model: str, *flags: str):
    own, config, _ = parse_plan(["--model", model, *flags])
    return workload_of(own, config, read_model_args(model))


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    """(a small model, an adapter of rank 6 on attention alone)."""
    model = tiny_folder(**SMALL)
    tensors = random_adapter(read_model_args(model), 6, ATTENTION)
    folder = tmp_path_factory.mktemp("adapter")
    return model, write_adapter(folder, tensors, rank=6, alpha=12, targets=ATTENTION)


@pytest.mark.parametrize("check", [[], ["--check"]])
@pytest.mark.parametrize(
    "flags, rank, targets",
    [
        ("", 6, ATTENTION),
        ("--lora_rank 16", 16, ATTENTION),
        ("--lora_target_modules ALL", 6, LINEARS),
        ("--lora_layers 1", 6, [f"1.{name}" for name in ATTENTION]),
    ],
)
def test_the_lora_is_the_adapters(check, flags, rank, targets, adapter):
    """Where the flags leave it to that, as in a run."""
    model, folder = adapter
    load = load_of(model, "--gpus", "1", *check, "--adapter", folder, *flags.split())
    assert (load.lora_rank, set(load.targets)) == (rank, set(targets))


def test_without_a_folder_rank_and_linears_must_be_named():
    flags = ["--gpus", "1", "--adapter", "/no/such", "--lora_rank", "4"]
    with pytest.raises(ValueError, match="name --lora_rank and --lora_target_modules"):
        load_of(REAL, *flags)
    assert load_of(REAL, *flags, "--lora_target_modules", "q_proj").lora_rank == 4


@pytest.mark.parametrize(
    "flags, row, response, longest",
    [
        ("", 2048, 512, 2048),
        ("--row_tokens 700 --response_tokens 300", 700, 300, 2048),
        ("--teacher_row_tokens 2300", 2048, 512, 2300),
        ("--response_tokens 100", 2048, 100, 2460),
        ("--response_tokens 100 --lmbda 0", 2048, 100, 2048),
        ("--max_completion_length 4096", 6144, 4096, 6144),
        ("--max_completion_length 4096 --lmbda 0", 2048, 2047, 2048),
        ("--max_completion_length 4096 --row_tokens 4200", 4200, 4096, 4200),
    ],
)
def test_no_micro_batch_is_smaller_than_a_row(flags, row, response, longest):
    """As long as a run makes room for: an average prompt with the longest response behind it."""
    job = job_of("--gpus", "8", "--pipeline_model_parallel_size", "1", *flags.split())
    assert (job.load.row_tokens, job.load.response_tokens) == (row, response)
    assert job.longest_row == longest
    plan = make_plan(job)
    tokens = {choice.micro_batch_tokens for choice in plan.choices + plan.too_large}
    assert min(tokens) == longest and all(number % longest == 0 for number in tokens)
    for choice in plan.choices:
        assert choice.batch_size * longest <= choice.micro_batch_tokens


def test_a_check_knows_that_a_written_row_is_no_shorter_than_its_response():
    flags = ["--gpus", "8", "--check", "--max_tokens_per_micro_batch", "1"]
    load = load_of(REAL, *flags, "--max_completion_length", "4096")
    assert load.micro_batch_tokens == 4097
    assert load_of(REAL, *flags, "--max_completion_length", "512").micro_batch_tokens == 2048


def with_towers(folder, **sections) -> str:
    """A config.json of the real sizes with other sections of towers."""
    config = json.loads((Path(REAL) / "config.json").read_text())
    config["thinker_config"] |= sections
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


MEDIA = ["--gpus", "8", "--media", "audio", "image"]


@pytest.mark.parametrize(
    "sections, says",
    [
        ({"audio_config": [1]}, "audio_config is a list, expected an object"),
        ({"vision_config": "large"}, "vision_config is a str, expected an object"),
        (
            {"vision_config": {"deepstack_visual_indexes": 5}},
            "vision_config.deepstack_visual_indexes is 5, and must be a list",
        ),
    ],
)
def test_sections_of_towers_that_are_none(sections, says, tmp_path):
    with pytest.raises(ValueError, match=f"config.json: {says}"):
        load_of(with_towers(tmp_path, **sections), *MEDIA)


def test_a_section_that_is_null_means_the_sizes_of_transformers(tmp_path):
    null = with_towers(tmp_path, audio_config=None, vision_config={})
    absent = load_of(null, *MEDIA)
    assert absent == load_of(with_towers(tmp_path, audio_config={}, vision_config=None), *MEDIA)
    assert absent != load_of(null, "--gpus", "8")


@pytest.mark.parametrize(
    "flags, share",
    [
        ("--lmbda 0:0.3,500:0.5,1000:0.7", 0.7),
        ("--lmbda 0:0.3,500:0.5,1000:0.7 --max_steps 1000", 0.4),
        ("--lmbda 0", 0.0),
        ("--lmbda 0 --seq_kd true", 1.0),
    ],
)
def test_the_share_of_steps_that_write(flags, share):
    """Of a schedule without a known end, what it ends with."""
    load = load_of(REAL, "--gpus", "8", *flags.split())
    assert load.on_policy_share == pytest.approx(share)
    assert bool(load.completion_tokens) == (share > 0)
