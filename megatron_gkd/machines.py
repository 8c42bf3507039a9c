"""The machines of a run, as their launchers know them: whom they wait for, by which network card
they reach each other, and which has failed.
"""

import json
import os
import platform
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from torch.distributed import DistError, PrefixStore

from megatron_gkd.fault_settings import FaultConfig
from megatron_gkd.last_words import warn
from megatron_gkd.meeting import Patience, meet, own_connection, reach
from megatron_gkd.network import interface_of, is_loopback, own_address, resolve

FLAG = "--start_timeout"
POLL_SECONDS = 0.5
LAST_SECONDS = 4.0  # to tell others of a failure, and for them to hear of it
_KEY = "failure"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Failure:
    """What has ended a run: the exit status, the line to print (none where it was asked to stop),
    and whose line that is, where it does not say.
    """

    status: int
    line: str
    of: str


class Failed(Exception):
    """Another machine has, while this one waited for it."""


class Machines:
    """What the launchers of `size` machines know of each other. They meet at the address and port
    of the first, whose launcher has the store, and see within a second where one has failed.

    Raises OSError where the first machine does not answer in `seconds`.
    """

    def __init__(self, address: str, port: int, rank: int, size: int, seconds: float):
        self.failure: Failure | None = None
        """Of another machine"""
        self._place, self._rank, self._size, self._seconds = (address, port), rank, size, seconds
        with suppress(OSError):
            if rank > 0 and is_loopback(ip := resolve(address, port)) and ip != address:
                warn(
                    f"{address} is {ip} on {platform.node()}: machine {rank} looks for the first "
                    "machine on itself. If it is another one, give MASTER_ADDR as an address of it"
                )
        self._store = reach(address, port, rank == 0, Patience(seconds, FLAG, warn))
        self._own: Failure | None = None
        self._ends, self._told = threading.Event(), threading.Event()
        threading.Thread(target=self._watch, name="machines", daemon=True).start()

    def meet(self) -> str:
        """All machines have come, and what their ranks need to find each other is in the
        environment. A text that no other job has had. Raises OSError naming those that have not
        come, Failed.
        """
        names = [f"machine {rank}" + " (MASTER_ADDR)" * (rank == 0) for rank in range(self._size)]
        address, port = self._place
        own = {"host": platform.node(), "first": ""}
        with suppress(OSError):
            own["first"] = resolve(address, port)
        patience = Patience(self._seconds, FLAG, warn, self._look)
        store = PrefixStore("machines", self._store)
        meeting = meet(store, self._rank, own, names, patience, _conclude)
        choose_interface(meeting.said["first"], port)
        return meeting.token

    def end(self, own: Failure | None) -> Failure | None:
        """This machine is done: tell the others where it has failed. What has failed first."""
        if self.failure is None and own is not None and own.line:
            self._own = own
            self._ends.set()
            self._told.wait(LAST_SECONDS)  # the store may not answer
        return self.failure or own

    def linger(self) -> None:
        """The first machine's store ends with its process: the others look at it before that."""
        if self._rank == 0 and self._own is not None:
            time.sleep(LAST_SECONDS)

    def _look(self) -> None:
        if self.failure is not None:
            raise Failed

    def _watch(self) -> None:
        store = own_connection(self._store)
        while not self._ends.wait(POLL_SECONDS) and self.failure is None:
            try:
                if store.check([_KEY]):
                    self.failure = Failure(**json.loads(store.get(_KEY)))
            except (DistError, ValueError, TypeError):  # a broken connection is not mended
                with suppress(DistError):  # the first machine has ended
                    store = own_connection(self._store)
        with suppress(DistError, ValueError, TypeError):
            if self._own is not None:
                own = json.dumps(asdict(self._own)).encode()
                first = store.compare_set(_KEY, "", own.decode())
                if first != own:
                    self.failure = Failure(**json.loads(first))
        self._told.set()


def start_timeout(arguments: Sequence[str]) -> float:
    """--start_timeout of the training command, or what it is without."""
    for flag, value in zip(arguments, [*arguments[1:], ""]):
        name, _, after = flag.partition("=")
        if name == FLAG:
            with suppress(ValueError):  # the ranks will refuse it
                return float(after or value)
    return float(FaultConfig().start_timeout)


def _conclude(members: list[dict[str, Any]]) -> dict[str, Any]:
    """What the first machine is for the others; by its own hosts file it may be 127.0.0.1."""
    seen = [one["first"] for one in members if one["first"] and not is_loopback(one["first"])]
    return {"first": seen[-1] if seen else ""}


def choose_interface(first: str, port: int) -> None:
    """gloo and NCCL get the network card that reaches the first machine, unless the environment
    names one. first: its name or address; that of no machine in particular ("", 127.0.0.1) where
    all machines are one.
    """
    unset = [name for name in INTERFACES if name not in os.environ]
    with suppress(OSError):  # no such name, no route: who connects will say it
        address = resolve(first, port) if first and unset else "127.0.0.1"
        found = None if is_loopback(address) else interface_of(own_address(address, port))
        if found is not None:
            os.environ.update(dict.fromkeys(unset, found))
            warn(f"{platform.node()} uses the network card {found} ({', '.join(unset)})")
