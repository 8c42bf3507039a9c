"""Whether the other ranks live. One that is killed, stopped or cut off answers in no collective;
the others would wait for it, each until a message that names nobody.

Every rank tells the store of the run once a second where its main thread is: four requests of some
hundred bytes. Rank 0 reads what all say, and writes down whom it has not heard of for
--collective_timeout; the others read that, and watch rank 0 and the store themselves. Then all that
live end, with one line and the status EX_TEMPFAIL: a launcher may start the run again.
"""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch.distributed import DistError, PrefixStore, Store

from megatron_gkd.errors import first_line
from megatron_gkd.fault_settings import FaultConfig
from megatron_gkd.last_words import say, warn
from megatron_gkd.meeting import Patience, meet, own_connection, reach
from megatron_gkd.parallel import join
from megatron_gkd.stop_requests import Stopped, exit_status

BEAT_SECONDS = 1.0
HASTE_SECONDS = 5.0
"""Once a collective has failed: who is silent for so long is the reason"""
_FLAG = "--collective_timeout"
_PACKAGE = Path(__file__).parent
_MAX_NAMED = 4
_LOOK = "megatron_gkd/rollout/row_batch.py"
"""Where ranks wait for a CUDA graph, whose collectives NCCL's watchdog does not see"""
_LOOPS = ("run_from_config", "train", "build_run", "train_step")  # what they call is a phase


@dataclass
class Membership:
    """This rank among the others: what they are told of it when it does not answer any more."""

    goes_on: bool = False
    """Whether torchrun has started this run again"""
    step: int | None = None
    """Steps that are done; None before the first"""
    way_on: str = "no checkpoint was written"
    """How the run goes on from what it has saved"""


@contextmanager
def joined(
    device: torch.device,
    faults: FaultConfig,
    refusals: tuple[type[Exception], ...],
    goes_on: Callable[[], bool],
) -> Iterator[Membership]:
    """Within it the ranks of torchrun's variables are in the process group of the world, and watch
    each other. A rank that is alone, or is in a group already, watches nobody.

    Raises OSError naming the ranks that have not come within --start_timeout, ValueError where some
    have a GPU and others have none, or where torchrun's variables are not all there. Where a rank
    has gone the process ends. refusals: errors that a run ends with in a line, which is then that
    of all machines; goes_on: asked on rank 0 for `Membership.goes_on`.
    """
    timeout = timedelta(seconds=faults.group_timeout)
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size == 1 or torch.distributed.is_initialized():
        join(device, timeout)
        yield Membership(goes_on=size == 1 and goes_on())
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is {size} and {', '.join(missing)} not set: use torchrun")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    has_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience = Patience(
        faults.start_timeout,
        "--start_timeout",
        lambda line: warn(line) if os.environ.get("LOCAL_RANK", "0") == "0" else None,
    )
    store = reach(address, port, has_store, patience)
    own = {"host": platform.node(), "device": device.type}
    meeting = meet(store, rank, own, _names(size), patience, partial(_conclude, goes_on))
    membership = Membership(goes_on=meeting.said["goes_on"])
    store_of_run = PrefixStore(meeting.token, store)
    connect = partial(own_connection, PrefixStore("liveness", store_of_run))
    hosts = [member["host"] for member in meeting.members]
    lingers = has_store or (rank == 0 and int(os.environ.get("LOCAL_WORLD_SIZE", size)) < size)
    limit = faults.collective_timeout
    with Liveness(connect, rank, hosts, limit, membership, refusals, lingers):
        join(device, timeout, store_of_run)
        yield membership


def _names(size: int) -> list[str]:
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    of_node = [f" (machine {rank // per_node})" if per_node < size else "" for rank in range(size)]
    return [f"rank {rank}{node}" for rank, node in enumerate(of_node)]


def _conclude(goes_on: Callable[[], bool], members: list[dict[str, Any]]) -> dict[str, Any]:
    first = members[0]
    for rank, member in enumerate(members):
        if member["device"] != first["device"]:
            raise ValueError(
                f"rank {rank} (on {member['host']}) computes on {member['device']}, rank 0 (on "
                f"{first['host']}) on {first['device']}: start all machines with the same --device "
                "and with a torch that sees their GPUs"
            )
    return {"goes_on": goes_on()}


