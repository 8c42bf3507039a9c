"""The members of a run, nodes or ranks, meet at a store (torch's TCPStore) before it begins. Whom
they wait for is said; who does not come in time is named.
"""

import json
import platform
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

from torch.distributed import DistError, Store, TCPStore

from megatron_gkd.errors import first_line

Result = TypeVar("Result")

_MAX_NAMED = 8
_GRACE_SECONDS = 10.0  # for an answer, where members have not begun to wait at the same moment
_REQUEST = timedelta(seconds=30)  # what one request to the store may take


class Patience:
    """How long members wait for each other: at most `seconds`, of which `say` hears every 30, or
    every quarter of a shorter time. flag: what sets it, for messages; look: called again and again,
    ends the waiting by what it raises.
    """

    def __init__(
        self,
        seconds: float,
        flag: str,
        say: Callable[[str], None],
        look: Callable[[], None] = lambda: None,
    ):
        self.seconds, self.flag, self._say, self._look = seconds, flag, say, look
        self._every = min(30.0, seconds / 4)
        self._begun = self._said = time.monotonic()

    def is_over(self, grace: float = 0.0) -> bool:
        """Whether they have waited for longer, by more than `grace` seconds."""
        return time.monotonic() - self._begun > self.seconds + grace

    def wait(self, seconds: float, whom: Callable[[], str]) -> None:
        """Sleep; `whom` is asked where it is time to say whom this member waits for."""
        self._look()
        now = time.monotonic()
        if now - self._said >= self._every:
            self._said = now
            self._say(f"{whom()}: {now - self._begun:.0f} of {self.seconds:g} s ({self.flag})")
        time.sleep(seconds)


@dataclass(frozen=True)
class Meeting:
    """All have come. token: a text that no other meeting at the same store has had. members: what
    each said of itself, known to member 0 alone. said: what member 0 made of that, for all.
    """

    token: str
    members: list[dict[str, Any]]
    said: dict[str, Any]


def bounded(seconds: float, who: str, work: Callable[[], Result]) -> Result:
    """`work()`, in a thread of its own, since a request to a store that does not answer has no end.
    Raises OSError after `seconds`, and where the store is gone.
    """
    done: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, name="meeting", daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise OSError(f"{who}: the first machine does not answer any more") from None
    if isinstance(error, DistError):
        raise OSError(f"{who}: the first machine has ended ({first_line(error)})") from error
    if error is not None:
        raise error
    return cast(Result, result)


def reach(address: str, port: int, is_host: bool, patience: Patience) -> TCPStore:
    """The store at that place, which the member that `is_host` opens. Raises OSError where nobody
    answers in time.
    """
    place, reason = f"{address}:{port}", ""
    while not is_host:
        try:
            socket.create_connection((address, port), timeout=5).close()
            break
        except OSError as error:  # nobody listens yet; there is no such name, no route
            reason = error.strerror or str(error)
        if patience.is_over():
            raise OSError(
                f"{platform.node()}: nothing answers at {place} ({reason}) for "
                f"{patience.seconds:g} s ({patience.flag}): start the first machine too, with this "
                "MASTER_ADDR and MASTER_PORT, or look at its output"
            )
        waits_for = f"waiting for the first machine, {place} ({reason})"
        patience.wait(0.2, partial(str, waits_for))

    def connect() -> TCPStore:
        settings: dict[str, Any] = {"wait_for_workers": False, "multi_tenant": True}
        return TCPStore(address, port, is_master=is_host, timeout=_REQUEST, **settings)

    try:
        return bounded(patience.seconds + _GRACE_SECONDS, platform.node(), connect)
    except OSError as error:
        raise OSError(
            f"{platform.node()}: the store at {place} cannot be "
            f"{'opened' if is_host else 'reached'} ({error}): another program may have the port; "
            "give all machines another MASTER_PORT"
        ) from error


def own_connection(store: Any) -> Store:
    """The same store for another thread: a request waits for the one before it."""
    cloned: Store = store.clone()
    return cloned


def meet(
    store: Store,
    member: int,
    own: dict[str, Any],
    names: Sequence[str],
    patience: Patience,
    conclude: Callable[[list[dict[str, Any]]], dict[str, Any]] = lambda members: {},
) -> Meeting:
    """Wait until all have come. own: of this member, JSON; names: of all, for messages; conclude:
    what member 0 makes of what all say of themselves; a ValueError of it is raised on every member.
    What earlier members have left at the store does not count.

    Raises OSError, on every member that has come, naming those who have not in time.
    """
    seconds = patience.seconds + 2 * _GRACE_SECONDS
    work = partial(_meet, store, member, own, names, patience, conclude)
    return bounded(seconds, names[member], work)


def _meet(
    store: Store,
    member: int,
    own: dict[str, Any],
    names: Sequence[str],
    patience: Patience,
    conclude: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> Meeting:
    card = own | {"nonce": secrets.token_hex(8)}
    seconds = min(1.0, 0.02 + len(names) / 1000)  # between two looks: 1,000 members are no flood
    if member == 0:
        return _gather(store, card, names, patience, seconds, conclude)
    waits_for = f"{names[member]} is here and waits for the others"
    while not store.check([f"answer/{card['nonce']}"]):
        store.set(f"here/{member}", json.dumps(card))  # again: member 0 removes what it finds
        if patience.is_over(_GRACE_SECONDS):
            raise OSError(f"{names[0]} did not come in {patience.seconds:g} s ({patience.flag})")
        patience.wait(seconds, lambda: waits_for)
    answer = json.loads(store.get(f"answer/{card['nonce']}"))
    if "late" in answer:
        raise OSError(answer["late"])
    if "error" in answer:
        raise ValueError(answer["error"])
    return Meeting(answer["token"], [], answer["said"])


def _gather(
    store: Store,
    own: dict[str, Any],
    names: Sequence[str],
    patience: Patience,
    seconds: float,
    conclude: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> Meeting:
    """`_meet` of member 0."""
    others = range(1, len(names))
    for member in others:
        store.delete_key(f"here/{member}")  # of an earlier meeting

    def missing() -> str:
        absent = [names[member] for member in others if not store.check([f"here/{member}"])]
        more = f" and {len(absent) - _MAX_NAMED} more" if len(absent) > _MAX_NAMED else ""
        return f"{', '.join(absent[:_MAX_NAMED])}{more}"

    here = list(others)
    answer: dict[str, Any] = {}
    while here and not store.check([f"here/{member}" for member in here]):
        if patience.is_over():
            late = f"did not come in {patience.seconds:g} s ({patience.flag}); look at the output"
            answer = {"late": f"{missing()} {late} there, and start all at about the same time"}
            here = [member for member in others if store.check([f"here/{member}"])]
            break
        patience.wait(seconds, lambda: f"waiting for {missing()} of {len(names)}")
    cards = store.multi_get([f"here/{member}" for member in here]) if here else []
    members = [own, *map(json.loads, cards)]
    if not answer:
        try:
            answer = {"token": own["nonce"], "said": conclude(members)}
        except ValueError as error:
            answer = {"error": str(error)}
    for member in members[1:]:
        store.set(f"answer/{member['nonce']}", json.dumps(answer))
    if "said" in answer:
        return Meeting(answer["token"], members, answer["said"])
    time.sleep(5 * seconds)  # before the store may end with this process
    raise OSError(answer["late"]) if "late" in answer else ValueError(answer["error"])
