"""Runs of the command line: what they write, what they refuse, on-policy steps, bad steps, and what
stays equal on all ranks.
"""

import contextlib
import hashlib
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gkd import parallel, train
from megatron_gkd.lora.adapter import LINEARS
from megatron_gkd.train import draw, main
from megatron_gkd.verify.reference import decoder
from tests.ranks import run_ranks
from tests.reference_step import load_model, read_adapter, reference_step, write_adapter
from tests.train_runs import (
    SMALL,
    arguments,
    layout_flags,
    make_rows,
    read_lines,
    run_training,
    stable,
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
}
METRICS |= {
    "response_length",
    "cut_tokens",
    "truncated_responses",
    "peak_memory_gib",
    "tokens_per_second",
    *TIMES,
}
GREEDY = dict(rollout_temperature=0, repetition_penalty=1, max_completion_length=6)


@pytest.fixture(scope="module")
def data(tiny_folder, tmp_path_factory):
    """Folders and files by flag; `rows` are the training rows themselves."""
    root = tmp_path_factory.mktemp("train")
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
        tensorboard=True,
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
    assert set(run) == {"config", "versions", "parameters", "layout"}
    assert run["layout"] == {"world_size": 2, "tp": 1, "pp": 1, "dp": 2, "ep": 1}
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
    "world_size, tp, pp, ep",
    [(1, 1, 1, 1), (2, 1, 1, 2), pytest.param(4, 2, 2, 2, marks=pytest.mark.smoke), (4, 2, 1, 2)],
)
def test_evaluation_is_the_reference(data, tmp_path, world_size, tp, pp, ep):
    """Five rows in micro-batches of two: padding samples, whole batches of them, count nothing."""
    flags = dict(
        val_dataset=data["val_dataset"],
        adapter=data["adapter"],
        per_device_eval_batch_size=2,
        max_steps=1,
        lora_dropout=0.3,
    )
    flags |= dict(per_device_train_batch_size=2, learning_rate=0, sft_alpha=0.2) | layout_flags(
        tp, pp, ep
    )
    run_training(world_size, flags_of_run(data, tmp_path, **flags))
    expected = reference_step(data["model"], data["adapter"], data["evaluation"], sft_alpha=0.2)
    for line in read_lines(tmp_path / "eval.jsonl"):
        for key in expected.keys() - {"grad_norm"}:
            assert line[key] == pytest.approx(expected[key], rel=1e-5), key


def test_draws():
    draws = [draw(3, step) for step in range(4000)]
    assert sum(value < 0.3 for value in draws) / 4000 == pytest.approx(0.3, abs=0.03)
    assert all(0 <= value < 1 for value in draws) and len(set(draws)) == 4000
    assert draws[:50] != [draw(4, step) for step in range(50)]


def test_on_policy_steps(data, tmp_path):
    """lmbda as a number and as a schedule; cross-entropy is for the data set's own responses."""
    cases = {"never": "0", "always": "1", "half": "0.5", "schedule": "0:0,3:1,5:0.5"}
    flags = dict(
        max_steps=8,
        sft_alpha=0.5,
        max_completion_length=4,
        per_device_train_batch_size=2,
        lora_dropout=0.1,
    ) | layout_flags(tp=2, ep=2)
    run_training(
        2,
        *[
            flags_of_run(data, tmp_path / name, lmbda=lmbda, **flags)
            for name, lmbda in cases.items()
        ],
    )
    drawn = [draw(42, step) < 0.5 for step in range(8)]
    assert len(set(drawn)) == 2
    expected = {
        "never": [False] * 8,
        "always": [True] * 8,
        "half": drawn,
        "schedule": [False] * 3 + [True] * 2 + drawn[5:],
    }
    for name, on_policy in expected.items():
        lines = read_lines(tmp_path / name / "metrics.jsonl")
        assert [line["on_policy"] for line in lines] == on_policy, name
        assert [line["on_policy_share"] for line in lines] == pytest.approx(
            [sum(on_policy[: i + 1]) / (i + 1) for i in range(8)]
        )
        for line in lines:
            assert line["response_length"] <= 4 or not line["on_policy"]
            if line["on_policy"]:
                assert line["loss"] == pytest.approx(line["jsd"], rel=1e-6)
            else:
                assert line["loss"] == pytest.approx(
                    0.5 * line["jsd"] + 0.5 * line["sft_loss"], rel=1e-6
                )


