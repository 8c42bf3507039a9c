"""`python -m megatron_gkd.plan`: what it prints and writes, what it refuses, and --check."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import (
    Qwen3OmniMoeThinkerConfig,
)

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.model.args import read_model_args
from megatron_gkd.plan.__main__ import main
from megatron_gkd.plan.layouts import make_plan
from megatron_gkd.plan.memory import estimate
from megatron_gkd.plan.settings import parse_plan, workload_of
from megatron_gkd.plan.table import MOST_COLUMNS
from tests.plans import REAL, job_of

REPOSITORY = Path(__file__).parents[1]


def test_check(tmp_path):
    text = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_hidden_layers": 2,
        "head_dim": 128,
    }
    Qwen3OmniMoeThinkerConfig(text_config=text).save_pretrained(tmp_path)

    def check(*flags):
        command = [
            sys.executable,
            "-m",
            "megatron_gkd.plan",
            "--check",
            "--gpus",
            "4",
            "--model",
            str(tmp_path),
            "--dataset",
            "d",
        ]
        return subprocess.run(command + list(flags), capture_output=True, text=True, cwd=REPOSITORY)

    good = check("--tensor_model_parallel_size", "2", "--expert_model_parallel_size", "4")
    assert good.returncode == 0, good.stderr
    assert (
        "4 ranks = TP 2 x PP 1 x DP 2; EP 4: 2 of 8 experts a rank; 2 of 2 layers a stage; a step "
        "takes 8 samples (4 x 2 data-parallel ranks) in micro-batches of at most 8192 tokens"
        in good.stdout
    )
    assert "Memory: about" in good.stdout and "GiB a rank: base" in good.stdout
    assert "where the run writes them" not in good.stdout
    shared = check("--context_parallel_size", "2", "--max_tokens_per_micro_batch", "3000")
    assert shared.returncode == 0, shared.stderr
    assert "4 ranks = TP 1 x PP 1 x CP 2 x DP 2;" in shared.stdout
    assert "in micro-batches of at most 3000 tokens" in shared.stdout
    bad = check("--tensor_model_parallel_size", "3")
    assert (
        bad.returncode == 2
        and "4 ranks" in bad.stderr
        and "= 3 ranks" in bad.stderr
        and "Traceback" not in bad.stderr
    )


@pytest.mark.parametrize(
    "content, part",
    [
        (None, "no config.json there"),
        ("{", "config.json: not the settings of a model (Expecting"),
        ('{"model_type": "llama"}', "model_type 'llama' is not supported"),
        (
            '{"model_type": "qwen3_omni_moe", "thinker_config": [1]}',
            "thinker_config.text_config is missing",
        ),
        (
            '{"model_type": "qwen3_omni_moe_thinker", "text_config": {"num_key_value_heads": 0}}',
            "num_key_value_heads is 0",
        ),
        (
            '{"model_type": "qwen3_omni_moe_thinker", "text_config": {"num_experts": "many"}}',
            "num_experts",
        ),
        ('{"model_type": "qwen3_moe", "num_hidden_layers": 10000000}', "from 1 to 1,024"),
        ("[" * 100_000, "recursion"),
        ('{"model_type": "qwen3_moe", "num_experts_per_tok": 0}', "num_experts_per_tok is 0"),
        ('{"model_type": "qwen3_moe", "moe_intermediate_size": 0}', "moe_intermediate_size is 0"),
    ],
)
def test_check_of_a_folder_that_is_no_model(tmp_path, monkeypatch, capsys, content, part):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    monkeypatch.setattr(
        "sys.argv", ["plan", "--check", "--gpus", "1", "--model", str(tmp_path), "--dataset", "d"]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and said.startswith("megatron_gkd: error: ")
        and str(tmp_path) in said
        and part in said
    )


def plan(monkeypatch, capsys, *flags) -> str:
    monkeypatch.setattr("sys.argv", ["plan", *flags])
    main()
    return capsys.readouterr().out


def refusal(monkeypatch, capsys, *flags) -> str:
    monkeypatch.setattr("sys.argv", ["plan", *flags])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_plan_can_be_read(monkeypatch, capsys):
    """Short and narrow: the best layout with its parts, ten layouts, reasons."""
    flags = ["--pipeline_model_parallel_size", "1", "--context_parallel_size", "1"]
    said = plan(monkeypatch, capsys, "--model", REAL, "--gpus", "64", *flags)
    lines = said.splitlines()
    assert len(lines) < 75 and max(map(len, lines)) <= MOST_COLUMNS
    assert "64 GPUs of " in lines[0] and "256 samples a step" in said
    number = int(re.search(r"Best of (\d+) possible layouts", said)[1])
    refused = int(re.search(r"Impossible: ([\d,]+) layouts", said)[1].replace(",", ""))
    assert number + refused == 7**2
    assert "  EP inside a node; DP over 8 nodes" in lines
    assert re.search(r"  EP 8: 4 takes .*; 16 over 2 nodes takes \+[\d.]+ s ", said)
    table = lines[lines.index(next(line for line in lines if line.startswith("TP "))) + 1 :][:10]
    sizes = [list(map(int, line.split()[:5])) for line in table]
    assert all(tp * pp * cp * dp == 64 for tp, _, pp, cp, dp in sizes)
    steps = [float(line.split()[-2]) for line in table]
    assert steps == sorted(steps)
    for phase in ("rollout prefill", "rollout decode", "teacher", "student", "optimizer"):
        assert re.search(rf"^ *[\d.]+ +[\d.]+  {phase} ", said, re.MULTILINE), phase


@pytest.mark.parametrize(
    "flags",
    [
        "--gpus 8 --tensor_model_parallel_size 1 --expert_model_parallel_size 8",
        "--gpus 1",
        "--gpus 1 --recompute auto --max_tokens_per_micro_batch 8192",
    ],
)
def test_what_is_faster_than_the_pick_is_named(flags, monkeypatch, capsys):
    """With the reason against it; of a single choice nothing is."""
    words = flags.split()
    said = plan(monkeypatch, capsys, "--model", REAL, *words)
    found = make_plan(job_of(*words))
    fastest, best = found.choices[0], found.pick
    line = re.search(r"^  ([\d.]+) s has TP 1.*, (\d+) tokens: ([\d.]+) GiB, (.*)$", said, re.M)
    if len(found.choices) == 1:
        assert fastest is best and line is None
        return
    assert line is not None and fastest.seconds < best.seconds
    assert line[1] == f"{fastest.seconds:.2f}" and line[2] == str(fastest.micro_batch_tokens)
    assert line[3] == f"{fastest.memory.total / 2**30:.1f}"
    is_tight = fastest.memory.total > 0.95 * found.job.available
    close = "more memory for less than 1% of the time"
    assert line[4] == ("which leaves less than 5%" if is_tight else close)
    assert is_tight or best.seconds <= 1.01 * fastest.seconds


def test_a_plan_of_one_gpu_says_what_auto_keeps(monkeypatch, capsys):
    """And a comparison with other micro-batches names them."""
    said = plan(monkeypatch, capsys, "--model", REAL, "--gpus", "1")
    assert "Best of 1 possible layout (" in said
    assert re.search(r"recompute auto: can keep the activations of [1-4]\d of 48 layers, ", said)
    assert re.search(r", which its time leaves out; none needs \d", said)
    said = plan(monkeypatch, capsys, "--model", REAL, "--gpus", "8", "--gpu_memory", "40")
    assert "  recompute none: auto in micro-batches of 8192 takes +" in said


def test_where_nothing_fits_the_least_is_named(monkeypatch, capsys):
    flags = ["--gpus", "8", "--gpu_memory", "8", "--pipeline_model_parallel_size", "1"]
    said = refusal(monkeypatch, capsys, "--model", REAL, *flags)
    least = r"TP \d .*EP 8, .* need least of all, ([\d.]+) GiB a rank: base .*the GPU has 8\.0\."
    assert 8 < float(re.search(least, said)[1]) < 16


@pytest.mark.parametrize(
    "flags, part",
    [
        ("--gpus 1000000", "--gpus 1000000: must be 65536 or less"),
        ("--gpus 8 --response_tokens 4096", "below the 2048 tokens of a row"),
        ("--gpus 1 --json /no/such/plan.json", "/no/such/plan.json: /no/such is no folder"),
        ("--gpus 8 --row_tokens 2561", "2560 or less, --max_length 2048 with a written response"),
        ("--gpus 8 --lmbda 0 --teacher_row_tokens 2049", "must be 2048 or less, --max_length 2048"),
        ("--gpus 8 --attn_impl eager", "squares of row lengths, which no estimate counts"),
        ("--gpus 8 --adapter /no/such", "--adapter /no/such: no adapter_config.json"),
        ("--gpus 8 --gpu h200", "--gpu h200: no such file, and none of the rates that ship (h100)"),
        ("--gpus 8 --gpu /tmp", "--gpu /tmp: cannot be read: Is a directory"),
        ("--gpus 8 --script /tmp", "/tmp is a folder; name a file in it"),
        ("--gpus 8 --script /tmp/a --json /tmp/a", "must be another file than --script's"),
        ("--gpus 8 --check --all", "--all True: must be left out with --check"),
        ("--gpus 8 --check --script /tmp/a", "--script /tmp/a: must be left out with --check"),
        (
            "--gpus 8 --check --global_batch_size 8",
            "must be left out with --check; it plans nothing",
        ),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(monkeypatch, capsys, flags, part):
    said = refusal(monkeypatch, capsys, "--model", REAL, *flags.split())
    assert part in said and said.count("\n") == 1


def test_the_numbers_of_a_plan(tmp_path, monkeypatch, capsys):
    """--json has all of them, --all prints each choice."""
    file = tmp_path / "plan.json"
    flags = ["--model", REAL, "--gpus", "8", "--gpu_memory", "40", "--context_parallel_size", "1"]
    said = plan(monkeypatch, capsys, *flags, "--json", str(file), "--all")
    numbers = json.loads(file.read_text())
    assert numbers["pick"] in numbers["possible"]
    assert f"{numbers['pick']['time']['seconds']:.2f} s a step, " in said
    for choice in numbers["possible"]:
        memory = choice["memory_bytes"]
        most = max(sum(memory["training"].values()), sum(memory["rollout"].values()))
        allocated = sum(memory["always"].values()) + most + sum(memory["outside"].values())
        assert allocated <= memory["total"] <= 40 * 2**30
        parts = choice["time"]["phases"].values()
        assert all(0 <= phase["seconds"] < 1e4 for phase in parts)
        samples = choice["per_device_train_batch_size"] * choice["gradient_accumulation_steps"]
        assert samples * choice["dp"] == numbers["samples"] == 32
    assert all(choice["time"] is None for choice in numbers["too_large"])
    layouts = {tuple(one[name] for name in ("tp", "ep", "pp", "cp")) for one in numbers["possible"]}
    assert len(layouts) + len(numbers["impossible"]) == 4**3
    every = said.partition("possible choices, the fastest first:\n")[2].splitlines()
    assert len(every) >= len(numbers["possible"]) + len(numbers["impossible"])
    again = [*flags, "--json", str(tmp_path / "new.json"), "--script", str(file)]
    monkeypatch.setattr("sys.argv", ["plan", *again])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr()
    assert f"{file} is there already" in said.err and not said.out  # before anything is planned
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    "flags, part",
    [
        ("--gpus 8 --gpu_memry 80", "--gpu_memry is not a setting; the nearest is --gpu_memory"),
        ("--gpus 8 --lora_rnk 4", "--lora_rnk is not a setting; the nearest is --lora_rank"),
        ("", "required: --gpus"),
        ("--gpus 0", "--gpus 0: must be 1 or more"),
        ("--gpus 12", "--gpus 12 are no whole nodes of 8 GPUs"),
        ("--gpus 8 --gpu v100", "v100"),
        ("--gpus 8 --row_tokens 100 --response_tokens 200", "below the 100 tokens of a row"),
        ("--gpus 8 --gpu_memory 1", "GiB or more, the GPU has 1.0"),
        ("--gpus 8 --tensor_model_parallel_size 3", "= 3 ranks"),
        ("--gpus 8 --max_new_tokens 9", "--max_new_tokens 9 is ms-swift's"),
    ],
)
def test_what_cannot_be_planned_is_said(flags, part, monkeypatch, capsys):
    said = refusal(monkeypatch, capsys, "--model", REAL, *flags.split())
    assert said.startswith("megatron_gkd: error: ") and part in said


def test_settings_may_come_from_a_file_and_a_recipe(tmp_path, monkeypatch, capsys):
    """What they give stays as it is, and --global_batch_size is the planner's."""
    file, numbers = tmp_path / "run.yaml", tmp_path / "plan.json"
    file.write_text("tensor_model_parallel_size: 2\nrecipe: opsd\n")
    flags = ["--model", REAL, "--gpus", "8", "--config", str(file)]
    flags += ["--global_batch_size", "16", "--json", str(numbers)]
    said = plan(monkeypatch, capsys, *flags)
    assert "16 samples a step" in said and "Settings from --recipe opsd" in said
    found = json.loads(numbers.read_text())
    assert {choice["tp"] for choice in found["possible"]} == {2}
    assert found["load"]["lora_rank"] == 64


