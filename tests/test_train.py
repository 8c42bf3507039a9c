"""Runs of the command line: what they write, evaluation, and what they refuse."""

import json
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_gkd import train
from megatron_gkd.build import settings_notes
from megatron_gkd.config import parse_config
from megatron_gkd.liveness import Membership
from megatron_gkd.lora_targets import LINEARS
from megatron_gkd.train import main
from megatron_gkd.verify.reference import decoder
from tests.reference_step import load_model, reference_step, write_adapter
from tests.train_runs import (
    SMALL,
    arguments,
    layout_flags,
    make_rows,
    read_lines,
    run_training,
    write_rows,
)

TIMES = ("data_time", "rollout_time", "teacher_time", "student_time", "optimizer_time", "step_time")
METRICS = {
    "step",
    "epoch",
    "loss",
    "jsd",
    "sft_loss",
    "num_tokens",
    "grad_norm",
    "learning_rate",
    "on_policy",
    "on_policy_share",
}
METRICS |= {
    "kl_forward",
    "kl_reverse",
    "entropy_student",
    "entropy_teacher",
    "top1_agreement",
    "token_accuracy",
    "skipped_steps",
    "zero_gradient_steps",
}
METRICS |= {
    "response_length",
    "micro_batches",
    "padding",
    "cut_tokens",
    "truncated_responses",
    "peak_memory_gib",
    "tokens_per_second",
    *TIMES,
}


def write_data(tiny_folder, root: Path) -> dict:
    """Folders and files by flag; `rows` are the training rows themselves."""
    model, rows = tiny_folder(**SMALL), make_rows(8)
    return dict(
        model=model,
        rows=rows,
        dataset=write_rows(root / "rows.jsonl", rows),
        plain=write_rows(root / "plain.jsonl", make_rows(8, with_teacher=False)),
        evaluation=make_rows(5, seed=1),
        val_dataset=write_rows(root / "eval.jsonl", make_rows(5, seed=1)),
        adapter=write_adapter(root / "adapter", model, rank=3, alpha=5),
    )


@pytest.fixture(scope="module")
def data(tiny_folder, tmp_path_factory):
    return write_data(tiny_folder, tmp_path_factory.mktemp("train"))


def flags_of_run(data, output: Path, **flags) -> list[str]:
    """Steps of all 8 rows on one rank, fresh LoRA."""
    settings = dict(
        model=data["model"],
        dataset=data["dataset"],
        output_dir=output,
        per_device_train_batch_size=8,
        max_steps=3,
    )
    return arguments(**(settings | flags))


def error_of_run(world_size: int, argv: list[str]) -> str:
    """The message of a run that ends with an error and exit status 2."""
    with pytest.raises(RuntimeError, match="SystemExit: 2") as error:
        run_training(world_size, argv)
    return str(error.value)