class Liveness:
    """The two threads of a rank: one talks to the store, the other looks at what is known and ends
    the process, also where the store does not answer. hosts: of all ranks, known to rank 0; limit:
    seconds of silence; refusals: errors that a run ends with in a line; lingers: the store may end
    with this process, which others still have to look at.
    """

    def __init__(
        self,
        connect: Callable[[], Store],
        rank: int,
        hosts: list[str],
        limit: float,
        membership: Membership,
        refusals: tuple[type[Exception], ...],
        lingers: bool,
    ):
        self._connect, self._store = connect, connect()
        self._rank, self._limit, self._membership = rank, limit, membership
        self._beat_seconds = min(BEAT_SECONDS, limit / 10)
        self._main = threading.main_thread().ident or 0
        self._hosts, self._refusals = hosts, refusals
        self._linger_seconds = 3 * self._beat_seconds if lingers else 0.0
        self._number, self._state, self._why = 0, "", ""
        begun = self._answered = time.monotonic()
        self._told: dict[int, dict[str, Any]] = {}
        """What this rank has last heard of others: rank 0 of all"""
        self._told_at = dict.fromkeys(range(len(hosts)) if rank == 0 else (0,), begun)
        self._moved_at = begun
        """When a rank was last seen somewhere else than before"""
        self._first_lost: float | None = None
        self._verdict: dict[str, Any] | None = None
        self._last_words: dict[str, Any] | None = None
        self._done, self._ends = threading.Event(), threading.Lock()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._talk, "beats"), (self._watch, "liveness"))
        ]

    def __enter__(self) -> "Liveness":
        for rank, host in enumerate(self._hosts):  # of ranks that die before they tell anything
            told = {"host": host, "state": "", "why": "", "doing": "at its start", "step": None}
            self._store.compare_set(f"beat/{rank}", "", json.dumps(told))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and is_lost_connection(error):
            self._wait_for_verdict(error)
        self._state = "done" if error is None else "ended"
        own = self._rank, platform.node()
        if isinstance(error, self._refusals):
            self._last_words = _verdict(*own, f": {error}", 2, isinstance(error, OSError))
        elif isinstance(error, Stopped):
            self._last_words = _verdict(*own, " was asked to stop", exit_status(error.number))
        elif error is not None:
            why = f" has ended ({type(error).__name__}: {first_line(error)})"
            self._last_words = _verdict(*own, why)
        self._done.set()
        for thread in self._threads:  # the first may wait for a store that does not answer
            thread.join(2 * BEAT_SECONDS + self._linger_seconds)

    def _wait_for_verdict(self, error: BaseException) -> NoReturn:
        """A collective has failed in the main thread: which rank was it?"""
        self._state, self._why = "lost", first_line(error)
        time.sleep(4 * HASTE_SECONDS)
        self._end(_verdict(self._rank, platform.node(), f" lost the others: {self._why}"))

    def _talk(self) -> None:
        while not self._done.is_set():
            try:
                self._store.set(f"beat/{self._rank}", self._record())
                self._listen()
                if self._store.check(["verdict"]):
                    self._verdict = json.loads(self._store.get("verdict"))
                self._answered = time.monotonic()
            except (DistError, ValueError):  # the other thread sees for how long
                with suppress(DistError):  # a broken connection is not mended by itself
                    self._store = self._connect()
            self._done.wait(self._beat_seconds)
        with suppress(DistError):
            self._store.set(f"beat/{self._rank}", self._record())
            if self._last_words is not None:
                self._publish(self._last_words)
                time.sleep(self._linger_seconds)

    def _record(self) -> str:
        """What the others are told."""
        self._number += 1
        step = self._membership.step
        when = "before its first step" if step is None else f"in step {step + 1}"
        doing = f"{when}, {_place(sys._current_frames().get(self._main))}"
        told = {"host": platform.node(), "state": self._state, "why": self._why, "doing": doing}
        return json.dumps(told | {"step": step, "number": self._number})

    def _publish(self, verdict: dict[str, Any]) -> None:
        self._store.set("verdict", json.dumps(verdict))

    def _listen(self) -> None:
        keys = [f"beat/{rank}" for rank in self._told_at]
        if not self._store.check(keys):
            return  # the last of them has not begun
        for rank, text in zip(self._told_at, self._store.multi_get(keys), strict=True):
            told = json.loads(text)
            before = self._told.get(rank, {})
            if told != before:
                self._told[rank], self._told_at[rank] = told, time.monotonic()
            if told["doing"] != before.get("doing"):
                self._moved_at = time.monotonic()
        lost = [rank for rank, told in self._told.items() if told["state"] == "lost"]
        if self._first_lost is None and (lost or self._state == "lost"):
            self._first_lost = time.monotonic()
        verdict = self._silent() or self._absent(lost) or self._stuck()
        if verdict and self._rank == 0:
            self._publish(verdict)
        self._verdict = self._verdict or verdict

    @property
    def _patience(self) -> float:
        hurries = self._first_lost is not None or self._state == "lost"
        return min(self._limit, HASTE_SECONDS) if hurries else self._limit

    def _silent(self) -> dict[str, Any] | None:
        """Who says nothing any more."""
        waited = {
            rank: time.monotonic() - self._told_at[rank]
            for rank, told in self._told.items()
            if rank != self._rank and told["state"] not in ("done", "ended")
        }
        rank = max(waited, key=waited.__getitem__, default=self._rank)
        if waited.get(rank, 0) <= self._patience:
            return None
        what = f"has not answered for {waited[rank]:.0f} s ({_FLAG} {self._limit:g})"
        if self._first_lost is not None:
            what = f"is gone (silent for {waited[rank]:.0f} s after a collective failed)"
        told = self._told[rank]
        return _verdict(rank, told["host"], f" {what}; it was {told['doing']}")

    def _absent(self, lost: list[int]) -> dict[str, Any] | None:
        """Of ranks that all live, those that others have waited for: they have lost nobody."""
        if self._rank != 0 or self._first_lost is None:
            return None
        if time.monotonic() - self._first_lost < 2 * self._patience:
            return None
        absent = [rank for rank, told in self._told.items() if told["state"] == ""]
        if absent:
            what = f"did not come to a collective in {self._limit:g} s ({_FLAG})"
            places = [f"rank {rank} is {self._told[rank]['doing']}" for rank in absent[:_MAX_NAMED]]
            host = self._told[absent[0]]["host"]
            return _verdict(absent[0], host, f" {what}; {'; '.join(places)}")
        told = self._told[lost[0]]
        return _verdict(lost[0], told["host"], f" lost the others: {told['why']}")

    def _stuck(self) -> dict[str, Any] | None:
        """A rank that hangs, before NCCL ends the process or gloo the collective: none has moved,
        and the others wait for it elsewhere. Not before the first step, where a rank may work for
        long at one place, nor where all are at the same, waiting for a device or for data; but in
        a rollout nobody else ends that.
        """
        if self._rank != 0 or time.monotonic() - self._moved_at <= self._limit:
            return None
        told = self._told
        places = [one["doing"] for one in told.values()]
        begins = any(one["step"] is None or one["state"] for one in told.values())
        if begins:
            return None
        if len(set(places)) == 1:
            if _LOOK not in places[0]:
                return None
            what = f" and all others have waited for their devices for {self._limit:g} s ({_FLAG})"
            what += f", {places[0]}: collectives of its CUDA graph may hang; "
            what += "--rollout_cuda_graphs false has none"
            return _verdict(0, told[0]["host"], what)
        rank = min(told, key=lambda rank: places.count(told[rank]["doing"]))
        what = f"did not come to a collective in {self._limit:g} s ({_FLAG}), in which none moved"
        doing = f"it is {told[rank]['doing']}, most are {max(places, key=places.count)}"
        return _verdict(rank, told[rank]["host"], f" {what}; {doing}")

    def _watch(self) -> None:
        while not self._done.wait(self._beat_seconds):
            if self._verdict:
                self._end(self._verdict)
            seconds = time.monotonic() - self._answered
            if seconds > self._patience:
                host = self._told.get(0, {}).get("host", os.environ["MASTER_ADDR"])
                line = f"the store on the machine of rank 0 ({host}) has not answered for "
                line += f"{seconds:.0f} s ({_FLAG} {self._limit:g})"
                self._end({"line": line, "status": os.EX_TEMPFAIL, "transient": False})

    def _end(self, verdict: dict[str, Any]) -> NoReturn:
        """Every rank says it, as nobody knows who else can; a launcher prints one line."""
        self._ends.acquire()  # for ever: the other thread, too, may have come here
        time.sleep(self._linger_seconds)
        line, status = verdict["line"], verdict["status"]
        if status == os.EX_TEMPFAIL:
            line += f". All ranks end; {self._membership.way_on}"
        # what reads our output, or the disk of the launcher's file, may stand still
        threading.Thread(target=_exit_late, args=(status,), daemon=True).start()
        say(line, transient=verdict["transient"])
        os._exit(status)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective has failed because another rank is gone or has not come."""
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and "/gloo/" in str(error)
    )


def _exit_late(status: int) -> None:
    time.sleep(HASTE_SECONDS)
    os._exit(status)


def _verdict(
    rank: int, host: str, what: str, status: int = os.EX_TEMPFAIL, transient: bool = False
) -> dict[str, Any]:
    """What all ranks say as they end, and their exit status; transient: see `last_words.say`."""
    line = f"rank {rank} (on {host}){what}"
    return {"line": line, "status": status, "transient": transient}


def _place(frame: FrameType | None) -> str:
    """Where a thread is: the phase of the run, and the innermost line of this package."""
    phase = line = ""
    while frame is not None:  # from the inside
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            line = line or f"megatron_gkd/{path.relative_to(_PACKAGE)}:{frame.f_lineno}"
            name = frame.f_code.co_name
            if name in _LOOPS:
                return f"in {phase or name} ({line})"
            phase = name
        frame = frame.f_back
    return f"in {phase or 'its start'} ({line or 'elsewhere'})"
