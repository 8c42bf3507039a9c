"""Checkpoints: what a run leaves, that going on from it is the run that was never stopped, and what
is said where it cannot be written or read.
"""

import json
import re
import resource
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_gkd import checkpoint, last_words
from megatron_gkd.checkpoint import checkpoints, find_checkpoint, note_latest
from megatron_gkd.checkpoint_manifest import MANIFEST
from tests.ranks import run_ranks
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

TENSORS, OPTIMIZER, STATE = (
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "trainer_state.json",
)


def write_data(tiny_folder, root: Path) -> dict[str, str]:
    """A model folder, rows to train on and rows to evaluate on, by flag."""
    train, evaluation = (
        write_rows(root / "train.jsonl", make_rows(20)),
        write_rows(root / "eval.jsonl", make_rows(5, seed=1)),
    )
    return dict(model=tiny_folder(**SMALL), dataset=train, val_dataset=evaluation)


@pytest.fixture(scope="module")
def data(tiny_folder, tmp_path_factory):
    return write_data(tiny_folder, tmp_path_factory.mktemp("data"))


def flags_of_run(data, output: Path, **flags) -> list[str]:
    """Six steps of 8 rows with all that is random: dropout, on-policy steps, accumulation; a
    checkpoint at step 3 and at the end.
    """
    settings = dict(
        lora_dropout=0.1,
        lmbda=0.5,
        max_completion_length=5,
        learning_rate=0.01,
        max_steps=6,
        save_steps=3,
        save_total_limit=9,
    )
    settings |= dict(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        eval_steps=2,
        output_dir=output,
    )
    return arguments(**(data | settings | flags))


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / TENSORS)