# --- --check against a GPU ---

SMI = """#!/bin/sh
test "$1" = --query-gpu=name,memory.total || exit 9
printf 'NVIDIA H100 80GB HBM3, 81559\nNVIDIA A100-SXM4-40GB, 40960\n' | head -n %s
"""


@pytest.fixture
def card(tmp_path, monkeypatch):
    """`card(n)`: nvidia-smi lists one card, or two."""

    def put(number: int | str) -> None:
        (tmp_path / "bin").mkdir()
        smi = tmp_path / "bin" / "nvidia-smi"
        smi.write_text(SMI % number)
        smi.chmod(0o755)
        monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")

    return put


ONE_GPU = ["--check", "--gpus", "1", "--max_length", "2048", "--recompute"]


def test_check_compares_with_the_card_that_is_there(card, tmp_path, monkeypatch, capsys):
    card(1)
    model = ["--model", REAL]
    said = plan(monkeypatch, capsys, *model, *ONE_GPU, "auto", "--lmbda", "0")
    assert "; fits NVIDIA H100 80GB HBM3, 79.6 GiB" in said
    said = refusal(monkeypatch, capsys, *model, *ONE_GPU, "none")
    assert said.startswith("megatron_gkd: error: NVIDIA H100 80GB HBM3, 79.6 GiB: the run needs")
    assert "--recompute auto" in said and "base 56.9" in said
    flags = [*ONE_GPU, "none", "--gpu_memory", "200"]  # what is named comes first
    assert "; fits --gpu_memory, 200.0 GiB" in plan(monkeypatch, capsys, *model, *flags)
    flags = [*ONE_GPU, "none", "--device", "cpu"]
    said = plan(monkeypatch, capsys, *model, *flags)
    assert "; --device cpu, not compared" in said and "CUDA" not in said


