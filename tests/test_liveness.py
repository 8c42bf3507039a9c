"""Ranks that do not come, die, stop or hang: whom the others name, and how they end."""

import os
import platform
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from megatron_gkd import meeting
from megatron_gkd.liveness import _conclude, joined
from megatron_gkd.meeting import Patience, meet, reach
from megatron_gkd.rollout.row_batch import RowBatch
from tests.ports import free_port
from tests.ranks import _context

CPU = torch.device("cpu")
LIMIT = 3
HOST = platform.node()


def _main(act, rank, size, port, log):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(size))
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    from megatron_gkd import last_words
    from megatron_gkd.flags import exit_with

    last_words.SECONDS_FOR_RANK_0 = 1
    torch.set_num_threads(1)
    faults = SimpleNamespace(start_timeout=3, collective_timeout=LIMIT, group_timeout=LIMIT + 2)
    try:
        with joined(CPU, faults, (ValueError, OSError), lambda: False) as membership:
            torch.distributed.barrier()
            membership.step, membership.way_on = 4, "go on with the flag"
            act(rank)
            torch.distributed.barrier()
    except (ValueError, OSError) as error:
        exit_with(error)
    except TypeError:
        os._exit(70)
    os._exit(0)


def ends_of(act, tmp_path, size=3, started=None):
    """(exit statuses, what the ranks said) of `act(rank)` on ranks that watch each other."""
    port, log = free_port(), tmp_path / "said"
    log.touch()
    ranks = [
        _context.Process(target=_main, args=(act, rank, size, port, str(log)), daemon=True)
        for rank in range(size if started is None else started)
    ]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(40)
        return [rank.exitcode for rank in ranks], own_lines(log)
    finally:
        for rank in ranks:
            rank.kill()


def own_lines(log):
    """Without what torch's C++ code says, which a run does not let it (startup.quiet_sockets)."""
    lines = log.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if line.startswith("megatron_gkd: "))


def work(rank):
    """Steps of no work, as many on every rank, in twice the limit and more."""
    for _ in range(100 * LIMIT):
        torch.distributed.all_reduce(torch.ones(1))
        time.sleep(0.02)


def die(rank):
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(1))


def stop_for_ever(rank):
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    torch.distributed.all_reduce(torch.ones(1))


def hang(rank):
    """Its threads live, and its main thread comes to no collective."""
    if rank == 1:
        time.sleep(60)
    torch.distributed.all_reduce(torch.ones(1))


def stand_still(rank):
    """The same, in this package's code: no rank moves, and rank 1 is where no other is."""
    if rank == 1:
        Patience(60, "--flag", print).wait(60, str)
    torch.distributed.all_reduce(torch.ones(1))


class _Never:
    """Numbers of a device that hangs: who asks for them waits."""

    def __getitem__(self, index):
        time.sleep(60)


def wait_for_a_graph(rank):
    """All ranks at the same line: they ask for the tokens that a CUDA graph was to write."""
    rows = SimpleNamespace(first=lambda size: SimpleNamespace(written=_Never()))
    RowBatch.newest(SimpleNamespace(rows=rows, size=1), 0, 1)


def refuse(rank):
    if rank == 1:
        raise ValueError("--flag 3: must be 4")
    torch.distributed.all_reduce(torch.ones(1))


def err(rank):
    if rank == 1:
        raise TypeError("a mistake")
    torch.distributed.all_reduce(torch.ones(1))


def test_ranks_that_live_are_left_alone(tmp_path):
    statuses, said = ends_of(work, tmp_path)
    assert statuses == [0, 0, 0] and "megatron_gkd: " not in said, said


@pytest.mark.parametrize(
    "act, statuses, line",
    [
        (die, [75, 75, -9], f"rank 2 (on {HOST}) is gone (silent for "),
        (hang, [75, 75, 75], f"rank 1 (on {HOST}) did not come to a collective in {LIMIT} s "),
        (
            stand_still,
            [75, 75, 75],
            f"rank 1 (on {HOST}) did not come to a collective in {LIMIT} s",
        ),
        (
            wait_for_a_graph,
            [75, 75, 75],
            f"rank 0 (on {HOST}) and all others have waited for their devices for {LIMIT} s",
        ),
        (refuse, [2, 2, 2], "--flag 3: must be 4"),
        (err, [75, 70, 75], f"rank 1 (on {HOST}) has ended (TypeError: a mistake). All ranks end"),
    ],
)
def test_the_others_name_the_rank_and_end(tmp_path, act, statuses, line):
    """Each that lives, without a word of gloo; with where it was and how to go on."""
    found, said = ends_of(act, tmp_path)
    assert found == statuses, said
    lines = said.splitlines()
    alive = [line for line in lines if line.startswith("megatron_gkd: error")]
    assert alive == lines and len(lines) >= 2, said  # rank 1 may end before it says it, too
    assert all(line in one for one in lines if act is not err or "a mistake" in one), said
    if act is not refuse:
        assert all("All ranks end; go on with the flag" in one for one in lines)
    if act is hang:
        assert all("rank 1 is in step 5, in " in one for one in lines)
    if act is wait_for_a_graph:
        assert all("step 5, in newest (megatron_gkd/rollout/row_batch.py:" in one for one in lines)
    if act is stand_still:
        assert all("it is in step 5, in wait (megatron_gkd/meeting.py:" in one for one in lines)