def test_run_folder(data, tmp_path):
    """Names of metrics, run.json, eval.jsonl before the first step, in between and at the end; the
    lines that --logging_steps asks for.
    """
    flags = dict(
        val_dataset=data["val_dataset"],
        eval_steps=3,
        logging_steps=2,
        save_steps=100,
        report_to="tensorboard",
    )
    flags |= dict(
        max_steps=None,
        num_train_epochs=6.9,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    said = run_training(2, flags_of_run(data, tmp_path, **flags))
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 7]
    assert all(set(line) == METRICS for line in lines)
    assert all(
        sum(line[name] for name in TIMES[:-1]) == pytest.approx(line["step_time"]) for line in lines
    )
    assert [line["epoch"] for line in lines] == [line["step"] for line in lines]
    tokens = sum(len(row["labels"]) - row["labels"].count(-100) for row in data["rows"])
    assert {line["num_tokens"] for line in lines} == {tokens} and lines[0][
        "response_length"
    ] == tokens / 8
    evaluations = read_lines(tmp_path / "eval.jsonl")
    assert [line["step"] for line in evaluations] == [0, 3, 6, 7]
    assert {
        "loss",
        "jsd",
        "sft_loss",
        "num_tokens",
        "top1_agreement",
        "token_accuracy",
        "kl_forward",
        "kl_reverse",
    } <= set(evaluations[0])
    run = json.loads((tmp_path / "run.json").read_text())
    assert set(run) == {
        *("started", "job", "config", "versions", "parameters", "layout", "hardware")
    }
    assert datetime.fromisoformat(run["started"]).tzinfo and run["hardware"]["device"]
    assert run["layout"] == {"world_size": 2, "tp": 1, "pp": 1, "dp": 2, "ep": 1, "cp": 1}
    saved = load_file(tmp_path / "checkpoint-7" / "adapter_model.safetensors")
    thinker = load_model(data["model"]).model
    base = sum(
        weight.numel()
        for part in (decoder(thinker), thinker.lm_head)
        for weight in part.parameters()
    )
    trainable = sum(tensor.numel() for tensor in saved.values())
    assert run["parameters"] == {"trainable": trainable, "total": base + trainable}
    assert run["config"]["train"]["max_steps"] == 7 and {"torch", "megatron-core"} <= set(
        run["versions"]
    )
    lora = run["config"]["lora"]
    assert (lora["lora_rank"], lora["lora_alpha"], lora["lora_target_modules"]) == (
        8,
        16.0,
        list(LINEARS),
    )
    assert "Settings:" in said and "lora_rank=8 lora_alpha=16.0 " in said and "max_steps=7" in said
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(
    "world_size, tp, pp, ep, cp",
    [(1, 1, 1, 1, 1), (2, 1, 1, 2, 1), (4, 2, 2, 2, 1), (4, 2, 1, 2, 1), (4, 1, 1, 2, 2)],
)
def test_evaluation_is_the_reference(data, tmp_path, world_size, tp, pp, ep, cp):
    """Five rows in micro-batches of about two: a rank without a row has padding, which counts
    nothing.
    """
    flags = dict(
        max_tokens_per_micro_batch=40,
        val_dataset=data["val_dataset"],
        adapter=data["adapter"],
        per_device_eval_batch_size=2,
        max_steps=1,
        lora_dropout=0.3,
    )
    flags |= dict(per_device_train_batch_size=2, learning_rate=0, sft_alpha=0.2) | layout_flags(
        tp, pp, ep, cp
    )
    run_training(world_size, flags_of_run(data, tmp_path, **flags))
    expected = reference_step(data["model"], data["adapter"], data["evaluation"], sft_alpha=0.2)
    for line in read_lines(tmp_path / "eval.jsonl"):
        for key in expected.keys() - {"grad_norm"}:
            assert line[key] == pytest.approx(expected[key], rel=1e-5), key


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(lmbda=1), "--sft_alpha 0.3 counts in no step: with --lmbda 1 none learns"),
        (dict(seq_kd="true"), "--sft_alpha 0.3 counts in no step: with --seq_kd none learns"),
        (dict(lmbda="0:1,9:0"), ""),
        (
            dict(importance_clip=2),
            "--importance_clip 2 counts in no step: with --lmbda 0 the student",
        ),
        (dict(importance_clip=2, lmbda="0:0,5:0.1"), ""),
        (dict(divergence="reverse_kl", beta=0.3), "--beta 0.3 counts in no step: --divergence rev"),
    ],
)
def test_what_counts_in_no_step_is_said(changes, expected):
    flags = dict(model="m", dataset="d", max_steps=10, sft_alpha=0.3) | changes
    flags |= dict(top_p=1, top_k=0, repetition_penalty=1)  # nothing else to say
    notes = settings_notes(parse_config(arguments(**flags)))
    assert [expected in note for note in notes] == [True] * bool(expected)