def test_rates_of_another_device_are_named(monkeypatch, capsys):
    flags = ["--model", REAL, "--gpus", "1", "--gpu_memory", "200", "--recompute", "none"]
    flags += ["--max_tokens_per_micro_batch", "2048"]
    asked = "--gpu FILE takes"
    assert asked not in plan(monkeypatch, capsys, *flags)
    assert asked in plan(monkeypatch, capsys, *flags, "--device", "cpu")


@pytest.mark.parametrize("cards, part", [(2, "40.0 GiB"), ("x", None), (0, None)])
def test_check_takes_the_smallest_card_and_none_is_no_limit(
    cards, part, card, tmp_path, monkeypatch, capsys
):
    card(cards)
    flags = ["--model", REAL, *ONE_GPU, "none"]
    if part:
        assert part in refusal(monkeypatch, capsys, *flags)
    else:
        assert "; no GPU here to compare with" in plan(monkeypatch, capsys, *flags)


def test_a_check_and_a_plan_agree_to_the_byte(monkeypatch, capsys):
    """What a plan takes a check takes, and no more."""
    sizes = ["--expert_model_parallel_size", "2", "--tensor_model_parallel_size", "2"]
    sizes += ["--recompute", "none", "--max_tokens_per_micro_batch", "8192"]
    flags = ["--model", REAL, "--gpus", "8", *sizes]
    needed = make_plan(job_of(*flags, "--gradient_accumulation_steps", "2")).choices[0].memory
    check = [*flags, "--gradient_accumulation_steps", "2", "--check", "--gpu_memory"]
    assert sum(needed.training.values()) > sum(needed.rollout.values())
    enough = needed.total / 2**30
    assert "; fits" in plan(monkeypatch, capsys, *check, repr(enough))
    assert "needs about" in refusal(monkeypatch, capsys, *check, repr(enough - 1e-6))


