"""What asks a run to stop: before the first step it ends the run at once, afterwards the run learns
of it; a second Ctrl-C and the death of the launcher also reach one that waits for others.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_gkd import stop_requests as module
from megatron_gkd.child_processes import STOP_SIGNALS
from megatron_gkd.stop_requests import LAUNCHER_DIED, launcher, stop_requests
from tests.test_child_processes import assert_they_end, in_a_fork, is_alive, status_of, wait_for

REPOSITORY = Path(__file__).parents[1]


def wait_for_others(folder):
    """As in a collective: in C++, where the interpreter hears of no signal."""
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    (folder / "waits").touch()
    store.get("of a rank that does not come")


def test_a_request_is_noted_and_the_handlers_come_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    for number in STOP_SIGNALS:
        with stop_requests() as requests:
            requests.save_first()
            assert requests.number == 0
            os.kill(os.getpid(), number)
            assert requests.number == number
            if number == signal.SIGTERM:
                os.kill(os.getpid(), signal.SIGHUP)
                assert requests.number == number  # the first one
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_an_error_that_a_request_turns_into_is_the_request(capfd):
    """As libraries do whose pool is torn down by it; an error without one stays."""
    with pytest.raises(SystemExit) as end, stop_requests():
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            raise TimeoutError
    assert end.value.code == 128 + signal.SIGHUP
    signal.alarm(0)
    assert capfd.readouterr().err == "megatron_gkd: SIGHUP: ended before the first step\n"
    with pytest.raises(TimeoutError), stop_requests():
        raise TimeoutError


def test_what_a_process_was_started_to_ignore_stays_ignored():
    """nohup"""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_ends_at_once(tmp_path, capfd):
    """Even in a collective. One that comes twice, from a terminal and from what passes it on, is
    one.
    """

    def run():
        with stop_requests() as requests:
            requests.save_first()
            wait_for_others(tmp_path)

    process = in_a_fork(run)
    wait_for((tmp_path / "waits").exists)
    for _ in range(3):
        os.kill(process, signal.SIGINT)
    time.sleep(1.5 * module.SECONDS_OF_ONE_REQUEST)
    assert is_alive(process)
    os.kill(process, signal.SIGINT)
    assert status_of(process) == 128 + signal.SIGINT
    assert capfd.readouterr().err.splitlines() == [
        "megatron_gkd: SIGINT: the run ends after this step and saves; a second Ctrl-C ends it at "
        "once",
        "megatron_gkd: SIGINT: a second request: ended at once, without saving",
    ]


def test_a_start_that_waits_for_others_ends(tmp_path, capfd, monkeypatch):
    """There is no step to finish."""
    monkeypatch.setattr(module, "SECONDS_TO_HEAR", 0.5)

    def run():
        with stop_requests():
            wait_for_others(tmp_path)

    process = in_a_fork(run)
    wait_for((tmp_path / "waits").exists)
    os.kill(process, signal.SIGTERM)
    assert status_of(process) == 128 + signal.SIGTERM
    assert capfd.readouterr().err == "megatron_gkd: SIGTERM: ended before the first step\n"


def test_a_start_has_time_to_clean_up(tmp_path, monkeypatch):
    """When it has heard of the request; but not for ever."""
    monkeypatch.setattr(module, "SECONDS_TO_HEAR", 0.1)
    monkeypatch.setattr(module, "SECONDS_TO_END", 1.0)

    def run():
        with stop_requests():
            try:
                (tmp_path / "begun").touch()
                signal.pause()
            finally:
                time.sleep(0.5)
                (tmp_path / "clean").touch()
                wait_for_others(tmp_path)

    process = in_a_fork(run)
    wait_for((tmp_path / "begun").exists)
    os.kill(process, signal.SIGINT)
    assert status_of(process) == 128 + signal.SIGINT
    assert (tmp_path / "clean").exists()


def orphan(tmp_path, monkeypatch, saves, waits):
    """A process that torchrun has started, when torchrun has been killed: it has written down its
    number, and what has asked it to stop.
    """
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")

    def run():
        with stop_requests(launcher()) as requests:
            if saves:
                requests.save_first()
            (tmp_path / "number").write_text(str(os.getpid()))
            if waits:
                wait_for_others(tmp_path)
            (tmp_path / "begun").touch()
            while not requests.number:
                time.sleep(0.01)
            (tmp_path / "request").write_text(str(requests.number))

    def run_launcher():
        in_a_fork(run)
        time.sleep(3600)

    process = in_a_fork(run_launcher)
    wait_for((tmp_path / ("waits" if waits else "begun")).exists)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert_they_end([int((tmp_path / "number").read_text())])


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("saves", [False, True])
def test_the_death_of_the_launcher(tmp_path, capfd, monkeypatch, saves, waits):
    """It is a request; a rank that cannot answer it in the time that torchrun would give ends."""
    monkeypatch.setattr(module, "SECONDS_TO_HEAR", 1.0)
    orphan(tmp_path, monkeypatch, saves, waits)
    said = capfd.readouterr().err.splitlines()
    what = "the run ends after this step and saves" if saves else "the run ends"
    assert said[0] == f"megatron_gkd: the launcher died: {what}"
    assert (tmp_path / "request").exists() == (saves and not waits)
    if saves and not waits:
        assert (tmp_path / "request").read_text() == str(LAUNCHER_DIED) and len(said) == 1
    else:
        late = "the step was not done in time: ended without saving"
        assert said[1:] == [
            f"megatron_gkd: the launcher died: {late if saves else 'ended before the first step'}"
        ]


def test_a_shell_may_end_before_what_it_started(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launcher() is None


EARLY = """
import os, signal
from megatron_gkd.stop_requests import end_at_once_on_signals
end_at_once_on_signals()
os.kill(os.getpid(), signal.{})
raise ValueError("this far")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_while_a_program_is_imported(name):
    """Nothing slow is imported before it is heard."""
    command = [sys.executable, "-X", "importtime", "-c", EARLY.format(name)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 128 + signal.Signals[name]
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert said == [f"megatron_gkd: {name}: ended"]
    assert not any(name in done.stderr for name in (" torch\n", " transformers\n", " numpy\n"))