def written_rows(data, teacher_writes: bool) -> list[dict]:
    """The training rows with greedy responses of the reference model."""
    model, (adapter, scale) = load_model(data["model"]), read_adapter(data["adapter"])
    stops = json.loads(Path(data["model"], "generation_config.json").read_text())["eos_token_id"]
    rows = []
    with torch.no_grad():
        weights = None if teacher_writes else model.with_lora(adapter, scale)
        for row in data["rows"]:
            prompt = row["input_ids"][
                : next(i for i, label in enumerate(row["labels"]) if label != -100)
            ]
            text = list(row["teacher_input_ids"] if teacher_writes else prompt)
            response = []
            while len(response) < GREEDY["max_completion_length"] and not set(response) & set(
                stops if isinstance(stops, list) else [stops]
            ):
                response.append(int(model.logits(text + response, weights)[-1].argmax()))
            rows.append(
                row | {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}
            )
    return rows


@pytest.mark.parametrize(
    "writer, flags", [("student", dict(lmbda=1)), ("teacher", dict(lmbda=0, seq_kd=True))]
)
def test_written_responses_are_the_reference(data, tmp_path, writer, flags):
    """Greedy on-policy steps, and --seq_kd: the numbers are those of rows whose responses the
    reference model wrote.
    """
    expected = reference_step(
        data["model"], data["adapter"], written_rows(data, writer == "teacher")
    )
    for world_size, tp, pp, ep in [(1, 1, 1, 1), (4, 2, 1, 4), (4, 2, 2, 2)]:
        own = (
            flags
            | GREEDY
            | layout_flags(tp, pp, ep)
            | dict(per_device_train_batch_size=8 * tp * pp // world_size, sft_alpha=0.4)
        )
        run_training(
            world_size,
            flags_of_run(data, tmp_path / f"{tp}{pp}", adapter=data["adapter"], max_steps=1, **own),
        )
        (line,) = read_lines(tmp_path / f"{tp}{pp}" / "metrics.jsonl")
        assert line["loss"] == pytest.approx(line["jsd"], rel=1e-6)
        for key in ("jsd", "sft_loss", "num_tokens", "kl_reverse"):
            assert line[key] == pytest.approx(expected[key], rel=1e-4), (key, tp, pp)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert line["on_policy"] is (writer == "student")
        assert line["truncated_responses"] >= 8 * (line["num_tokens"] == 48)


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
    monkeypatch.setattr("megatron_gkd.flags.SECONDS_FOR_RANK_0", 0)
    monkeypatch.setattr(train, "initialize", lambda *args, **kwargs: None)
    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(SystemExit) as exit_:
        main(["--model", "m", "--dataset", "d", "--device", "cpu"])
    assert exit_.value.code == 2
    assert (
        capsys.readouterr().err == "megatron_gkd: error (rank 9): rows.jsonl is not on this node\n"
    )


def hashes(run) -> tuple[dict, dict]:
    """This rank's hashes: of the pieces of the adapter by what they are, of the frozen parameters
    by name.
    """
    from megatron_gkd.lora.adapter import adapter_slices

    def digest(tensor):
        return hashlib.sha256(
            tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()

    trained = {
        (piece.stored.name, str(piece.stored.index)): digest(piece.view)
        for piece in adapter_slices(run.model, run.model_args, run.parallel)
    }
    return trained, {
        name: digest(value)
        for name, value in run.model.named_parameters()
        if not value.requires_grad
    }


def _watched(rank, world_size, argv):
    """A run, with `hashes` before and after, and the dtypes of what it trains."""
    from megatron_gkd import train

    train.destroy = lambda: None
    build, kept = train.build_run, {}

    def build_and_keep(*args):
        kept["run"] = build(*args)
        kept["before"] = hashes(kept["run"])
        return kept["run"]

    train.build_run = build_and_keep
    train.main(argv)
    return (
        kept["before"],
        hashes(kept["run"]),
        {str(p.dtype) for p in kept["run"].model.parameters() if p.requires_grad},
    )


@pytest.mark.parametrize(
    "world_size, tp, pp, ep",
    [pytest.param(4, 2, 1, 2, marks=pytest.mark.smoke), (8, 4, 1, 8), (4, 2, 2, 1)],
)
def test_replicas_stay_equal_and_the_base_stays(data, tmp_path, world_size, tp, pp, ep):
    """Twenty steps with dropout and on-policy text: every copy of an adapter weight has the same
    bits on all ranks that hold one; no frozen weight has changed.
    """
    flags = dict(
        max_steps=20,
        lora_dropout=0.2,
        learning_rate=0.01,
        torch_dtype="bfloat16",
        lmbda=0.2,
        max_completion_length=4,
    )
    flags |= dict(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=100,
        logging_steps=20,
    ) | layout_flags(tp, pp, ep)
    results = run_ranks(_watched, world_size, flags_of_run(data, tmp_path, **flags))
    after, copies = {}, 0
    for (trained_before, frozen_before), (trained, frozen), dtypes in results:
        assert frozen == frozen_before and len(frozen) > 5 and dtypes == {"torch.float32"}
        assert not any(trained[name] == trained_before[name] for name in trained)
        for name, value in trained.items():
            copies += name in after
            assert after.setdefault(name, value) == value, name
    assert copies > 0


def _poisoned(rank, world_size, argv, where, steps):
    """In these steps NaN enters the last replica's loss, or Inf a gradient of the last rank alone,
    before the reduction or ("memory") after it; returns the steps that left this rank's LoRA as it
    was.
    """
    from megatron_gkd import forward, optimizer, parallel, train

    train.destroy = parallel.parallel_state.destroy_model_parallel
    add, finalize, update, stayed, number = (
        forward.TokenSums.add,
        forward.finalize_model_grads,
        optimizer.Optimizer.step,
        [],
        [0],
    )

    def put_inf(model, name):
        if number[0] in steps and rank == world_size - 1:
            next(
                p for n, p in model.named_parameters() if p.requires_grad and name in n
            ).main_grad.view(-1)[0] = math.inf

    def add_nan(sums, output, batch):
        add(sums, output, batch)
        if where == "loss" and number[0] in steps and rank >= world_size - 2:
            sums.values[0, 0] = math.nan

    def finalize_poisoned(models, *args, **kwargs):
        if where not in ("loss", "memory"):
            put_inf(models[0], where)
        finalize(models, *args, **kwargs)
        if where == "memory":
            put_inf(models[0], "experts")

    def watch(own, *args):
        before = [parameter.detach().clone() for parameter in own.moments()]
        result = update(own, *args)
        if all(torch.equal(x, y) for x, y in zip(before, own.moments(), strict=True)):
            stayed.append(number[0])
        number[0] += 1
        return result

    number[0] = 1
    forward.TokenSums.add, forward.finalize_model_grads, optimizer.Optimizer.step = (
        add_nan,
        finalize_poisoned,
        watch,
    )
    train.main(argv)
    return stayed


@pytest.mark.parametrize("where", ["loss", "linear_qkv", "experts", "memory"])
def test_bad_steps_are_skipped(data, tmp_path, where):
    """On all ranks, counted, logged as null whatever --logging_steps; good steps in between begin
    the count anew.
    """
    flags = dict(
        max_steps=6,
        max_bad_steps=2,
        logging_steps=100,
        per_device_train_batch_size=2,
        learning_rate=0.01,
    ) | layout_flags(tp=2, ep=2)
    results = run_ranks(_poisoned, 4, flags_of_run(data, tmp_path, **flags), where, [2, 4])
    assert results == [[2, 4]] * 4
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["skipped_steps"]) for line in lines] == [
        (1, 0),
        (2, 1),
        (4, 2),
        (6, 2),
    ]
    if where != "memory":  # else rank 0, which writes, has only good numbers
        assert [line["loss" if where == "loss" else "grad_norm"] for line in lines].count(None) == 2
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert (state["num_updates"], state["skipped_steps"], state["bad_in_a_row"]) == (4, 2, 0)


