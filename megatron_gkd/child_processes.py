"""Processes that are forked to help this one: they have the default way with signals, and end with
their parent, however that ends.
"""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""What a user, a terminal that closes or a scheduler sends to end a program."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextmanager
def stop_signals_wait() -> Iterator[None]:
    """Around a fork: STOP_SIGNALS wait until the parent knows its child, and until the child has
    forgotten the parent's handlers (`begin_child`).
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_child(parent: int, ignored: tuple[signal.Signals, ...] = ()) -> None:
    """The first call of a process that `parent` has forked, from its main thread, within
    `stop_signals_wait`: STOP_SIGNALS end it silently from now on, except for those that are
    `ignored`, and it is killed when the thread of the parent that forked it ends. Where the system
    cannot do that (it is Linux's), the child looks at `os.getppid` itself.
    """
    signal.set_wakeup_fd(-1)  # the parent's: what reaches the child is not the parent's to hear
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
