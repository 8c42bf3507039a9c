"""`python -m megatron_gkd.launch`: what it prints and returns, whom it starts again."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from megatron_gkd import launch, machines, network
from megatron_gkd.machines import Failure, Machines, start_timeout
from tests.ports import free_port
from tests.ranks import _context

RANK = """
import os, signal, sys, time
from pathlib import Path
from megatron_gkd.flags import exit_with
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
attempt = len(list(folder.glob(f"{rank}.*")))
(folder / f"{rank}.{attempt}").touch()
def refuse():
    exit_with(ValueError("--flag 3: must be 4"))
"""
REFUSED = "megatron_gkd: error (rank 1, on "


def _launch(argv, log):
    os.setpgid(0, 0)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    from megatron_gkd import launch

    os._exit(launch.main(argv))


class Launch:
    """A launcher whose ranks run `code`, after RANK."""

    def __init__(self, folder: Path, code: str, *flags: str, more=()):
        folder.mkdir(exist_ok=True)
        (folder / "rank.py").write_text(RANK + code)
        self.log, self.folder = folder / "log", folder
        argv = [*flags, str(folder / "rank.py"), str(folder), *more]
        self.process = _context.Process(target=_launch, args=(argv, str(self.log)), daemon=True)
        self.process.start()

    def end(self) -> tuple[int | None, str]:
        self.process.join(60)
        found = self.process.exitcode
        self.process.kill()
        return found, self.log.read_text()

    def starts(self, rank: int) -> int:
        return len(list(self.folder.glob(f"{rank}.[0-9]*")))


TWO = ("--standalone", "--nproc_per_node", "2")
AGAIN = (*TWO, "--max_restarts", "1")


@pytest.mark.parametrize(
    "code, status, last, starts",
    [
        ("if rank == 1: refuse()\ntime.sleep(30)", 2, "): --flag 3: must be 4", 1),
        ("refuse()", 2, "megatron_gkd: error: --flag 3: must be 4", 1),
        (
            "if attempt == 0: exit_with(OSError('Stale file handle'))",
            *(0, None, 2),
        ),
        (
            "if rank == 1: os.kill(os.getpid(), signal.SIGSEGV)\ntime.sleep(0.5); os.abort()",
            *(139, "rank 1 (on ", 2),
        ),
        (
            "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\nif attempt < 1: time.sleep(30)",
            137,
            "was ended by SIGKILL (too little memory? the system's log tells). All ranks end",
            2,
        ),
        ("if rank == 1: 1 / 0\ntime.sleep(30)", 1, ") ended with status 1, see above", 2),
        ("sys.exit(0 if attempt == 1 else 75)", 0, None, 2),
        ("sys.exit(128 + signal.SIGTERM)", 143, None, 1),
    ],
    ids=[
        "one refuses",
        "all refuse",
        "file system",
        "cascade",
        "killed",
        "traceback",
        "started again",
        "stopped",
    ],
)
def test_one_line_and_the_exit_status(tmp_path, code, status, last, starts):
    """What was refused or asked to stop is not started again."""
    run = Launch(tmp_path, code, *AGAIN)
    found, said = run.end()
    assert found == status, said
    assert "torch.distributed.elastic" not in said and "ChildFailedError" not in said
    lines = said.splitlines()
    again = [line for line in lines if "started again, 1 of 1 restarts were left" in line]
    assert len(again) == starts - 1
    said_last = [line for line in lines if "megatron_gkd: " in line and line not in again]
    assert len(said_last) == (last is not None), said
    if last is not None:
        assert last in lines[-1] and lines[-1].startswith("megatron_gkd: error")
    assert max(run.starts(0), run.starts(1)) == starts


def test_a_signal_reaches_the_ranks(tmp_path):
    code = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
(folder / f"ready{rank}").touch()
time.sleep(60)
"""
    run = Launch(tmp_path, code, *TWO)
    until = time.monotonic() + 40
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert time.monotonic() < until, run.log.read_text()
        time.sleep(0.05)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.end() == (143, "")


