"""A teacher that follows the student (--teacher_ema, --teacher_sync_steps): its values are those of
the recurrence over the student's saved adapters, it computes and writes with them, a run resumes
with it, and what could learn nothing is refused.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_gkd.config import parse_config
from megatron_gkd.data import load_datasets
from megatron_gkd.lora.grouped import LoraGrouped
from megatron_gkd.lora.slots import STUDENT, TEACHER, lora_modules
from megatron_gkd.model.args import read_model_args
from megatron_gkd.plan.memory import estimate
from megatron_gkd.plan.workload import workload
from megatron_gkd.zero_signal import check_trainable
from tests.adapters import ALL, load_peft, load_thinker, random_adapter, write_adapter
from tests.ranks import run_ranks
from tests.train_runs import (
    SMALL,
    arguments,
    build_parts,
    layout_flags,
    make_rows,
    read_lines,
    run_training,
    stable,
    write_rows,
)

LORA = dict(rank=3, alpha=5, targets=[*ALL, "lm_head"])
NAME = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder(**SMALL)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    tensors = random_adapter(read_model_args(folder), LORA["rank"], LORA["targets"], seed=9)
    return write_adapter(tmp_path_factory.mktemp("adapter"), tensors, **LORA)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return dict(
        dataset=write_rows(root / "rows.jsonl", make_rows(8, seed=4)),
        plain=write_rows(root / "plain.jsonl", make_rows(8, with_teacher=False)),
    )


def flags_of_run(folder, data, output, **flags) -> list[str]:
    """Steps of all eight rows, a checkpoint after each."""
    settings = dict(
        model=folder,
        dataset=data.get("dataset"),
        output_dir=output,
        per_device_train_batch_size=8,
        max_steps=3,
        save_steps=1,
        save_total_limit=99,
        learning_rate=0.02,
        lr_scheduler_type="constant",
    )
    return arguments(**(settings | flags))


def student_of(output, step: int) -> dict[str, torch.Tensor]:
    return load_file(Path(output, f"checkpoint-{step}", NAME))


def teacher_of(output, step: int) -> dict[str, torch.Tensor]:
    return load_file(Path(output, f"checkpoint-{step}", "teacher", NAME))


def equal(first, second) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


LAYOUTS = [
    pytest.param(4, 2, 2, 2, id="TP2 PP2 EP2"),
    pytest.param(1, 1, 1, 1, id="one rank", marks=pytest.mark.extended),
    pytest.param(2, 1, 1, 2, id="DP2 EP2", marks=pytest.mark.extended),
    pytest.param(4, 4, 1, 2, id="TP4 EP2", marks=pytest.mark.extended),
    pytest.param(8, 8, 1, 8, id="TP8 EP8", marks=pytest.mark.extended),
    pytest.param(8, 2, 2, 4, id="TP2 PP2 DP2 EP4", marks=pytest.mark.extended),
]


@pytest.mark.parametrize("world_size, tp, pp, ep", LAYOUTS)
def test_values_are_those_of_the_recurrence(
    folder, data, adapter, tmp_path, world_size, tp, pp, ep
):
    """In float64, from the student's adapter after each step; and the evaluation after the last
    step is that of the two saved adapters, frozen.
    """
    size = 8 * tp * pp // world_size
    flags = dict(
        adapter=adapter,
        val_dataset=data["dataset"],
        per_device_train_batch_size=size,
        **layout_flags(tp, pp, ep),
    )
    ema = flags | dict(teacher_ema=0.3)
    base = flags | dict(teacher_ema=0.25, teacher_start="base", max_steps=1)
    sync = flags | dict(teacher_sync_steps=2)
    last = tmp_path / "ema" / "checkpoint-3"
    frozen = flags | dict(adapter=last, teacher_adapter=last / "teacher", max_steps=1)
    runs = {"ema": ema, "base": base, "sync": sync, "frozen": frozen}
    run_training(
        world_size, *(flags_of_run(folder, data, tmp_path / name, **runs[name]) for name in runs)
    )
    start = student_of(tmp_path / "ema", 1).keys()
    first = {name: value.double() for name, value in load_file(Path(adapter) / NAME).items()}
    assert first.keys() == start
    for output, rate, expected in [
        ("ema", 0.3, first),
        ("base", 0.25, {k: v * (".lora_A." in k) for k, v in first.items()}),
    ]:
        for step in range(1, 2 if output == "base" else 4):
            student, teacher = (of(tmp_path / output, step) for of in (student_of, teacher_of))
            for name, value in expected.items():
                expected[name] = (1 - rate) * value + rate * student[name].double()
                assert (teacher[name] - expected[name]).abs().max() < 1e-6, (output, step, name)
                moved = (student[name] - first[name]).abs().max()
                assert output == "base" or (teacher[name] - student[name]).abs().max() > moved / 99

    def copied(step):
        return equal(teacher_of(tmp_path / "sync", step), student_of(tmp_path / "sync", step))

    assert equal(teacher_of(tmp_path / "sync", 1), load_file(Path(adapter) / NAME))
    assert not copied(1) and copied(2) and not copied(3)
    assert equal(teacher_of(tmp_path / "sync", 3), student_of(tmp_path / "sync", 2))

    moving = read_lines(tmp_path / "ema" / "eval.jsonl")[-1]
    fixed = read_lines(tmp_path / "frozen" / "eval.jsonl")[0]
    assert (moving["step"], fixed["step"]) == (3, 0)
    for key in ("jsd", "kl_forward", "entropy_teacher", "entropy_student", "num_tokens"):
        assert moving[key] == pytest.approx(fixed[key], rel=1e-4), key
    before = read_lines(tmp_path / "ema" / "eval.jsonl")[0]
    assert abs(before["entropy_teacher"] - moving["entropy_teacher"]) > 1e-4


@pytest.mark.parametrize(
    "world_size, tp, pp, ep, cp, teacher",
    [
        pytest.param(2, 2, 1, 2, 1, dict(teacher_ema=0.3), id="TP2 EP2"),
        pytest.param(
            4, 2, 2, 1, 1, dict(teacher_sync_steps=3), id="TP2 PP2", marks=pytest.mark.extended
        ),
        pytest.param(
            4, 2, 1, 4, 2, dict(teacher_ema=0.3), id="TP2 CP2 EP4", marks=pytest.mark.extended
        ),
        pytest.param(
            4, 1, 1, 4, 1, dict(teacher_sync_steps=3), id="DP4 EP4", marks=pytest.mark.extended
        ),
    ],
)
def test_a_resumed_run_is_bit_identical(
    folder, data, adapter, tmp_path, world_size, tp, pp, ep, cp, teacher
):
    """At dropout, with on-policy steps and evaluation; at another layout it is the same to
    rounding, and the teacher that it goes on from is the saved one, bit for bit.
    """
    flags = dict(
        lora_rank=3,
        lora_dropout=0.1,
        lmbda=0.5,
        max_completion_length=4,
        max_steps=4,
        val_dataset=data["plain"],
        eval_steps=2,
        **teacher,
    )
    whole, cut, other = tmp_path / "whole", tmp_path / "cut", tmp_path / "other"
    size = 8 * tp * pp * cp // world_size
    own = flags | layout_flags(tp, pp, ep, cp) | dict(per_device_train_batch_size=size)
    run_training(world_size, flags_of_run(folder, data, whole, **own))
    for copy in (cut, other):
        shutil.copytree(whole, copy)
        for step in (3, 4):
            shutil.rmtree(copy / f"checkpoint-{step}")
    resume = dict(resume_from_checkpoint=cut / "checkpoint-2")
    said = run_training(world_size, flags_of_run(folder, data, cut, **own, **resume))
    assert "at step 2 of 4" in said and "Note: teacher" not in said
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert stable(read_lines(whole / name)) == stable(read_lines(cut / name))
    for step in (3, 4):
        for of in (student_of, teacher_of):
            assert equal(of(whole, step), of(cut, step))

    # nothing updates: the teacher moves towards the student of step 2 alone
    slow = flags | dict(resume_from_checkpoint=other / "checkpoint-2", learning_rate=0, max_steps=3)
    run_training(1, flags_of_run(folder, data, other, **slow))
    student, before = student_of(whole, 2), teacher_of(whole, 2)
    assert equal(student_of(other, 3), student)
    rate = teacher.get("teacher_ema", 1.0)  # or a copy, after the third update
    for name, value in teacher_of(other, 3).items():
        assert torch.equal(value, torch.lerp(before[name], student[name], rate)), name


def test_a_new_stage_takes_the_teacher_along(folder, data, adapter, tmp_path):
    """Rank 3 goes on at rank 6: both compute what they did; a run without a teacher of this kind
    gives the next one none.
    """
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    flags = dict(val_dataset=data["dataset"], max_steps=1, teacher_ema=0.5)
    second = flags | dict(lora_rank=6, resume_from_checkpoint=one / "checkpoint-1")
    plain = flags | dict(teacher_ema=None, lora_rank=2)
    again = flags | dict(resume_from_checkpoint=three / "checkpoint-1", max_steps=2)
    said = run_training(
        1,
        flags_of_run(folder, data, one, **flags, adapter=adapter),
        flags_of_run(folder, data, two, **second),
        flags_of_run(folder, data, three, **plain),
        flags_of_run(folder, data, three, **again),
    )
    assert "New stage from" in said and "LoRA rank 3 -> 6" in said
    before, after = read_lines(one / "eval.jsonl")[-1], read_lines(two / "eval.jsonl")[0]
    for key in ("jsd", "entropy_student", "entropy_teacher"):
        assert after[key] == pytest.approx(before[key], rel=1e-5), key
    assert {v.shape[0] for k, v in teacher_of(two, 1).items() if ".lora_A." in k} == {6}

    assert not (three / "checkpoint-1" / "teacher").exists() and said.count("has no teacher/") == 1
    assert f"Note: {three}/checkpoint-1 has no teacher/" in said
    assert "this one's starts from the student" in said
    assert "Note: teacher_ema was None and is 0.5" in said


def test_peft_loads_the_teacher(folder, data, adapter, tmp_path):
    """The saved folder is a PEFT adapter of the student's settings, also with --save_only_model;
    one whose teacher was lost is not complete.
    """
    flags = dict(adapter=adapter, teacher_ema=0.5, max_steps=1)
    only, full = tmp_path / "only", tmp_path / "full"
    run_training(
        1,
        flags_of_run(folder, data, only, **flags, save_only_model=True),
        flags_of_run(folder, data, full, **flags),
    )
    assert equal(teacher_of(only, 1), teacher_of(full, 1))
    model, missing = load_peft(load_thinker(folder), str(only / "checkpoint-1" / "teacher"))
    assert not missing
    configs = [
        json.loads((only / "checkpoint-1" / name / "adapter_config.json").read_text())
        for name in ("", "teacher")
    ]
    assert configs[0] == configs[1]
    resume = flags | dict(adapter=None, resume_from_checkpoint=full / "checkpoint-1")
    shutil.rmtree(full / "checkpoint-1" / "teacher")
    with pytest.raises(RuntimeError, match="teacher/adapter_config.json is missing, which"):
        run_training(1, flags_of_run(folder, data, full, **resume))


def _with_a_bad_step(rank, world_size, *argument_lists):
    from megatron_gkd import optimizer, parallel, train

    train.destroy = parallel.parallel_state.destroy_model_parallel
    update, number = optimizer.Optimizer.step, [0]

    def step(own, learning_rate, loss):
        number[0] += 1
        return update(own, learning_rate, math.nan if number[0] == 2 else loss)

    optimizer.Optimizer.step = step
    for argv in argument_lists:
        number[0] = 0
        train.main(argv)


def test_a_stage_without_lora(folder, data, tmp_path):
    """LoRA in the second of two pipeline stages: the same run as on one rank, and resumed."""
    flags = dict(lora_layers="1", teacher_ema=0.3, max_steps=2)
    one, two = tmp_path / "one", tmp_path / "two"
    run_training(1, flags_of_run(folder, data, one, **flags))
    flags |= layout_flags(pp=2)
    run_training(
        2,
        flags_of_run(folder, data, two, **flags),
        flags_of_run(folder, data, two, **flags, resume_from_checkpoint=two / "checkpoint-1"),
    )
    for line, expected in zip(*(read_lines(run / "metrics.jsonl") for run in (two, one))):
        for key in ("loss", "grad_norm", "entropy_teacher"):
            assert line[key] == pytest.approx(expected[key], rel=1e-4), key
    expected = teacher_of(one, 2)
    for name, value in teacher_of(two, 2).items():
        assert torch.allclose(value, expected[name], atol=1e-3), name


def test_a_skipped_step_moves_nothing(folder, data, tmp_path):
    """Nor does it count among --teacher_sync_steps."""
    teachers = {"ema": dict(teacher_ema=0.5), "sync": dict(teacher_sync_steps=2)}
    runs = [flags_of_run(folder, data, tmp_path / name, **teachers[name]) for name in teachers]
    run_ranks(_with_a_bad_step, 1, *runs)
    for name in teachers:
        output = tmp_path / name
        skipped = [line["skipped_steps"] for line in read_lines(output / "metrics.jsonl")]
        assert skipped == [0, 1, 1] and not (output / "checkpoint-2").exists()
        before, after = teacher_of(output, 1), teacher_of(output, 3)
        student = student_of(output, 3)
        if name == "sync":
            assert equal(after, student) and not equal(before, student_of(output, 1))
        else:
            for key, value in after.items():
                assert torch.allclose(value, (before[key] + student[key]) / 2, atol=1e-7), key


def test_the_teacher_writes_with_its_newest_values(folder, data, adapter, tmp_path):
    """--seq_kd: the second step's responses are those of a run whose frozen teacher is the average
    as saved after the first, and not those of the first step.
    """
    flags = dict(
        seq_kd=True,
        rollout_temperature=0,
        repetition_penalty=1,
        max_completion_length=6,
        learning_rate=0.3,
    )
    moving, frozen = tmp_path / "moving", tmp_path / "frozen"
    first = moving / "checkpoint-1"
    run_training(
        2,
        *(
            flags_of_run(folder, data, output, **flags, **own, **layout_flags(tp=2, ep=2))
            for output, own in [
                (moving, dict(teacher_ema=0.9, adapter=adapter, max_steps=2)),
                (frozen, dict(teacher_adapter=first / "teacher", adapter=first, max_steps=1)),
            ]
        ),
    )
    start, second = read_lines(moving / "metrics.jsonl")
    (expected,) = read_lines(frozen / "metrics.jsonl")
    assert second["num_tokens"] == expected["num_tokens"]
    for key in ("jsd", "entropy_teacher", "entropy_student"):
        assert second[key] == pytest.approx(expected[key], rel=1e-4), key
    assert abs(start["entropy_teacher"] - second["entropy_teacher"]) > 1e-3


def _memory(rank, world_size, *argument_lists):
    return [_memory_of(argv, again=bool(n)) for n, argv in enumerate(argument_lists)]


def _memory_of(argv, again):
    """Of a built model and optimizer: bytes of its tensors, LoRA numbers of each slot, numbers of
    the experts' columns of one adapter, what the run's estimate says.
    """
    parts, config = build_parts(argv, again=again), parse_config(argv)
    modules = lora_modules(parts.model)
    grouped = [module for module in modules if isinstance(module, LoraGrouped)]
    downs = [layout.down for module in grouped for layout in module._layouts.values()]
    columns = [module.base.rows for module in grouped]
    tensors = [*parts.model.parameters(), *downs, *columns]
    tensors += [part for state in parts.optimizer.moments().values() for part in state.values()]
    tensors += [p.main_grad for p in parts.model.parameters() if hasattr(p, "main_grad")]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    slots = {
        slot: sum(p.numel() for m in modules if slot in m.slots for p in m.slots[slot].parameters())
        for slot in (STUDENT, TEACHER)
    }
    of_columns = [
        layout.size * (layout.down.shape[0] * layout.down.shape[2] + len(base) * base.shape[1])
        for module in grouped
        for slot, layout in module._layouts.items()
        if slot is module.slots[STUDENT]
        for base in [module.base.weight]
    ]
    has_room = all(module.base.rows.shape[2] - module.base.num_columns < 8 for module in grouped)
    always = estimate(parts.model_args, config.parallel, workload(config, parts.model_args)).always
    return sum(storages.values()), slots, sum(of_columns), has_room, sum(always.values())


def test_it_takes_one_more_slot_of_memory(folder, data, tmp_path):
    """4 bytes a number and the experts' columns, and nothing else; the estimate says the same."""
    flags = flags_of_run(folder, data, tmp_path, **layout_flags(tp=2, ep=2))
    without, more = run_ranks(_memory, 2, flags, [*flags, "--teacher_ema", "0.05"])[0]
    less, slots, columns, _, fewer = without
    assert slots[TEACHER] == 0
    assert more[1] == {STUDENT: slots[STUDENT], TEACHER: slots[STUDENT]} and more[2:4] == (
        columns,
        True,
    )
    assert more[0] - less == 4 * slots[STUDENT] + 4 * columns
    assert more[4] - fewer == pytest.approx(more[0] - less, rel=0.002)
    writes = [*flags, "--teacher_ema", "0.05", "--lmbda", "0.5"]
    for more, expected in [([], 2), (["--log_rollouts", "0"], 1), (["--seq_kd", "true"], 2)]:
        load = workload(parse_config(writes + more), read_model_args(folder))
        assert load.num_laid_out == expected


