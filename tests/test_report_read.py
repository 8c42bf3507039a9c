"""Runs' folders as they are found: still going, killed, resumed, without an evaluation, damaged."""

import json
import subprocess
import sys
from datetime import datetime

import pytest

from megatron_gkd.report.markdown import make_markdown
from megatron_gkd.report.page import make_page
from megatron_gkd.report.read import column, read_run, read_runs
from megatron_gkd.report.samples import MOST_ANSWERS, samples_of
from megatron_gkd.report.summary import differing_settings, entries, phase_times
from tests.report_runs import metrics_line, rollout_line, write_lines, write_run


def test_a_complete_run(tmp_path):
    record = read_run(write_run(tmp_path / "run"))
    assert record.notes == [] and record.last_step == 60 and record.name == "run"
    (entry,) = entries([record])
    assert entry.started == "27 Nov 2026, 10:30" and entry.state == "complete: 60 steps"
    assert entry.configuration == [
        "Qwen3-Omni-30B-A3B-Instruct",
        "LoRA r 16, α 32",
        "jsd β 0.5, T 2, λ 0.5",
        "lr 1e-5 cosine, batch 32",
    ]
    assert entry.data == ["train.jsonl", "1 epoch"]
    assert entry.hardware == ["8 × NVIDIA H100 80GB HBM3", "TP 8 EP 8"]
    assert entry.memory_gib == 36.5 and entry.tokens_per_second == 5000
    # of steps 2 to 60 every third is on-policy
    assert entry.step_seconds == pytest.approx((20 * 11 + 39 * 4) / 59)
    assert entry.final_loss == pytest.approx(
        sum(metrics_line(step, 60)["loss"] for step in range(51, 61)) / 10
    )
    assert (entry.first_jsd, entry.last_jsd) == (0.45, pytest.approx(0.45 * 2.718281828**-3))
    assert entry.remarks == ["20 responses cut at their limit in logged steps"]
    times = {times.kind: times for times in phase_times(record)}
    assert times["on-policy steps"].seconds == [0.25, 7, 1, 2.5, 0.25]
    assert times["steps on data"].total == 4 and times["steps on data"].num_steps == 39
    record.description["config"]["distill"]["seq_kd"] = True
    kinds = [times.kind for times in phase_times(record)]
    assert kinds == ["steps on the teacher's text", "on-policy steps"]


def test_the_configuration_names_teacher_and_options(tmp_path):
    folder = write_run(tmp_path / "run")
    description = json.loads((folder / "run.json").read_text())
    description["config"]["distill"] |= dict(
        teacher_ema=0.05, loss_top_k=20, token_weight="entropy", skip_first_tokens=0, sft_alpha=0.3
    )
    description["config"]["lora"] |= dict(use_rslora=True, lora_layers=["last 4"])
    (folder / "run.json").write_text(json.dumps(description))
    assert entries([read_run(folder)])[0].configuration[1:4] == [
        "LoRA r 16, α 32, rsLoRA, layers last 4",
        "teacher EMA 0.05",
        "jsd β 0.5, T 2, λ 0.5, top K 20, weight entropy, SFT 0.3",
    ]


def test_settings_that_came_later_are_no_difference(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("before", "now")]
    description = json.loads((runs[1] / "run.json").read_text())
    description["config"]["distill"] |= dict(skip_first_tokens=0, token_weight="none", loss_top_k=9)
    (runs[1] / "run.json").write_text(json.dumps(description))
    found = differing_settings([read_run(folder) for folder in runs])
    assert [name for name, _ in found] == ["loss_top_k"]


def test_a_run_that_is_still_being_written(tmp_path):
    folder = write_run(tmp_path / "run", max_steps=500)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "lo')
    record = read_run(folder)
    assert record.notes == ["metrics.jsonl: the last line is incomplete and left out"]
    assert len(record.metrics) == 60
    assert entries([record])[0].state.startswith("at step 60 of 500, last written ")


