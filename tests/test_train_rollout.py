"""Responses that a run writes: which steps are on-policy, and the numbers of rows whose responses
the reference model wrote.
"""

import json
from pathlib import Path

import pytest
import torch

from megatron_gkd.run import draw
from tests.reference_step import load_model, read_adapter, reference_step
from tests.test_train import flags_of_run, write_data
from tests.train_runs import layout_flags, read_lines, run_training

GREEDY = dict(rollout_temperature=0, repetition_penalty=1, max_completion_length=6)


@pytest.fixture(scope="module")
def data(tiny_folder, tmp_path_factory):
    return write_data(tiny_folder, tmp_path_factory.mktemp("train"))


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
    said = run_training(
        2,
        *[
            flags_of_run(data, tmp_path / name, lmbda=lmbda, **flags)
            for name, lmbda in cases.items()
        ],
    )
    note = "not drawn from the student's own distribution"
    assert said.count(note) == 3  # once a run, and not where nothing is written
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
            assert ("rollout_logprob_gap" in line) == line["on_policy"]
            if line["on_policy"]:
                assert line["loss"] == pytest.approx(line["jsd"], rel=1e-6)
            else:
                assert line["loss"] == pytest.approx(
                    0.5 * line["jsd"] + 0.5 * line["sft_loss"], rel=1e-6
                )


def written_rows(data, teacher_writes: bool, rows_of: str = "rows") -> list[dict]:
    """The training rows (or those of another entry of `data`) with greedy responses of the
    reference model.
    """
    model, (adapter, scale) = load_model(data["model"]), read_adapter(data["adapter"])
    stops = json.loads(Path(data["model"], "generation_config.json").read_text())["eos_token_id"]
    rows = []
    with torch.no_grad():
        weights = None if teacher_writes else model.with_lora(adapter, scale)
        for row in data[rows_of]:
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
    layouts = [(1, 1, 1, 1, 1), (4, 2, 1, 4, 1), (4, 2, 2, 2, 1)]
    # ranks that share the rows: alone, and with experts over all of them
    layouts += [(2, 1, 1, 1, 2), (4, 1, 1, 4, 2)]
    for world_size, tp, pp, ep, cp in layouts:
        own = (
            flags
            | GREEDY
            | layout_flags(tp, pp, ep, cp)
            | dict(per_device_train_batch_size=8 * tp * pp * cp // world_size, sft_alpha=0.4)
        )
        output = tmp_path / f"{tp}{pp}{cp}"
        run_training(
            world_size,
            flags_of_run(data, output, adapter=data["adapter"], max_steps=1, **own),
        )
        (line,) = read_lines(output / "metrics.jsonl")
        assert line["loss"] == pytest.approx(line["jsd"], rel=1e-6)
        for key in ("jsd", "sft_loss", "num_tokens", "kl_reverse"):
            assert line[key] == pytest.approx(expected[key], rel=1e-4), (key, tp, pp)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert line["on_policy"] is (writer == "student")
        if writer == "student":
            assert line["rollout_logprob_gap"] < 1e-5
        else:
            assert "rollout_logprob_gap" not in line
        assert line["truncated_responses"] >= 8 * (line["num_tokens"] == 48)


def test_samples_of_a_prompt_are_rows_of_the_step(data, tmp_path):
    """Two greedy responses to each prompt: the numbers of the reference for every row twice. Drawn
    ones, in two steps: of each the log-probabilities that its own tokens have.
    """
    rows = [row for row in written_rows(data, False) for _ in range(2)]
    expected = reference_step(data["model"], data["adapter"], rows)
    for world_size, tp, pp, ep in [(1, 1, 1, 1), (4, 2, 1, 4)]:
        sizes = dict(
            per_device_train_batch_size=4 * tp * pp // world_size,
            gradient_accumulation_steps=2,
            max_tokens_per_micro_batch=60,
            **layout_flags(tp, pp, ep),
        )
        own = dict(adapter=data["adapter"], lmbda=1, num_generations=2, learning_rate=0.02) | sizes
        greedy, drawn = tmp_path / f"greedy{tp}", tmp_path / f"drawn{tp}"
        said = run_training(
            world_size,
            flags_of_run(data, greedy, max_steps=1, **GREEDY, **own),
            flags_of_run(data, drawn, max_steps=2, max_completion_length=6, **own),
        )
        assert said.count(", each with 2 responses where the run writes them, in micro-") == 2
        assert said.count("Note: the 2 responses to a prompt (--num_generations) are all the") == 1
        (line,) = read_lines(greedy / "metrics.jsonl")
        assert line["num_tokens"] == expected["num_tokens"]
        for key in ("jsd", "sft_loss", "kl_reverse", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=1e-4), (key, tp)
        lines = read_lines(drawn / "metrics.jsonl")
        assert len(lines) == 2
        for line in lines:
            assert line["rollout_logprob_gap"] < 1e-5
            assert 16 * 6 >= line["num_tokens"] >= 6 * line["truncated_responses"] > 8 * 6
            assert line["response_length"] == line["num_tokens"] / 16


def test_log_probabilities_of_the_rollout_are_those_of_the_training_pass(data, tmp_path):
    """While the weights move, and only in on-policy steps; with dropout they are not. So is what
    --importance_clip makes of them.
    """
    flags = dict(
        max_steps=5,
        lmbda="0:1,2:0,3:1",
        learning_rate=0.02,
        lr_scheduler_type="constant",
        max_completion_length=20,
        importance_clip=1.02,
    )
    for world_size, tp, pp, ep in [(1, 1, 1, 1), (2, 2, 1, 2), (4, 1, 2, 2)]:
        dp = world_size // tp // pp
        flags |= layout_flags(tp, pp, ep) | dict(per_device_train_batch_size=8 // dp)
        folders = {dropout: tmp_path / f"{tp}{pp}{ep}{dropout}" for dropout in (0, 0.5)}
        run_training(
            world_size,
            *[
                flags_of_run(data, folder, lora_dropout=dropout, **flags)
                for dropout, folder in folders.items()
            ],
        )
        without, with_dropout = (
            [line.get("rollout_logprob_gap") for line in read_lines(folder / "metrics.jsonl")]
            for folder in folders.values()
        )
        for gaps in (without, with_dropout):
            assert [gap is None for gap in gaps] == [False, False, True, False, False]
            gaps.remove(None)
        assert max(without) < 1e-5
        assert with_dropout[0] < 1e-5  # W_up is zero
        assert min(with_dropout[1:]) > 100 * max(without)
        for dropout, folder in folders.items():
            for line in read_lines(folder / "metrics.jsonl"):
                assert ("importance_ratio" in line) == line["on_policy"]
                if not line["on_policy"]:
                    assert line["loss"] == pytest.approx(line["jsd"], rel=1e-6)
                elif dropout and line["step"] > 1:
                    assert 0 < line["importance_clipped"] < 1 and line["loss"] < line["jsd"]
                else:
                    assert line["importance_ratio"] == pytest.approx(1, abs=1e-4)
                    assert line["importance_clipped"] == 0
                    assert line["loss"] == pytest.approx(line["jsd"], rel=1e-4)