def test_what_could_learn_nothing_is_refused(folder, data, tmp_path):
    plain = dict(dataset=data["plain"], max_steps=3)
    for flags, what in [
        (dict(teacher_ema=0.05), "average of the student's LoRA (--teacher_ema 0.05)"),
        (dict(teacher_sync_steps=10), "copy of the student's LoRA (--teacher_sync_steps 10)"),
    ]:
        config = parse_config(flags_of_run(folder, data, tmp_path, **plain, **flags))
        with pytest.raises(ValueError, match="nothing to learn: the teacher is the") as error:
            check_trainable(config, load_datasets(config.data, folder, 503, 0)[0].report)
        assert what in str(error.value)
    ema = plain | dict(teacher_ema=0.05)
    said = run_training(
        1,
        flags_of_run(folder, data, tmp_path / "zero", **ema, allow_zero_signal=True),
        flags_of_run(folder, data, tmp_path / "sft", **ema, sft_alpha=0.1),
    )
    assert "  - Teacher model: base_model + average of the student's LoRA (--teacher_ema" in said
    for line in read_lines(tmp_path / "zero" / "metrics.jsonl"):
        assert line["jsd"] == 0 and line["grad_norm"] == 0
    lines = read_lines(tmp_path / "sft" / "metrics.jsonl")
    assert lines[0]["jsd"] == 0 and lines[1]["jsd"] > 0


