"""The run folder's files: lines that round-trip, truncation on resume, TensorBoard, run.json, the
progress line.
"""

import io
import json
import math
import os
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch

from megatron_gkd import run_folder
from megatron_gkd.run_folder import (
    MetricsWriter,
    package_versions,
    was_begun_by_this_job,
    write_atomically,
    write_run_json,
)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(folder, steps, start_step=0, **options):
    writer = MetricsWriter(str(folder), total_steps=10, start_step=start_step, **options)
    for step in steps:
        writer.log_train(
            {
                "step": step,
                "loss": 1 / (3 * step),
                "on_policy": step % 2 == 0,
                "num_tokens": 7 * step,
            }
        )
        if step % 2 == 0:
            writer.log_eval({"step": step, "jsd": 0.1 / step})
    writer.close()


def test_lines_round_trip_and_are_flushed_at_once(tmp_path):
    writer = MetricsWriter(str(tmp_path), total_steps=3)
    values = {
        "step": 1,
        "loss": 0.1 + 0.2,
        "grad_norm": 1e-300,
        "on_policy": True,
        "num_tokens": 2**40,
    }
    writer.log_train(values)
    assert read(tmp_path / "metrics.jsonl") == [values]
    writer.log_train({"step": 2, "loss": math.nan, "grad_norm": math.inf})
    writer.close()
    assert read(tmp_path / "metrics.jsonl")[1] == {"step": 2, "loss": None, "grad_norm": None}
    assert (tmp_path / "eval.jsonl").read_text() == ""


def test_resumed_files_are_those_of_a_run_that_never_stopped(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(whole, range(1, 11))
    run(stopped, range(1, 8))
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # a kill in the middle of a line
    run(stopped, range(5, 11), start_step=4)
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    assert [line["step"] for line in read(stopped / "eval.jsonl")] == [2, 4, 6, 8, 10]
    assert not [name for name in os.listdir(stopped) if name.endswith(".tmp")]


def test_texts_are_kept_as_they_are(tmp_path):
    """Readable, one object a line, also with what other programs take for the end of a line."""
    lines = [
        {"step": step, "response": "莱茵河\u2028\x85\n|\x00", "location": "half \udc80"}
        for step in (1, 2, 3)
    ]
    for start_step in (0, 2):
        writer = MetricsWriter(str(tmp_path), total_steps=3, start_step=start_step)
        writer.log_rollouts(lines[start_step:2] or lines[2:])
        writer.log_rollouts([])
        writer.close()
    text = (tmp_path / "rollouts.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.split("\n")[:-1]] == lines
    assert text.count("莱茵河") == 3


def test_a_fresh_run_moves_the_files_of_an_earlier_one_aside(tmp_path, capsys):
    for last in (5, 4, 3):
        run(tmp_path, range(1, last))
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [line["step"] for line in read(tmp_path / "metrics.2.jsonl")] == [1, 2, 3]
    assert [line["step"] for line in read(tmp_path / "metrics.1.jsonl")] == [1, 2, 3, 4]
    assert [line["step"] for line in read(tmp_path / "eval.1.jsonl")] == [2, 4]
    said = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("An earlier run")
    ]
    assert len(said) == 2
    assert said[0].endswith(
        "its lines are now in "
        + ", ".join(str(tmp_path / f"{name}.1.jsonl") for name in ("metrics", "eval", "rollouts"))
    )


def test_a_foreign_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        MetricsWriter(str(tmp_path), total_steps=3, start_step=3)
    assert "not json" in (tmp_path / "metrics.jsonl").read_text()


def test_other_ranks_write_nothing(tmp_path, capsys):
    run(tmp_path / "out", range(1, 5), enabled=False)
    assert not (tmp_path / "out").exists() and capsys.readouterr().out == ""


def test_one_line_a_logged_step_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 20.0])
    of_its_own = SimpleNamespace(monotonic=lambda: next(clock))  # other threads ask for the time
    monkeypatch.setattr(run_folder, "time", of_its_own)
    writer = MetricsWriter(str(tmp_path), total_steps=50, start_step=10)
    writer.log_train(
        {
            "step": 20,
            "loss": 0.25,
            "learning_rate": 1e-5,
            "tokens_per_second": 1234.4,
            "peak_memory_gib": 3.14159,
        }
    )
    writer.log_eval({"step": 20, "jsd": 0.125, "token_accuracy": None})
    writer.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 20/50  loss 0.2500  lr 1.00e-05  1234 tokens/s  3.14 GiB  01:00 left",
        "eval after step 20  jsd 0.125",
    ]


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(run_folder.sys, "stdout", Terminal())
    writer = MetricsWriter(str(tmp_path), total_steps=4, start_step=1)
    writer.log_train({"step": 4, "loss": 0.5, "tokens_per_second": 10.0, "peak_memory_gib": 1.0})
    writer.close()
    shown = run_folder.sys.stdout.getvalue()
    assert "4/4" in shown and "loss 0.5000  10 tokens/s  1.00 GiB" in shown


def test_run_json(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    parts = {
        "config": {"model": {"model": "模型"}},
        "versions": package_versions(),
        "parameters": {"trainable": 150_994_944},
        "layout": {"world_size": 8},
        "hardware": {"device": "GPU"},
    }
    write_run_json(str(tmp_path / "out"), *parts.values())
    written = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert datetime.fromisoformat(written.pop("started")).tzinfo is not None
    assert written == parts | {"job": "job"}
    assert parts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


@pytest.mark.parametrize(
    "job, now, restarts, goes_on",
    [
        ("a", "a", "0", True),  # the machines of an elastic job have become others
        ("a", "b", "0", False),
        ("a", "b", "2", False),  # it failed before it had begun: the folder is an older job's
        ("none", "none", "0", False),  # torchrun's name of all jobs that have no other
        ("none", "none", "1", True),
        (None, None, "0", False),  # without torchrun
        ("a", None, "0", False),
    ],
)
def test_whether_torchrun_has_started_a_run_again(
    tmp_path, monkeypatch, job, now, restarts, goes_on
):
    assert not was_begun_by_this_job(str(tmp_path))
    for name, values in (("RUN_ID", (job, now)), ("RESTART_COUNT", ("0", restarts))):
        for value in values:
            monkeypatch.delenv(f"TORCHELASTIC_{name}", raising=False)
            if value is not None:
                monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
            if name == "RUN_ID" and value is job and not (tmp_path / "run.json").exists():
                write_run_json(str(tmp_path), {}, {}, {}, {}, {})
    assert was_begun_by_this_job(str(tmp_path)) == goes_on


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
