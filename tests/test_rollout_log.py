"""rollouts.jsonl: what student and teacher answer at evaluations, responses of on-policy steps,
which runs keep them, and a run that is resumed.
"""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_gkd.data.order import SAMPLED, permutation
from megatron_gkd.rollout_log import readable
from tests.test_train import flags_of_run, write_data
from tests.test_train_rollout import GREEDY, written_rows
from tests.train_runs import layout_flags, read_lines, run_training, stable


@pytest.fixture(scope="module")
def data(tiny_folder, tmp_path_factory):
    return write_data(tiny_folder, tmp_path_factory.mktemp("train"))


def texts(data, rows: list[dict]) -> list[str]:
    """Their responses, as the folder's tokenizer decodes them."""
    tokenizer = AutoTokenizer.from_pretrained(data["model"])
    stops = json.loads(Path(data["model"], "generation_config.json").read_text())["eos_token_id"]
    responses = []
    for row in rows:
        ids = [label for label in row["labels"] if label != -100]
        responses.append(readable(ids, tokenizer.decode, stops))
    return responses


@pytest.mark.parametrize(
    "world_size, tp, pp, ep, cp",
    [
        (4, 2, 1, 4, 1),
        pytest.param(1, 1, 1, 1, 1, marks=pytest.mark.extended),
        pytest.param(2, 1, 1, 1, 1, marks=pytest.mark.extended),
        pytest.param(4, 2, 2, 2, 1, marks=pytest.mark.extended),
        pytest.param(4, 1, 1, 4, 2, marks=pytest.mark.extended),
    ],
)
def test_samples_are_those_of_the_reference(data, tmp_path, world_size, tp, pp, ep, cp):
    """Before the first step: greedy answers of the reference model to three evaluation rows, with
    LoRA and without; in the first step, whose weights are those of the adapter, its answers to
    training rows.
    """
    flags = dict(adapter=data["adapter"], lmbda=1, max_steps=1, log_rollouts=3, **GREEDY)
    flags |= dict(val_dataset=data["val_dataset"], learning_rate=0.5, warmup_ratio=0)
    flags |= layout_flags(tp, pp, ep, cp)
    flags |= dict(per_device_train_batch_size=8 * tp * pp * cp // world_size)
    run_training(world_size, flags_of_run(data, tmp_path, **flags))
    lines = read_lines(tmp_path / "rollouts.jsonl")
    chosen = sorted(permutation(5, 42, SAMPLED)[:3].tolist())
    asked = [
        (when, step, author)
        for when, step, author in [
            ("eval", 0, "student"),
            ("eval", 0, "teacher"),
            ("train", 1, "student"),
            ("eval", 1, "student"),
            ("eval", 1, "teacher"),
        ]
        for _ in range(3)
    ]
    assert [(line["when"], line["step"], line["author"]) for line in lines] == asked
    of_student, of_teacher = (
        texts(data, written_rows(data, teacher_writes, "evaluation"))
        for teacher_writes in (False, True)
    )
    for found, expected in ((lines[:3], of_student), (lines[3:6], of_teacher)):
        assert [line["row"] for line in found] == chosen
        assert [line["response"] for line in found] == [expected[row] for row in chosen]
        for line in found:
            assert line["location"] == f"{data['val_dataset']}:{line['row'] + 1}"
            assert line["data_response"] and line["prompt"]
    of_steps = texts(data, written_rows(data, False))
    assert [line["response"] for line in lines[6:9]] == [of_steps[at["row"]] for at in lines[6:9]]
    assert [line["prompt"] for line in lines[:3]] != [line["prompt"] for line in lines[3:6]]
    # the step has changed the student and not the teacher
    after = [[line["response"] for line in lines[at : at + 3]] for at in (0, 9, 3, 12)]
    assert after[0] != after[1] and after[2] == after[3]


def test_which_runs_keep_samples(data, tmp_path):
    """By default those that write responses; others where they are asked to. Nothing else changes:
    with samples or without, the numbers are the same to the last bit.
    """
    flags = dict(val_dataset=data["val_dataset"], lora_dropout=0.1, eval_steps=1, max_steps=2)
    flags |= dict(learning_rate=0.05, max_completion_length=4)
    runs = {
        "off-policy": dict(),
        "asked": dict(log_rollouts=2),
        "on-policy": dict(lmbda=1),
        "none": dict(lmbda=1, log_rollouts=0),
    }
    run_training(
        1, *[flags_of_run(data, tmp_path / run, **flags | own) for run, own in runs.items()]
    )
    lines = {run: read_lines(tmp_path / run / "rollouts.jsonl") for run in runs}
    assert {run: len(found) for run, found in lines.items()} == {
        "off-policy": 0,
        "asked": 3 * 2 * 2,
        "on-policy": 3 * 2 * 4 + 2 * 4,
        "none": 0,
    }
    for one, other in (("off-policy", "asked"), ("on-policy", "none")):
        for name in ("metrics.jsonl", "eval.jsonl"):
            first, second = (stable(read_lines(tmp_path / run / name)) for run in (one, other))
            assert first == second


def test_the_longest_responses_are_not_the_ones_that_are_shown(data, tmp_path):
    """One response to each prompt comes before the second ones, in the order of the data, though
    micro-batches of so few tokens begin with the longest.
    """
    flags = dict(lmbda=1, num_generations=2, log_rollouts=6, max_steps=1, val_dataset=None)
    flags |= dict(max_completion_length=24, top_k=0, top_p=1, repetition_penalty=1)
    flags |= dict(rollout_temperature=3, max_tokens_per_micro_batch=60)
    flags |= dict(per_device_train_batch_size=4)
    run_training(1, flags_of_run(data, tmp_path, **flags))
    lines = read_lines(tmp_path / "rollouts.jsonl")
    rows = [line["row"] for line in lines]
    assert len(set(rows[:4])) == 4 and rows[4:] == rows[:2]
    lengths = [len(line["response"]) for line in lines]
    assert lengths != sorted(lengths, reverse=True)


def test_a_resumed_run_keeps_the_lines_of_one_that_never_stopped(data, tmp_path):
    flags = dict(val_dataset=data["val_dataset"], eval_steps=2, save_steps=2, max_steps=4)
    flags |= dict(lmbda=1, max_completion_length=4, learning_rate=0.05)
    argv = flags_of_run(data, tmp_path, **flags)
    run_training(1, argv)
    whole = (tmp_path / "rollouts.jsonl").read_bytes()
    assert len(whole.splitlines()) == 4 * 4 + 3 * 2 * 4
    run_training(1, [*argv, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2")])
    assert (tmp_path / "rollouts.jsonl").read_bytes() == whole


def test_text_to_be_read():
    """A stop id at the end goes, thousands of placeholders become a number."""
    words = {1: "a", 2: "<pad>", 3: "<end>"}

    def decode(ids):
        return "".join(words[token] for token in ids)

    assert readable([1, 1, 2, 1, 3], decode, [3]) == "aa<pad>a"
    assert readable([1, *[2] * 1200, 1, 3, 1], decode, [3]) == "a<pad>×1,200a<end>a"
    assert readable([3], decode, [3]) == readable([], decode, [3]) == ""
