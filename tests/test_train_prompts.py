"""Prompts alone: runs that write every response themselves, mixed files, evaluation, and what is
refused.
"""

import re

import numpy
import pytest

from megatron_gkd.config import parse_config
from megatron_gkd.data import load_datasets
from megatron_gkd.data.order import StepRows
from megatron_gkd.model.args import read_model_args
from megatron_gkd.run import draw
from megatron_gkd.zero_signal import check_responses
from tests.reference_step import reference_step
from tests.test_train import error_of_run, flags_of_run, write_data
from tests.test_train_rollout import GREEDY, written_rows
from tests.train_runs import layout_flags, read_lines, run_training, stable, write_rows


@pytest.fixture(scope="module")
def data(tiny_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    found = write_data(tiny_folder, root)
    alone, half = [without_response(row) for row in found["rows"]], found["rows"][:]
    half[1::2] = alone[1::2]
    return found | dict(
        alone=write_rows(root / "alone.jsonl", alone),
        half=write_rows(root / "half.jsonl", half),
        questions=write_rows(
            root / "questions.jsonl", [without_response(row) for row in found["evaluation"]]
        ),
    )


def without_response(row: dict) -> dict:
    """The row as a prompt alone."""
    start = next(index for index, label in enumerate(row["labels"]) if label != -100)
    return row | {"input_ids": row["input_ids"][:start], "labels": None}


def test_prompts_alone_train_as_the_same_rows_with_responses(data, tmp_path):
    """The student, or the teacher, writes every response: those of the data change nothing."""
    flags = dict(max_steps=None, num_train_epochs=1.1, per_device_train_batch_size=3)
    flags |= dict(max_completion_length=4, learning_rate=0.02)
    writers = {"student": dict(lmbda=1), "teacher": dict(seq_kd=True)}
    runs = {
        (writer, rows): flags_of_run(
            data, tmp_path / writer / rows, **flags | own | dict(dataset=data[rows])
        )
        for writer, own in writers.items()
        for rows in ("dataset", "alone")
    }
    said = run_training(2, *runs.values())
    assert said.count("8 without a response") == 2
    for writer in writers:
        with_responses, alone = (
            stable(read_lines(tmp_path / writer / rows / "metrics.jsonl"))
            for rows in ("dataset", "alone")
        )
        assert len(alone) == 2 and alone == with_responses


def test_conversations_and_alpaca_rows_without_a_response(data, tmp_path):
    """As with a response that nothing reads; the prompt is what the template makes of it."""
    turns, answer = [{"role": "user", "content": "the sky"}], {"role": "assistant", "content": "x"}
    hint = dict(teacher_prompt="the sky is blue")
    alone = [
        dict(messages=turns, **hint),
        dict(messages=[*turns, answer | {"content": ""}], **hint),
        dict(messages=turns, teacher_messages=[{"role": "user", "content": "the sky is blue"}]),
        dict(instruction="the sky", **hint),
    ]
    files = {
        "alone": write_rows(tmp_path / "alone.jsonl", alone),
        "answered": write_rows(
            tmp_path / "answered.jsonl", [dict(messages=[*turns, answer], **hint)] * 4
        ),
    }
    flags = dict(lmbda=1, max_steps=2, per_device_train_batch_size=4, max_completion_length=4)
    run_training(
        1,
        *[
            flags_of_run(data, tmp_path / name, **flags | dict(dataset=path))
            for name, path in files.items()
        ],
    )
    lines = [stable(read_lines(tmp_path / name / "metrics.jsonl")) for name in files]
    assert lines[0] == lines[1] and lines[0][0]["jsd"] > 0


def test_mixed_rows_at_other_layouts_and_resumed(data, tmp_path):
    """Steps that learn from the data's responses have rows with one alone, as the reference says;
    the order does not depend on ranks and where the run began.
    """
    flags = dict(max_steps=6, lmbda=0.5, dataset=data["half"], learning_rate=0.02, save_steps=3)
    flags |= dict(GREEDY)
    whole = flags | dict(per_device_train_batch_size=4)
    said = run_training(1, flags_of_run(data, tmp_path / "whole", **whole))
    assert "4 of 8 rows have no response: they serve steps whose responses the run writes" in said
    expected = read_lines(tmp_path / "whole" / "metrics.jsonl")
    order = StepRows(
        numpy.array([index % 2 == 0 for index in range(8)]),
        lambda step: draw(42, step) >= 0.5,
        4,
        42,
    )
    own = [line for line in expected if not line["on_policy"]]
    assert 0 < len(own) < 6
    for line in own:
        rows = [data["rows"][index] for index in order(line["step"] - 1)]
        assert line["num_tokens"] == sum(
            sum(label != -100 for label in row["labels"][1:]) for row in rows
        )
    layout = layout_flags(tp=2, ep=2) | dict(per_device_train_batch_size=2)
    argv = flags_of_run(data, tmp_path / "parts", **flags | layout)
    run_training(4, argv)
    parts = tmp_path / "parts" / "metrics.jsonl"
    for line, other in zip(expected, read_lines(parts), strict=True):
        assert other["num_tokens"] == line["num_tokens"]
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-3)
    before = stable(read_lines(parts))
    run_training(4, [*argv, "--resume_from_checkpoint", str(tmp_path / "parts" / "checkpoint-3")])
    assert stable(read_lines(parts)) == before