def assert_same_run(resumed: Path, whole: Path, last_step: int) -> None:
    """Bit-identical: all metrics but times and memory, the adapter, the optimizer's state and the
    counters.
    """
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert stable(read_lines(resumed / name)) == stable(read_lines(whole / name)), name
    for name in (TENSORS, OPTIMIZER):
        ours, theirs = (
            load_file(folder / f"checkpoint-{last_step}" / name) for folder in (resumed, whole)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    states = [
        json.loads((folder / f"checkpoint-{last_step}" / STATE).read_text())
        for folder in (resumed, whole)
    ]
    assert states[0] == states[1]


def stopped_after_three(whole: Path, copy: Path) -> Path:
    """The folder of a run as a kill after step 4 would have left it."""
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoint-6")
    note_latest(copy, copy / "checkpoint-3")
    return copy


@pytest.mark.parametrize(
    "world_size, tp, pp, ep, cp",
    [
        pytest.param(1, 1, 1, 1, 1, marks=pytest.mark.extended),
        pytest.param(2, 2, 1, 2, 1, marks=pytest.mark.smoke),
        pytest.param(4, 2, 2, 1, 1, marks=pytest.mark.extended),
        pytest.param(4, 1, 1, 4, 1, marks=pytest.mark.extended),
        (2, 1, 1, 2, 2),
    ],
)
def test_resumed_is_bit_identical(data, tmp_path, world_size, tp, pp, ep, cp):
    accumulation = 8 // 4 if world_size == tp * pp * cp else 1
    flags = layout_flags(tp, pp, ep, cp) | dict(
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4 if accumulation == 2 else 2,
        max_tokens_per_micro_batch=40,
    )
    run_training(world_size, flags_of_run(data, tmp_path / "whole", **flags))
    copy = stopped_after_three(tmp_path / "whole", tmp_path / "resumed")
    run_training(world_size, flags_of_run(data, copy, resume_from_checkpoint="latest", **flags))
    assert_same_run(copy, tmp_path / "whole", 6)
    assert {line["on_policy"] for line in read_lines(copy / "metrics.jsonl")[3:]} == {True, False}


def test_resumed_at_other_layouts(data, tmp_path):
    """A checkpoint knows no layout: the same global batch at another TP, PP, EP, CP or DP gives
    the same run to rounding.
    """
    targets = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,lm_head"
    flags = dict(lora_dropout=0, learning_rate=0.003, lora_target_modules=targets)
    run_training(2, flags_of_run(data, tmp_path / "whole", **flags, **layout_flags(tp=2, ep=2)))
    start, whole = (
        adapter_of(tmp_path / "whole" / "checkpoint-3"),
        adapter_of(tmp_path / "whole" / "checkpoint-6"),
    )
    layouts = [(1, 1, 1, 1, 1), (4, 1, 2, 2, 1), (4, 4, 1, 2, 1), (4, 2, 1, 2, 2)]
    for world_size, tp, pp, ep, cp in layouts:
        dp = world_size // tp // pp // cp
        copy = stopped_after_three(tmp_path / "whole", tmp_path / f"{tp}-{pp}-{ep}-{cp}")
        own = flags | layout_flags(tp, pp, ep, cp) | dict(per_device_train_batch_size=4 // dp)
        run_training(world_size, flags_of_run(data, copy, resume_from_checkpoint="latest", **own))
        lines = zip(
            read_lines(copy / "metrics.jsonl"),
            read_lines(tmp_path / "whole" / "metrics.jsonl"),
            strict=True,
        )
        for line, expected in lines:
            for key in (
                "loss",
                "jsd",
                "sft_loss",
                "grad_norm",
                "learning_rate",
                "num_tokens",
                "on_policy",
            ):
                assert line[key] == pytest.approx(expected[key], rel=1e-4), (
                    tp,
                    pp,
                    ep,
                    line["step"],
                    key,
                )
        for name, tensor in adapter_of(copy / "checkpoint-6").items():
            moved = (whole[name] - start[name]).norm()
            assert (tensor - whole[name]).norm() <= 1e-3 * max(moved, 0.01), name


def make_checkpoint(output: Path, step: int) -> Path:
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / TENSORS).write_bytes(b"")
    return folder


def test_a_folder_that_stepped_aside_comes_back(tmp_path):
    """A kill between the two renames of `_replace`."""
    make_checkpoint(tmp_path, 4).rename(tmp_path / ".checkpoint-4.old")
    (tmp_path / ".checkpoint-4.partial").mkdir()
    make_checkpoint(tmp_path, 8)
    shutil.copytree(tmp_path / "checkpoint-8", tmp_path / ".checkpoint-8.old")
    checkpoint._tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8"]


def test_which_is_the_latest(tmp_path):
    assert find_checkpoint("latest", tmp_path / "nothing") is None
    for step in (9, 10, 100):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-200").mkdir()  # without an adapter: not a checkpoint
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-100"
    note_latest(tmp_path, tmp_path / "checkpoint-10")
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-10"
    shutil.rmtree(tmp_path / "checkpoint-10")
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-100"
    note_latest(tmp_path, None)
    assert find_checkpoint("latest", tmp_path) is None
    assert find_checkpoint(str(tmp_path / "checkpoint-9"), tmp_path) == tmp_path / "checkpoint-9"
    with pytest.raises(FileNotFoundError, match="checkpoint-11: no adapter_model.safetensors"):
        find_checkpoint(str(tmp_path / "checkpoint-11"), tmp_path)


def test_limit_and_a_run_in_the_folder_of_another(data, tmp_path):
    """Only the newest are kept; checkpoints of an earlier, longer run neither crowd out this one's
    nor are taken for its latest.
    """
    for step in (50, 100):
        make_checkpoint(tmp_path, step)
    said = run_training(
        1, flags_of_run(data, tmp_path, save_steps=2, save_total_limit=2, max_steps=5, lmbda=0)
    )
    assert "an earlier run's checkpoints stay" in said and "(checkpoint-50, checkpoint-100)" in said
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 5, 50, 100]
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-5"
    said = run_training(
        1, flags_of_run(data, tmp_path, max_steps=5, lmbda=0, resume_from_checkpoint="latest")
    )
    assert (
        "checkpoint-5 at step 5 of 5" in said
        and "Nothing is left to do: the checkpoint is at step 5" in said
    )
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 5


def test_only_the_adapter(data, tmp_path):
    run_training(1, flags_of_run(data, tmp_path, save_only_model=True, max_steps=1))
    folder = tmp_path / "checkpoint-1"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        TENSORS,
        MANIFEST,
    ]
    with pytest.raises(RuntimeError, match="SystemExit") as error:
        run_training(1, flags_of_run(data, tmp_path, max_steps=2, resume_from_checkpoint=folder))
    assert (
        f"holds only the adapter (--save_only_model); start from it with --adapter {folder}"
        in str(error.value)
    )
    run_training(1, flags_of_run(data, tmp_path / "next", max_steps=1, adapter=folder))