def test_prompts_that_may_be_short_are_not_refused(monkeypatch, capsys):
    """A check does not know the data: it says up to which length of a prompt it fits."""
    flags = ["--model", REAL, "--gpus", "1", "--recompute", "full", "--check"]
    flags += ["--gradient_accumulation_steps", "8", "--gpu_memory"]
    assert "GiB; towers not" in plan(monkeypatch, capsys, *flags, "77")
    fits = re.compile(
        r"; fits --gpu_memory, [\d.]+ GiB where no prompt has more than ([\d,]+) tokens:"
    )
    tokens = [fits.search(plan(monkeypatch, capsys, *flags, gib))[1] for gib in ("74.5", "71.5")]
    shorter, shortest = (int(number.replace(",", "")) for number in tokens)
    assert 0 < shortest < shorter < 2048
    known = workload_of(*parse_plan([*flags, "74.5"])[:2], read_model_args(REAL))
    most = lambda prompt: (
        estimate(
            read_model_args(REAL),
            ParallelConfig(),
            replace(known, prompt_tokens=prompt),
            world_size=1,
        ).total
    )
    assert most(shorter) <= 74.5 * 2**30 < most(shorter + 1)
    assert "needs about" in refusal(monkeypatch, capsys, *flags, "69")
    assert "needs about" in refusal(monkeypatch, capsys, *flags, "69", "--lmbda", "0")


def test_each_kind_of_media_has_its_tower(monkeypatch, capsys):
    flags = ["--model", REAL, "--gpus", "8", "--expert_model_parallel_size", "8", "--check"]
    needed = {}
    for kinds in ("", "audio", "image", "video", "audio video"):
        media = ["--media", *kinds.split()] if kinds else []
        said = plan(monkeypatch, capsys, *flags, *media)
        assert ("towers not counted (--media)" in said) == (not kinds)
        needed[kinds] = float(re.search(r"about ([\d.]+) GiB", said)[1])
    one, other = needed["audio"] - needed[""], needed["video"] - needed[""]
    assert one > 0.5 and other > 0.5 and needed["image"] == needed["video"]
    assert needed["audio video"] > max(needed["audio"], needed["video"])
