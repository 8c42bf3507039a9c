"""Steps that are not finite: skipped on all ranks, counted, and the end of the run when there are
too many; the loss scale of float16.
"""

import contextlib
import io
import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ranks import run_ranks
from tests.test_train import METRICS, error_of_run, flags_of_run, write_data
from tests.train_runs import layout_flags, read_lines, run_training, stable, write_rows


@pytest.fixture(scope="module")
def data(tiny_folder, tmp_path_factory):
    return write_data(tiny_folder, tmp_path_factory.mktemp("train"))


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

    def add_nan(sums, *args):
        add(sums, *args)
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
    """An adapter that overflows, in training or while it writes: every step is bad, an evaluation
    has no numbers, and the run ends with what to try.
    """
    questions = [
        {name: row[name][:2] for name in ("input_ids", "teacher_input_ids")}
        for row in data["evaluation"]
    ]
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
            val_dataset=write_rows(tmp_path / "questions.jsonl", questions),
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
    (evaluation,) = read_lines(tmp_path / "eval.jsonl")
    assert evaluation["jsd"] is None and evaluation["num_tokens"] == 0


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
    # a run that ends with a bad step saves the weights of the good one before
    short = ruinous | dict(max_steps=last_good + 1, resume_from_checkpoint=sound)
    run_training(1, flags_of_run(data, tmp_path, **short))
    message = error_of_run(1, flags_of_run(data, tmp_path, **ruinous))
    also_ruined = tmp_path / f"checkpoint-{last_good + 1}"
    for folder in (ruined, also_ruined):
        assert f"{folder} was written right after the last good step" in message
    assert f"{sound} is from before" in message
    on = flags | dict(max_steps=last_good + 2, learning_rate=0.001, resume_from_checkpoint=sound)
    run_training(1, flags_of_run(data, tmp_path, **on))
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["skipped_steps"] == 0
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{last_good + 2}"]


def test_a_checkpoint_that_is_not_finite_is_no_way_on(data, tmp_path):
    """An update to Inf, which is saved: not named as a way on, and not taken as `latest`."""
    flags = dict(save_steps=1, warmup_ratio=0, lr_scheduler_type="constant", max_bad_steps=2)
    run_training(1, flags_of_run(data, tmp_path, max_steps=2, learning_rate=0.001, **flags))
    flags |= dict(max_steps=9, resume_from_checkpoint="latest")
    message = error_of_run(1, flags_of_run(data, tmp_path, **flags, learning_rate=1e300))
    ruined = tmp_path / "checkpoint-3"
    assert re.search(f"{ruined} is no way on: {ruined}/adapter_model.*holds NaN or Inf", message)
    assert f"{tmp_path / 'checkpoint-2'} is from before" in message
    said = run_training(1, flags_of_run(data, tmp_path, **flags | dict(max_steps=3)))
    assert "Note: checkpoint-3 is skipped" in said and "checkpoint-2 at step 2 of 3" in said
    elsewhere = flags | dict(learning_rate=1e300, resume_from_checkpoint=ruined)
    message = error_of_run(1, flags_of_run(data, tmp_path / "elsewhere", **elsewhere))
    there = tmp_path / "elsewhere" / "checkpoint-4"
    assert f"{there} is no way on" in message and f"the run went on from {ruined}" in message


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
    of_skipped, of_written = METRICS, METRICS | {"rollout_logprob_gap"}
    assert [set(line) for line in lines] == [of_skipped, of_skipped, of_written]
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


@pytest.mark.parametrize(
    "world_size, layout",
    [
        pytest.param(1, dict(), marks=pytest.mark.extended),
        (4, dict(pp=2)),
        pytest.param(8, dict(tp=2, ep=4, cp=2), marks=pytest.mark.extended),
    ],
)
def test_a_step_without_tokens_moves_nothing(data, tmp_path, world_size, layout):
    """--skip_first_tokens leaves out all of a step's tokens: neither the weights' decay nor the
    moments go on, the teacher stays, and the step is no bad one; the learning rate is that of the
    step's number. One sample of the others is enough.
    """
    dp = world_size // (layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1))
    flags = dict(
        adapter=data["adapter"],
        dataset=write_rows(tmp_path / "rows.jsonl", short_rows(4 * dp)),
        skip_first_tokens=2,
        teacher_ema=0.5,
        weight_decay=0.5,
        learning_rate=0.01,
        warmup_ratio=0,
        max_steps=5,
        max_bad_steps=1,
        save_steps=1,
        save_total_limit=9,
        per_device_train_batch_size=1,
        seed=1,
    )
    said = run_training(world_size, flags_of_run(data, tmp_path, **flags | layout_flags(**layout)))
    lines = read_lines(tmp_path / "metrics.jsonl")
    empty = [line["step"] for line in lines if line["num_tokens"] == 0]
    (trained,) = {1, 2, 3, 4} - set(empty)  # of four steps one has the long row
    assert trained < 4  # so that there are moments in a step without tokens
    for line in lines:
        step = line["step"]
        assert (line["loss"] is None, line["grad_norm"] is None) == (step in empty, step in empty)
        assert line["skipped_steps"] == sum(other <= step for other in empty)
        assert line["learning_rate"] == pytest.approx(
            0.005 * (1 + math.cos(math.pi * (step - 1) / 5))
        )
    for step in empty:
        assert f"Step {step} is skipped: --skip_first_tokens 2 leaves no token" in said
    assert said.count("is skipped") == len(empty)
    files = (
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "teacher/adapter_model.safetensors",
    )
    for step in range(2, 6):
        before, after = (tmp_path / f"checkpoint-{number}" for number in (step - 1, step))
        states = [json.loads((path / "trainer_state.json").read_text()) for path in (before, after)]
        assert states[1]["num_updates"] - states[0]["num_updates"] == (step not in empty)
        assert states[1]["bad_in_a_row"] == 0
        for name in files:
            same = (before / name).read_bytes() == (after / name).read_bytes()
            assert same == (step in empty), (step, name)


def short_rows(number: int) -> list[dict]:
    """Rows with one trained token, but the last, which has five."""
    return [
        {
            "input_ids": [5, 6, 7, *range(row, row + length)],
            "labels": [-100] * 3 + list(range(row, row + length)),
            "teacher_input_ids": [8, 9, 10, 11],
        }
        for row, length in enumerate([1] * (number - 1) + [5])
    ]