@pytest.mark.parametrize("lmbda", [0, 1])
def test_too_many_bad_steps(data, tmp_path, lmbda):
    """An adapter that overflows, in training or while it writes: every step is bad, and the run
    ends with what to try.
    """
    adapter = tmp_path / "adapter"
    shutil.copytree(data["adapter"], adapter)
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(path).items()}, path)
    message = error_of_run(
        2,
        flags_of_run(
            data,
            tmp_path,
            adapter=adapter,
            max_bad_steps=3,
            max_steps=20,
            lmbda=lmbda,
            **layout_flags(tp=2),
        ),
    )
    assert (
        "3 steps in a row" in message
        and "--max_bad_steps 3" in message
        and "There is no checkpoint yet" in message
    )
    assert "No step was good: look for NaN and Inf in the weights" in message
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [1, 2, 3] and lines[0]["loss"] is None
    assert not list(tmp_path.glob("checkpoint-*"))


def test_bad_steps_push_no_checkpoint_out(data, tmp_path):
    """One update that ruins the weights and is saved, and every step after it is bad: what was
    saved before it stays, is named, and trains on.
    """
    flags = dict(
        save_steps=1,
        save_total_limit=1,
        warmup_ratio=0,
        lr_scheduler_type="constant",
        max_bad_steps=3,
    )
    run_training(1, flags_of_run(data, tmp_path, max_steps=2, learning_rate=0.001, **flags))
    ruinous = flags | dict(max_steps=30, learning_rate=1e19, resume_from_checkpoint="latest")
    message = error_of_run(1, flags_of_run(data, tmp_path, **ruinous))
    last_good = len(read_lines(tmp_path / "metrics.jsonl")) - 3
    sound, ruined = (tmp_path / f"checkpoint-{step}" for step in (last_good - 1, last_good))
    assert sorted(tmp_path.glob("checkpoint-*")) == [sound, ruined]
    assert (
        f"{ruined} was written right after the last good step" in message
        and f"{sound} is from before" in message
    )
    assert "Try a lower --learning_rate" in message
    on = flags | dict(max_steps=last_good + 2, learning_rate=0.001, resume_from_checkpoint=sound)
    run_training(1, flags_of_run(data, tmp_path, **on))
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["skipped_steps"] == 0
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{last_good + 2}"]