def pair(tmp_path, codes, *flags):
    port = str(free_port())
    where = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
    return [
        Launch(
            tmp_path / str(rank),
            code,
            *(*where, "--master_port", port, "--node_rank", str(rank)),
            more=flags,
        )
        for rank, code in enumerate(codes)
        if code is not None
    ]


def test_a_machine_that_fails_ends_the_other(tmp_path):
    """Which is in the middle of something, and says the same line."""
    runs = pair(tmp_path, ["time.sleep(60)", "refuse()"])
    begun = time.monotonic()
    (status, said), (other, line) = (run.end() for run in runs)
    assert (status, other) == (2, 2), said + line
    assert said.splitlines()[-1] == line.splitlines()[-1] and REFUSED in line
    assert time.monotonic() - begun < 30  # not torchrun's exit barrier, of 300


def test_the_first_machine_tells_before_its_store_is_gone(tmp_path):
    runs = pair(tmp_path, ["refuse()", "time.sleep(60)"])
    ends = [run.end() for run in runs]
    assert [status for status, _ in ends] == [2, 2], ends
    assert all("megatron_gkd: error: --flag 3: must be 4" in said for _, said in ends)


def test_a_machine_that_stops_leaves_the_other_time_to_save(tmp_path):
    """Ranks agree on a stop; the others may still write."""
    late = "time.sleep(4); (folder / 'saved').touch(); sys.exit(143)"
    runs = pair(tmp_path, [late, "sys.exit(143)"])
    assert [run.end()[0] for run in runs] == [143, 143]
    assert (tmp_path / "0" / "saved").exists()


@pytest.mark.parametrize("absent, whom", [(1, "machine 1 did"), (0, "nothing answers at 127.")])
def test_a_machine_that_does_not_come_is_named(tmp_path, absent, whom):
    codes: list[str | None] = ["", ""]
    codes[absent] = None
    (run,) = pair(tmp_path, codes, "--start_timeout", "2")
    status, said = run.end()
    assert status == 2 and whom in said.splitlines()[-1] and "--start_timeout" in said, said
    assert "waiting for " in said and "of 2 s (--start_timeout)" in said


def test_an_elastic_job_needs_a_name(capsys):
    """By which it knows that it was started before (run_folder.was_begun_by_this_job)."""
    with pytest.raises(SystemExit) as ended:
        launch.main(["--nnodes", "1:2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "h:1", "x.py"])
    assert ended.value.code == 2 and "name the job with --rdzv_id" in capsys.readouterr().err


def test_start_timeout_of_the_command():
    assert start_timeout(["-m", "x", "--start_timeout", "7"]) == 7
    assert start_timeout(["--start_timeout=8.5", "--other"]) == 8.5
    assert start_timeout(["--start_timeout", "many"]) == start_timeout([]) == 120


def test_the_card_that_reaches_the_first_machine(monkeypatch, capfd):
    for name in machines.INTERFACES:
        monkeypatch.delenv(name, raising=False)
    assert network.interface_of("127.0.0.1") == "lo" and network.interface_of("192.0.2.1") is None
    assert network.own_address("127.0.0.1", 9) == "127.0.0.1"
    assert machines._conclude([{"first": "127.0.1.1"}, {"first": "10.0.0.1"}, {"first": ""}]) == {
        "first": "10.0.0.1"
    }
    for first in ("", "localhost"):  # all machines are this one
        machines.choose_interface(first, 9)
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is as before afterwards
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(machines, "is_loopback", lambda ip: False)
    machines.choose_interface("127.0.0.1", 9)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo" and os.environ["NCCL_SOCKET_IFNAME"] == "ib0"
    assert "uses the network card lo (GLOO_SOCKET_IFNAME)" in capfd.readouterr().err


def test_what_fails_first_is_what_all_say():
    port = free_port()
    both = [None, None]

    def begin(rank):
        both[rank] = Machines("127.0.0.1", port, rank, 2, 10)

    threads = [threading.Thread(target=begin, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = both
    failure = Failure(3, "the reason", " (rank 1)")
    assert second.end(failure) == failure
    until = time.monotonic() + 10
    while first.failure is None and time.monotonic() < until:
        time.sleep(0.05)
    assert first.end(Failure(75, "it was lost", "")) == failure
    assert first.end(None) == failure