def test_nothing_to_learn_is_refused(data, tmp_path):
    """Same view, no cross-entropy that counts: LoRA would never move. With --allow_zero_signal it
    runs, and indeed nothing moves.
    """
    for flags in [
        {},
        dict(sft_alpha=0.5, lmbda=1),
        dict(sft_alpha=0.5, seq_kd=True, lmbda=0.3),
        dict(sft_alpha=0.5, lmbda="0:1,99:0"),
    ]:
        message = error_of_run(1, flags_of_run(data, tmp_path, dataset=data["plain"], **flags))
        assert (
            "nothing to learn" in message
            and "teacher_messages" in message
            and "--allow_zero_signal" in message
        )
    message = error_of_run(
        1, flags_of_run(data, tmp_path, dataset=data["plain"], adapter=data["adapter"])
    )
    assert (
        f"from the LoRA of {data['adapter']} back to the base model" in message
        and "fresh LoRA" not in message
    )
    assert not (tmp_path / "metrics.jsonl").exists()
    run_training(
        1, flags_of_run(data, tmp_path / "sft", dataset=data["plain"], sft_alpha=0.5, max_steps=1)
    )
    assert read_lines(tmp_path / "sft" / "metrics.jsonl")[0]["grad_norm"] > 0

    for dtype, layout in [("float32", layout_flags()), ("bfloat16", layout_flags(tp=2, ep=2))]:
        flags = dict(
            dataset=data["plain"],
            allow_zero_signal=True,
            lora_dropout=0.1,
            save_steps=1,
            save_total_limit=9,
            learning_rate=0.1,
        )
        flags |= dict(torch_dtype=dtype, lmbda=0.5, max_completion_length=3) | layout
        run_training(
            layout["tensor_model_parallel_size"], flags_of_run(data, tmp_path / dtype, **flags)
        )
        for line in read_lines(tmp_path / dtype / "metrics.jsonl"):
            assert (
                line["loss"] == line["jsd"] == line["grad_norm"] == 0
                and line["num_tokens"] > 0
                and line["skipped_steps"] == 0
            )
        first, last = (
            load_file(tmp_path / dtype / f"checkpoint-{step}" / "adapter_model.safetensors")
            for step in (1, 3)
        )
        assert all(torch.equal(first[name], last[name]) for name in first)
        assert not any(last[name].any() for name in last if ".lora_B." in name)
        assert all(last[name].any() for name in last if ".lora_A." in name)


def test_what_is_refused(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--model", "x", "--dataset", "y", "--learning_rat", "1"])
    assert exit_.value.code == 2 and "the nearest is --learning_rate" in capsys.readouterr().err
    cases = {
        "choose ALL, or some of": dict(lora_target_modules="q_proj,mlp"),
        "does not fit into --lora_rank 2": dict(adapter=data["adapter"], lora_rank=2),
        "expected a PEFT adapter folder": dict(adapter=tmp_path),
        "no config.json": dict(model=tmp_path),
        "missing.jsonl": dict(dataset=tmp_path / "missing.jsonl"),
    }
    for expected, flags in cases.items():
        assert expected in error_of_run(1, flags_of_run(data, tmp_path / "out", **flags)), flags
    assert "does not divide the 8 attention heads" in error_of_run(
        3, flags_of_run(data, tmp_path / "out", **layout_flags(tp=3))
    )


def test_an_error_of_one_rank_is_said_by_that_rank(monkeypatch, capsys):
    def fail(*args):
        raise FileNotFoundError("rows.jsonl is not on this node")

    monkeypatch.setenv("RANK", "9")
    monkeypatch.setattr("megatron_gkd.last_words.SECONDS_FOR_RANK_0", 0)
    for name in ("check_same_start", "initialize"):
        monkeypatch.setattr(train, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(train, "joined", lambda *args: nullcontext(Membership()))
    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(SystemExit) as exit_:
        main(["--model", "m", "--dataset", "d", "--device", "cpu"])
    assert exit_.value.code == 2
    assert (
        capsys.readouterr().err == "megatron_gkd: error (rank 9): rows.jsonl is not on this node\n"
    )