@pytest.mark.parametrize(
    "world_size, tp, pp, ep, cp",
    [(1, 1, 1, 1, 1), (4, 2, 1, 4, 1)]
    + [
        pytest.param(*layout, marks=pytest.mark.extended)
        for layout in [(4, 1, 2, 2, 1), (4, 1, 1, 4, 2), (2, 2, 1, 1, 1), (8, 2, 2, 2, 1)]
    ],
)
def test_evaluation_of_prompts_alone_is_the_reference(data, tmp_path, world_size, tp, pp, ep, cp):
    """On the greedy responses of the reference model, beside rows that have a response; 5 rows do
    not divide into the ranks, and training draws its own responses.
    """
    answered = written_rows(data | {"rows": data["evaluation"]}, False)
    flags = GREEDY | dict(rollout_temperature=1, adapter=data["adapter"], max_steps=1, lmbda=0)
    flags |= dict(per_device_train_batch_size=1, per_device_eval_batch_size=1, max_length=40)
    flags |= layout_flags(tp, pp, ep, cp)
    runs = {"both": [data["questions"], data["val_dataset"]]}
    if world_size == 1:
        runs["alone"] = [data["questions"]]
    said = run_training(
        world_size,
        *[
            [*flags_of_run(data, tmp_path / name, **flags), "--val_dataset", *paths]
            for name, paths in runs.items()
        ],
    )
    assert "Evaluation: 5 of 10 rows have no response" in said
    for name in runs:
        rows = answered + (data["evaluation"] if name == "both" else [])
        expected = reference_step(data["model"], data["adapter"], rows)
        line = read_lines(tmp_path / name / "eval.jsonl")[0]
        assert line["step"] == 0 and line["num_tokens"] == expected["num_tokens"]
        for key in ("jsd", "sft_loss", "kl_reverse"):
            assert line[key] == pytest.approx(expected[key], rel=1e-4), (name, key)


def test_what_is_said_of_mixed_rows(data, tmp_path):
    """Whether there are steps that learn from the data's own responses."""
    for flags, ending in (
        (dict(lmbda=1), "4 of 8 rows have no response; the run writes every response"),
        (dict(lmbda=0, seq_kd=True), "; the run writes every response"),
        (dict(lmbda=0.5), "; steps that learn from the data's own draw from the other 4"),
    ):
        flags = flags | dict(dataset=data["half"], max_steps=2, prepared_rows="none")
        config = parse_config(flags_of_run(data, tmp_path / "out", **flags))
        vocab_size = read_model_args(config.model.model).vocab_size
        train, _ = load_datasets(config.data, config.model.model, vocab_size, 0)
        assert check_responses(config, train).endswith(ending)


def test_what_is_refused(data, tmp_path):
    """The row and the flag are named; a mixed file whose steps never write lists its rows."""
    cases = {
        r"alone.jsonl:1 has no response, .* with --lmbda 0:1,1:0.5 .* set --lmbda 1": dict(
            lmbda="0:1,1:0.5"
        ),
        r"alone.jsonl:1 has no .* --sft_alpha 0.3 is cross-entropy .*: leave it out": dict(
            lmbda=1, sft_alpha=0.3
        ),
        r"4 of 8 data rows .*\n  .*half.jsonl:2: no response, and no step of the run writes": dict(
            lmbda=0, dataset=data["half"]
        ),
    }
    for expected, flags in cases.items():
        flags = dict(dataset=data["alone"]) | flags
        message = error_of_run(1, flags_of_run(data, tmp_path / "out", **flags))
        assert re.search(expected, message), message
    flags = dict(lmbda=0, dataset=data["half"], skip_bad_rows=True, max_steps=1)
    said = run_training(1, flags_of_run(data, tmp_path / "out", **flags))
    assert "Data: 4 rows" in said and "4 bad rows skipped" in said