def test_lines_that_a_resumed_run_wrote_again(tmp_path):
    """The later ones count, those after the step that it went on from are gone."""
    folder = write_run(tmp_path / "run")
    again = [metrics_line(step, 60, loss=9.0) for step in range(41, 51)]
    lines = [metrics_line(step, 60) for step in range(1, 61)] + again
    write_lines(folder / "metrics.jsonl", lines)
    answers = [
        rollout_line(step, "train", "student", str(n)) for n, step in enumerate((5, 5, 9, 5))
    ]
    write_lines(folder / "rollouts.jsonl", answers)
    record = read_run(folder)
    steps, losses = column(record.metrics, "loss")
    assert steps == list(range(1, 51)) and losses[40:] == [9.0] * 10 and losses[39] != 9.0
    assert [line["response"] for line in record.rollouts] == ["0", "1", "3"]
    assert "metrics.jsonl: 20 lines were written again by a resumed run; the later count" in (
        record.notes
    )


def test_what_is_missing_or_damaged_is_named(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    good = [json.dumps(metrics_line(step, 9)) for step in range(1, 4)]
    bad = ["not json", "[1]", '{"loss": 1}', '{"step": "4"}', '{"step": true}', '{"step": -1}']
    good[1] = good[1].replace('"loss": ', '"loss": NaN, "was": ')
    (folder / "metrics.jsonl").write_bytes(
        "\n".join([good[0], *bad, *good[1:], ""]).encode() + b"\xff"
    )
    (folder / "metrics.1.jsonl").write_text("")
    (folder / "run.json").write_text("{")
    record = read_run(folder)
    assert column(record.metrics, "loss")[1][1] is None and len(record.metrics) == 3
    notes = "\n".join(record.notes)
    for words in (
        "metrics.jsonl: the last line is incomplete",
        "metrics.jsonl: not a line of this file and left out: lines 2, 3, 4, 5, 6 and 1 more",
        "eval.jsonl is missing: no evaluation was made",
        "rollouts.jsonl is missing: no responses were kept (--log_rollouts)",
        "run.json cannot be read",
        "metrics.1.jsonl: of earlier runs in this folder, not shown",
    ):
        assert words in notes
    (entry,) = entries([record])
    assert entry.configuration == ["not known: no run.json"] and entry.last_jsd is None
    assert "the loss was not finite at step 2" in entry.remarks


def test_a_run_before_its_first_step(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "eval.jsonl", "rollouts.jsonl"):
        (folder / name).write_text("")
    record = read_run(folder)
    assert record.last_step == 0 and "metrics.jsonl is empty: no step was logged" in record.notes
    (entry,) = entries([record])
    assert entry.step_seconds is None and entry.final_loss is None and entry.memory_gib is None


def test_folders_that_are_no_runs(tmp_path):
    write_run(tmp_path / "below")
    with pytest.raises(ValueError, match=r"no metrics\.jsonl; runs below it: below"):
        read_runs([str(tmp_path)])
    with pytest.raises(ValueError, match="is no folder"):
        read_runs([str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="give each run once"):
        read_runs([str(tmp_path / "below"), str(tmp_path / "." / "below")])


def test_names_and_what_changed_between_runs(tmp_path):
    folders = [
        write_run(tmp_path / "a" / "run"),
        write_run(tmp_path / "b" / "run", learning_rate=1e-4),
        write_run(tmp_path / "other", learning_rate=1e-4),
    ]
    records = read_runs(list(map(str, folders)))
    assert [record.name for record in records] == ["a/run", "b/run", "other"]
    assert differing_settings(records) == [("learning_rate", [1e-5, 1e-4, 1e-4])]
    first, second, third = entries(records)
    assert first.changes == []
    assert second.changes[0] == "learning_rate 1e-5 → 0.0001"
    # time and memory are the same, and nothing is said of them
    assert third.changes == ["the same settings", "divergence 0.0224 → 0.0224"]
    # of one run: what is not the default
    assert ("temperature", [2.0, 2.0]) not in differing_settings(records[:1])
    assert ("lora_rank", [16, None]) in differing_settings(records[:1])


def test_a_recipe_is_part_of_the_configuration(tmp_path):
    record = read_run(write_run(tmp_path / "run", recipe="opsd"))
    assert entries([record])[0].configuration[0] == "Qwen3-Omni-30B-A3B-Instruct, recipe opsd"


def test_remarks_of_a_person(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "remarks.txt").write_text("warm-up too short\n")
    assert entries([read_run(folder)])[0].remarks[0] == "warm-up too short"


def test_samples_side_by_side(tmp_path):
    found = samples_of(read_run(write_run(tmp_path / "run")))
    (question,) = found.questions
    assert [answer.title for answer in question.fixed] == ["Data", "Teacher"]
    # two evaluations each gave the same answer
    assert [answer.title for answer in question.answers] == [
        "Student, steps 0 to 15",
        "Student, steps 30 to 45",
        "Student, step 60",
    ]
    assert question.where == "train.jsonl:4"
    assert [one.where for one in found.from_training][0] == "step 60, train.jsonl:4"


def test_of_many_evaluations_some_answers_are_shown(tmp_path):
    """The first, the last and some from in between; what is left out is counted."""
    folder = write_run(tmp_path / "run")
    lines = [rollout_line(step, "eval", "student", f"answer {step}") for step in range(200)]
    write_lines(folder / "rollouts.jsonl", lines)
    (question,) = samples_of(read_run(folder)).questions
    shown = [answer.text for answer in question.answers]
    assert shown[0] == "answer 0" and shown[-1] == "answer 199"
    assert len(set(shown)) == len(shown) == MOST_ANSWERS and question.left_out == 188
    assert "10 in between; 188 more are in rollouts.jsonl" in make_page(
        [read_run(folder)], datetime(2026, 11, 27)
    )


def test_long_settings_and_many_files_are_shortened(tmp_path):
    """On the page and in the table, but two that begin alike are not the same."""
    runs = [write_run(tmp_path / name) for name in "ab"]
    for run, ending in zip(runs, ("yes", "no")):
        path = run / "run.json"
        description = json.loads(path.read_text())
        description["config"]["data"]["system"] = 100 * "Be kind. " + ending
        description["config"]["data"]["dataset"] = [f"/data/{n}.jsonl" for n in range(40)]
        path.write_text(json.dumps(description))
    records = [read_run(run) for run in runs]
    assert [name for name, _ in differing_settings(records)] == ["system"]
    entry = entries(records)[0]
    assert entry.data == ["0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl", "and 36 more", "1 epoch"]
    for text in (
        make_markdown(records, datetime(2026, 11, 27)),
        make_page(records[:1], datetime(2026, 11, 27)),
    ):
        assert "… (90" in text and 20 * "Be kind. " not in text


def test_steps_without_tokens_are_not_bad_ones(tmp_path):
    folder = write_run(tmp_path / "run", steps=6)
    nothing = dict(loss=None, jsd=None, num_tokens=0)
    without = {2: nothing, 3: nothing | dict(response_length=None), 5: dict(loss=None)}
    lines = [metrics_line(step, 6, **without.get(step, {})) for step in range(1, 7)]
    write_lines(folder / "metrics.jsonl", lines)
    remarks = entries([read_run(folder)])[0].remarks
    assert "no token carried a loss at step 2" in remarks
    assert "the loss was not finite at steps 3, 5" in remarks  # step 3: not for its rollout


def test_nothing_slow_is_imported():
    slow = ("torch", "transformers", "numpy", "matplotlib", "megatron.core")
    code = (
        f"import sys, megatron_gkd.report.__main__; print([m for m in {slow} if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