def _writes_badly(rank, world_size, argv, steps):
    """In these steps (from 0) the last rank alone writes what is not finite."""
    from megatron_gkd import parallel, train
    from megatron_gkd.rollout import backend

    train.destroy = parallel.parallel_state.destroy_model_parallel
    write = backend.MegatronBackend.write

    def fail(writer, prompts, step):
        if step in steps and rank == world_size - 1:
            raise FloatingPointError("rollout: not finite for row 7")
        return write(writer, prompts, step)

    backend.MegatronBackend.write = fail
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train.main(argv)
    return said.getvalue()


def test_a_rank_that_writes_badly_skips_the_step_of_all(data, tmp_path):
    """Replicas write apart from each other: the good one must not wait for the other for ever."""
    flags = dict(
        max_steps=4, max_bad_steps=2, per_device_train_batch_size=4, logging_steps=100, lmbda=1
    )
    said = run_ranks(
        _writes_badly, 2, flags_of_run(data, tmp_path, max_completion_length=3, **flags), [0, 2]
    )
    assert (
        "Step 1 is skipped: rollout: not finite for row 7" in said[0] and "skipped" not in said[1]
    )
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["skipped_steps"], line["num_tokens"] > 0) for line in lines] == [
        (1, 1, False),
        (3, 2, False),
        (4, 2, True),
    ]
    assert all(set(line) == METRICS for line in lines)
    assert (
        [line["loss"] is None for line in lines]
        == [line["student_time"] == 0 for line in lines]
        == [True, True, False]
    )
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert (state["num_updates"], state["skipped_steps"], state["bad_in_a_row"]) == (2, 2, 0)