def test_files_that_are_missing_or_wrong(data, tmp_path):
    run_training(1, flags_of_run(data, tmp_path, max_steps=1))
    folder = tmp_path / "checkpoint-1"

    def damaged(name: str, text: str | None) -> Path:
        copy = tmp_path / f"{name} {text}" / "checkpoint-1"
        shutil.copytree(folder, copy)
        (copy / MANIFEST).unlink()  # as a checkpoint of an earlier version
        if text is None:
            (copy / name).unlink()
        else:
            (copy / name).write_text(text)
        return copy

    for name, expected in [
        (damaged(OPTIMIZER, None), f"{OPTIMIZER} is missing"),
        (damaged(OPTIMIZER, "torn"), f"{OPTIMIZER}: not a complete safetensors file"),
        (damaged(STATE, "{"), f"{STATE}: damaged"),
        (damaged(STATE, "{}"), f"{STATE}: lacks lora, loss_scale, num_updates, step;"),
        (tmp_path / "checkpoint-7", "expected a checkpoint-STEP folder, or latest"),
    ]:
        with pytest.raises(RuntimeError, match="SystemExit") as error:
            run_training(
                1, flags_of_run(data, tmp_path / "next", max_steps=2, resume_from_checkpoint=name)
            )
        assert expected in str(error.value)