@pytest.mark.parametrize(
    "flags, problem",
    [
        (dict(teacher_ema=0), "--teacher_ema 0.0: must be in (0, 1]; 0.05 is usual"),
        (dict(teacher_ema=1.5), "--teacher_ema 1.5: must be in (0, 1]"),
        (dict(teacher_sync_steps=0), "--teacher_sync_steps 0: must be 1 or more"),
        (dict(teacher_ema=0.1, teacher_sync_steps=2), "left out with --teacher_sync_steps"),
        (dict(teacher_ema=0.1, teacher_adapter="x"), "start both with --adapter"),
        (dict(teacher_start="base"), "without them the base alone is the teacher"),
    ],
)
def test_flags_that_do_not_go_together(flags, problem):
    with pytest.raises(ValueError) as error:
        parse_config(arguments(model="x", dataset="y", **flags))
    assert problem in str(error.value)


@pytest.mark.extended
def test_the_towers_lora_follows_too(tiny_folder, tmp_path):
    from tests.media_rows import write_rows as write_media_rows
    from tests.test_step_media import SIZES

    model = tiny_folder(**SIZES)
    dataset, _ = write_media_rows(tmp_path, model)
    flags = dict(dataset=dataset, lora_towers=True, teacher_ema=0.3, max_steps=2, lora_rank=2)
    run_training(
        2, flags_of_run(model, {"dataset": dataset}, tmp_path, **(flags | layout_flags(2)))
    )
    before, after, student = (
        teacher_of(tmp_path, 1),
        teacher_of(tmp_path, 2),
        student_of(tmp_path, 2),
    )
    towers = [name for name in after if "_tower." in name or ".visual." in name]
    assert len(towers) > 40
    for name, value in after.items():
        expected = 0.7 * before[name].double() + 0.3 * student[name].double()
        assert (value - expected).abs().max() < 1e-6, name
    assert any((after[name] - before[name]).abs().max() > 1e-4 for name in towers)


@pytest.mark.extended
def test_a_new_stage_whose_teacher_is_still_the_base(tiny_folder, tmp_path):
    """It is the base there too, on the towers as well, where the student has learned."""
    from tests.media_rows import write_rows as write_media_rows
    from tests.test_step_media import SIZES

    model = tiny_folder(**SIZES)
    dataset, _ = write_media_rows(tmp_path, model)
    flags = dict(dataset=dataset, lora_towers=True, teacher_sync_steps=9, max_steps=1, lora_rank=2)
    second = flags | dict(lora_rank=4, resume_from_checkpoint=tmp_path / "one" / "checkpoint-1")
    run_training(
        1,
        flags_of_run(model, {}, tmp_path / "one", **flags),
        flags_of_run(model, {}, tmp_path / "two", **second),
    )
    for name, value in teacher_of(tmp_path / "two", 1).items():
        assert ".lora_A." in name or not value.any(), name