@pytest.mark.smoke
def test_float16(data, tmp_path):
    """Trains to what float32 trains to; an overflow is skipped and lowers the scale but is no bad
    step; the scale comes back on resume.
    """
    flags = dict(
        adapter=data["adapter"],
        max_steps=4,
        save_steps=2,
        save_total_limit=9,
        learning_rate=0.001,
        warmup_ratio=0,
    ) | layout_flags(tp=2, ep=2)
    half = flags | dict(torch_dtype="float16", max_bad_steps=1)
    run_ranks(_poisoned, 2, flags_of_run(data, tmp_path / "half", **half), "experts", [1])
    run_training(2, flags_of_run(data, tmp_path / "full", **flags))
    lines, expected = (
        read_lines(tmp_path / "half" / "metrics.jsonl"),
        read_lines(tmp_path / "full" / "metrics.jsonl"),
    )
    assert [line["skipped_steps"] for line in lines] == [1] * 4
    assert lines[1]["loss"] == pytest.approx(expected[0]["loss"], rel=0.01)
    assert lines[1]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=0.02)
    state = json.loads((tmp_path / "half" / "checkpoint-2" / "trainer_state.json").read_text())
    assert (state["loss_scale"]["scale"], state["num_updates"], state["bad_in_a_row"]) == (
        2.0**15,
        1,
        0,
    )
    shutil.copytree(tmp_path / "half", tmp_path / "resumed")
    resume = half | dict(resume_from_checkpoint=tmp_path / "half" / "checkpoint-2")
    run_training(2, flags_of_run(data, tmp_path / "resumed", **resume))
    assert stable(read_lines(tmp_path / "resumed" / "metrics.jsonl")) == stable(lines)
    final = [
        json.loads((tmp_path / name / "checkpoint-4" / "trainer_state.json").read_text())
        for name in ("half", "resumed")
    ]
    assert final[0] == final[1] and final[0]["loss_scale"]["scale"] == 2.0**15


def test_recompute_trains_the_same(data, tmp_path):
    """With dropout and accumulation, at PP and TP: the same losses and gradient norms."""
    flags = dict(
        lora_dropout=0.2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.003,
    ) | layout_flags(tp=2, pp=2, ep=2)
    run_training(
        4,
        *[
            flags_of_run(data, tmp_path / name, recompute=name, **flags)
            for name in ("none", "full")
        ],
    )
    plain, recomputed = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("none", "full"))
    for line, expected in zip(recomputed, plain, strict=True):
        for key in ("loss", "grad_norm", "num_tokens"):
            assert line[key] == pytest.approx(expected[key], rel=1e-5), key
    assert plain[0]["grad_norm"] > 0


def test_data_order_is_the_same_at_any_data_parallel_size(data, tmp_path):
    """More rows than a step takes: step by step the same rows, whatever shares them."""
    for dp in (1, 2, 4):
        flags = dict(per_device_train_batch_size=4 // dp, max_steps=5, learning_rate=0.003)
        run_training(dp, flags_of_run(data, tmp_path / str(dp), adapter=data["adapter"], **flags))
    first, *others = (read_lines(tmp_path / str(dp) / "metrics.jsonl") for dp in (1, 2, 4))
    assert len({line["num_tokens"] for line in first}) > 1
    for lines in others:
        for line, expected in zip(lines, first, strict=True):
            for key in ("loss", "grad_norm", "num_tokens", "epoch"):
                assert line[key] == pytest.approx(expected[key], rel=1e-4), key


def train_deterministically(rank, world_size, argv):
    train.destroy = (
        parallel.parallel_state.destroy_model_parallel
    )  # the process group is the harness's to leave
    main(argv)
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def test_deterministic_kernels_train_the_same(data, tmp_path):
    """Other kernels under the same numbers; that they give the same bits twice on a GPU is for
    tests/test_gpu.py.
    """
    flags = dict(
        model=data["model"],
        dataset=data["dataset"],
        max_steps=2,
        learning_rate=0.01,
        lmbda=0.5,
        **layout_flags(2, 1, 2),
    )
    run_training(2, arguments(output_dir=tmp_path / "usual", **flags))
    modes = run_ranks(
        train_deterministically,
        2,
        arguments(output_dir=tmp_path / "same", deterministic=True, **flags),
    )
    assert modes == [(True, True)] * 2
    usual, same = (
        stable(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("usual", "same")
    )
    for line, other in zip(usual, same, strict=True):
        assert other == pytest.approx(line, rel=1e-4, abs=1e-6)
