"""--report_to: what TensorBoard, wandb and swanlab get of a run, without a network, and what is
refused.
"""

import socket
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_gkd import trackers
from megatron_gkd.config import parse_config
from megatron_gkd.run_folder import MetricsWriter
from megatron_gkd.trackers import check_installed, open_trackers


def log_run(folder: Path, names: list[str], steps=(1, 2), start_step: int = 0) -> None:
    found = open_trackers(names, str(folder), start_step, {"train": {"seed": 42}})
    writer = MetricsWriter(str(folder), total_steps=2, start_step=start_step, trackers=found)
    for step in steps:
        writer.log_train({"step": step, "loss": 0.5 / step, "by_source": {"a": {"jsd": 0.25}}})
    writer.log_eval({"step": steps[-1], "jsd": 0.125, "loss": float("nan")})
    writer.close()


def written(folder: Path, ending: str) -> bytes:
    """What lies in the files with this ending, all of them."""
    files = sorted(folder.rglob(f"*{ending}"))
    assert files, f"no file *{ending} below {folder}"
    return b"".join(file.read_bytes() for file in files)


def test_tensorboard_without_the_steps_that_were_undone(tmp_path):
    log_run(tmp_path, ["tensorboard"], steps=range(1, 8))
    time.sleep(1.05 - time.time() % 1)  # the second is what the files are in order of
    log_run(tmp_path, ["tensorboard"], steps=(5, 6), start_step=4)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    losses = board.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in losses] == pytest.approx([0.5 / step for step in range(1, 7)])
    assert [event.step for event in board.Scalars("eval/jsd")] == [6]


@pytest.fixture
def no_network(monkeypatch):
    """Any connection but one to this machine itself is an error."""
    connect = socket.socket.connect

    def refuse(self, address):
        local = not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost")
        assert local, f"a connection to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_tensorboard_and_none(tmp_path):
    log_run(tmp_path / "board", ["tensorboard"])
    board = EventAccumulator(str(tmp_path / "board" / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("train/loss")] == [0.5, 0.25]
    assert [event.value for event in board.Scalars("train/by_source/a/jsd")] == [0.25, 0.25]
    assert [event.value for event in board.Scalars("eval/jsd")] == [0.125]
    assert "eval/loss" not in board.Tags()["scalars"]  # not a number
    log_run(tmp_path / "none", ["none"])
    assert {path.name for path in (tmp_path / "none").iterdir()} == {
        "metrics.jsonl",
        "eval.jsonl",
        "rollouts.jsonl",
    }


def test_wandb_offline(tmp_path, monkeypatch, no_network):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_run(tmp_path, ["wandb"])
    log_run(tmp_path, ["wandb"], steps=(2,), start_step=1)  # resumed: another run of the group
    wandb.teardown()  # its service process writes a run's last bytes after finish() has returned
    # Runs that began within one second are not in the order of their folders' names.
    found = [written(run, ".wandb") for run in (tmp_path / "wandb").glob("offline-run-*")]
    assert sorted(f"{tmp_path.name} from step 1".encode() in run for run in found) == [False, True]
    for run in found:
        for word in ("train/loss", "train/by_source/a/jsd", "eval/jsd", "megatron_gkd"):
            assert word.encode() in run
        assert tmp_path.name.encode() in run


def test_swanlab_offline(tmp_path, monkeypatch, no_network):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    log_run(tmp_path, ["swanlab"])
    (run,) = (tmp_path / "swanlog").glob("run-*")
    found = written(run, ".swanlab")
    for word in ("train/loss", "train/by_source/a/jsd", "eval/jsd"):
        assert word.encode() in found
    assert "seed" in (run / "files" / "config.yaml").read_text()


def test_a_missing_package_is_said_before_anything_else(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"--report_to swanlab: .*pip install 'megatron_gkd\[swanlab\]'"
    ):
        check_installed(["tensorboard", "swanlab"])
    check_installed(["tensorboard", "none"])


def test_a_tracker_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("no API key")

    monkeypatch.setattr(trackers, "WeightsAndBiases", refuse)
    with pytest.raises(ValueError, match="--report_to wandb: RuntimeError: no API key; WANDB_MODE"):
        open_trackers(["tensorboard", "wandb"], str(tmp_path), 0, {})


def test_the_flag():
    required = ["--model", "m", "--dataset", "d"]
    assert parse_config(required).run.report_to == ["tensorboard"]
    argv = [*required, "--report_to", "wandb", "swanlab"]
    assert parse_config(argv).run.report_to == ["wandb", "swanlab"]
    for words, reason in {
        ("none", "wandb"): "none alone",
        ("mlflow",): "invalid choice: 'mlflow'",
    }.items():
        with pytest.raises(ValueError, match=reason):
            parse_config([*required, "--report_to", *words])
    with pytest.raises(ValueError, match="the nearest is --report_to"):
        parse_config([*required, "--tensorboard", "false"])