def test_a_rank_0_that_is_stopped(tmp_path):
    """It is what the others hear of rank 0, which would judge the others."""
    port, log = free_port(), tmp_path / "said"
    ranks = [
        _context.Process(target=_main, args=(stop_for_ever, rank, 3, port, str(log)), daemon=True)
        for rank in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks[1:]:
        rank.join(40)
    ranks[0].kill()
    said = own_lines(log)
    # rank 0 has the store here, where there is no launcher
    assert [rank.exitcode for rank in ranks[1:]] == [75, 75], said
    assert said.count("has not answered for") == 2 and "rank 0" in said, said


def test_ranks_that_do_not_come_are_named(tmp_path):
    """And waiting for them is said."""
    statuses, said = ends_of(work, tmp_path, size=4, started=2)
    assert statuses == [2, 2]
    assert "waiting for rank 2, rank 3 of 4: 1 of 3 s (--start_timeout)" in said
    assert "error: rank 2, rank 3 did not come in 3 s (--start_timeout)" in said


def lose_connections(rank):
    """Of rank 2 to the store, by a firewall say, while it goes on."""
    if rank == 2:
        port = int(os.environ["MASTER_PORT"])
        for name in os.listdir("/proc/self/fd"):
            try:
                one = socket.socket(fileno=os.dup(int(name)))
                if one.getpeername()[1] == port:
                    one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
    work(rank)


def test_a_broken_connection_is_made_again(tmp_path):
    statuses, said = ends_of(lose_connections, tmp_path)
    assert statuses == [0, 0, 0] and "megatron_gkd: " not in said, said


def test_a_store_that_stands_still_ends_the_meeting():
    """It accepts, and answers nothing: a request of torch's would wait for ever."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(meeting, "_GRACE_SECONDS", 0.5)
            with pytest.raises(OSError, match="does not answer any more"):
                reach("127.0.0.1", silent.getsockname()[1], False, Patience(1, "--flag", print))


def test_a_first_machine_that_ends_in_the_meeting(tmp_path):
    """An error of the store becomes a line."""

    class Gone:
        def check(self, keys):
            raise torch.distributed.DistNetworkError("Connection reset by peer\nframe #0")

    with pytest.raises(
        OSError, match=r"^b: the first machine has ended \(Connection reset by peer"
    ):
        meet(Gone(), 1, {}, ["a", "b"], Patience(1, "--flag", print))


def store_of(port, is_host):
    return reach("127.0.0.1", port, is_host, Patience(5, "--flag", print))


def meet_all(port, store, owns, conclude=lambda members: {"size": len(members)}):
    """What each member of a meeting gets, or the error that it raises."""
    found = [None] * len(owns)

    def come(member):
        own_store = store if member == 0 else store_of(port, False)
        try:
            patience = Patience(5, "--flag", print)
            names = [f"member {number}" for number in range(len(owns))]
            found[member] = meet(own_store, member, owns[member], names, patience, conclude)
        except (OSError, ValueError) as error:
            found[member] = error

    threads = [threading.Thread(target=come, args=(member,)) for member in range(len(owns))]
    for thread in reversed(threads):  # member 0 the last: the others are there before it cleans up
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    return found


def test_meetings_at_the_same_store_do_not_mix(tmp_path):
    """As of ranks that torchrun starts again beside the store of their last time."""
    port = free_port()
    store = store_of(port, True)
    tokens = set()
    for size in (3, 3, 2):
        found = meet_all(port, store, [{"host": f"h{member}"} for member in range(size)])
        assert [one.said for one in found] == [{"size": size}] * size
        assert [member["host"] for member in found[0].members] == ["h0", "h1", "h2"][:size]
        (token,) = {one.token for one in found}
        tokens.add(token)
    assert len(tokens) == 3


def test_what_member_0_refuses_all_refuse():
    def conclude(members):
        raise ValueError("they differ")

    port = free_port()
    found = meet_all(port, store_of(port, True), [{}, {}, {}], conclude)
    assert [str(error) for error in found] == ["they differ"] * 3


def test_devices_that_differ_are_refused():
    """Before a group is made, in which NCCL would wait for gloo."""
    members = [{"host": "a", "device": "cuda"}, {"host": "b", "device": "cpu"}]
    with pytest.raises(ValueError, match=r"rank 1 \(on b\) computes on cpu, rank 0 \(on a\) on cu"):
        _conclude(lambda: False, members)
    assert _conclude(lambda: True, members[:1]) == {"goes_on": True}


def test_variables_of_torchrun_that_are_not_all_there(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    faults = SimpleNamespace(group_timeout=5)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 and RANK, MASTER_ADDR, MASTER_PORT not"):
        with joined(CPU, faults, (), lambda: False):
            pass


def test_nobody_answers_at_the_address():
    said = []
    port = free_port()
    with pytest.raises(OSError, match=f"nothing answers at 127.0.0.1:{port} .*--flag"):
        reach("127.0.0.1", port, False, Patience(0.5, "--flag", said.append))
    assert "waiting for the first machine" in said[0] and "of 0.5 s (--flag)" in said[0]


def test_a_port_that_another_program_has():
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        with pytest.raises(OSError, match="cannot be opened.*another MASTER_PORT"):
            reach("127.0.0.1", other.getsockname()[1], True, Patience(5, "--flag", print))