@pytest.mark.parametrize("world_size, tp, ep", [(1, 1, 1), (2, 2, 2)])
def test_second_stage_at_a_higher_rank(data, tmp_path, world_size, tp, ep):
    """Rank 4 goes on at rank 16: the same function at first, a fresh optimizer and schedule."""
    flags = layout_flags(tp=tp, ep=ep) | dict(lmbda=0)
    run_training(
        world_size, flags_of_run(data, tmp_path / "one", lora_rank=4, lora_alpha=12, **flags)
    )
    second = flags | dict(
        lora_rank=16, resume_from_checkpoint=tmp_path / "one" / "checkpoint-6", learning_rate=0.005
    )
    said = run_training(world_size, flags_of_run(data, tmp_path / "two", **second))
    assert (
        "LoRA rank 4 -> 16, alpha 12 -> 48" in said
        and "the optimizer starts anew at step 0" in said
    )
    before, after = (
        read_lines(tmp_path / "one" / "eval.jsonl")[-1],
        read_lines(tmp_path / "two" / "eval.jsonl")[0],
    )
    assert (before["step"], after["step"]) == (6, 0)
    for key in ("loss", "jsd", "sft_loss", "entropy_student"):
        assert after[key] == pytest.approx(before[key], rel=1e-5), key
    assert [line["step"] for line in read_lines(tmp_path / "two" / "metrics.jsonl")] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    config = json.loads((tmp_path / "two" / "checkpoint-6" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 48)
    assert json.loads((tmp_path / "two" / "checkpoint-6" / STATE).read_text())["num_updates"] == 6


@pytest.mark.parametrize(
    "targets, rank, alpha",
    [("down_proj", 4, 8), ("q_proj,v_proj,lm_head", 49, 1), ("k_proj,gate_proj", 3, 0.1)],
)
def test_resume_needs_no_lora_flags(data, tmp_path, targets, rank, alpha):
    """Rank, alpha and linears come from the checkpoint, zeros that only PEFT wanted and an alpha
    that rounds included.
    """
    flags = dict(lmbda=0, max_steps=4, save_steps=2)
    run_training(
        1,
        flags_of_run(
            data,
            tmp_path / "whole",
            lora_target_modules=targets,
            lora_rank=rank,
            lora_alpha=alpha,
            **flags,
        ),
    )
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    run_training(
        1,
        flags_of_run(
            data,
            tmp_path / "resumed",
            resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2",
            **flags,
        ),
    )
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", 4)


def test_other_settings_than_before_are_said(data, tmp_path):
    """Also of a checkpoint of an earlier version, which knows nothing of settings that came later:
    these are no change where they are left alone.
    """
    run_training(1, flags_of_run(data, tmp_path, max_steps=1, lmbda=0))
    path = tmp_path / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    for name in ("skip_first_tokens", "token_weight", "teacher_start", "loss_top_k", "columns"):
        del state["settings"][name]
    del state["teacher"], state["lora"]["use_rslora"]
    path.write_text(json.dumps(state))
    (path.parent / MANIFEST).unlink()
    flags = dict(
        lmbda=0, max_steps=2, learning_rate=0.02, max_bad_steps=3, dataset=data["val_dataset"]
    )
    flags |= dict(allow_changed_inputs="true")
    said = run_training(1, flags_of_run(data, tmp_path, resume_from_checkpoint="latest", **flags))
    notes = [
        line.split(":")[1] for line in said.splitlines() if "the resumed run will differ" in line
    ]
    names = [note.split()[0] for note in notes]
    assert sorted(names) == ["dataset", "learning_rate", "total_steps"]
    assert " learning_rate was 0.01 and is 0.02" in notes
    assert any(note.startswith(" dataset had 20 rows and has 5, the first") for note in notes)


def _full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def _overwritten(*args, write=checkpoint.write_share, **kwargs):
    """As where another machine took the whole page behind the header for its own."""
    written = write(*args, **kwargs)
    path = next(path for path in written if path.name == "optimizer.safetensors")
    first = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    with open(path, "r+b") as file:
        file.seek(first)
        file.write(b"\xff" * 64)
    return written


def _train_where(rank, world_size, argv, name, replacement):
    from megatron_gkd import parallel, train

    train.destroy = parallel.parallel_state.destroy_model_parallel
    setattr(checkpoint, name, replacement)
    try:
        train.main(argv)
    except SystemExit as error:
        return error.code, str(error.__cause__)


@pytest.mark.parametrize(
    "name, replacement, why",
    [
        pytest.param(
            "create_files",
            _full,
            r"rank 0 cannot .*\[Errno 28\] No space left on device",
            id="full",
        ),
        pytest.param(
            *("write_share", _overwritten),
            r"rank 0 cannot write its part of .*optimizer.*loses writes of several machines",
            id="overwritten",
        ),
    ],
)
def test_a_failed_save_leaves_nothing_half_written(data, tmp_path, name, replacement, why):
    flags = flags_of_run(data, tmp_path, max_steps=1, lmbda=0)
    ((code, error),) = run_ranks(_train_where, 1, flags, name, replacement)
    assert code == 2 and re.match(why, error)
    assert not list(tmp_path.glob("*checkpoint-1*"))


def test_an_output_folder_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RuntimeError, match="SystemExit") as error:
        run_training(1, flags_of_run(data, tmp_path / "file", max_steps=1))
    assert f"--output_dir {tmp_path / 'file'}, rank 0: it is a file" in str(error.value)


def _with_small_files(write_share, *args, **kwargs):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        return write_share(*args, **kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _without_layout(write_share, *args, **kwargs):
    *before, _, optimizer = args
    return write_share(*before, None, optimizer, **kwargs)


def _save_where_one_rank_cannot(rank, world_size, argv, write):
    from megatron_gkd import parallel, train

    train.destroy = parallel.parallel_state.destroy_model_parallel
    last_words.SECONDS_FOR_RANK_0 = 0
    if rank == 1:
        checkpoint.write_share = partial(write, checkpoint.write_share)
    try:
        train.main(argv)
    except SystemExit as error:
        return str(error.__cause__)
    except AttributeError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "write, why",
    [
        (_with_small_files, "[Errno 27] File too large"),
        (_without_layout, "AttributeError: 'NoneType' object has no attribute 'tp_rank'"),
    ],
)
def test_what_one_rank_cannot_write_is_said_by_all(data, tmp_path, write, why):
    """Also what is a mistake of the code, which its own rank raises as it is."""
    argv = flags_of_run(data, tmp_path, max_steps=1, lmbda=0, **layout_flags(tp=2))
    first, second = run_ranks(_save_where_one_rank_cannot, 2, argv, write)
    assert re.fullmatch(f"rank 1 cannot write its part of .*: {re.escape(why)}.*", first)
    assert second == (why if "Attribute" in why else first)
    assert not list(tmp_path.glob("*checkpoint-1*"))
