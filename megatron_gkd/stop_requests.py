"""What asks a run to stop: SIGTERM, SIGINT (Ctrl-C), SIGHUP, SIGQUIT, and the death of torchrun.

Before the first step such a request ends the run at once. From then on the run finishes its step,
saves and says how to go on; the ranks agree on it once a step. A second Ctrl-C ends it at once.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from megatron_gkd.child_processes import STOP_SIGNALS

LAUNCHER_DIED = 128  # a request, beside the numbers of signals
FOLDER_LOST = 256  # likewise: another run has taken --output_dir, where this one must not save
SECONDS_TO_HEAR = 3.0  # of a request before the first step, for a main thread that is elsewhere
SECONDS_TO_END = 10.0  # when it has heard: to delete temporary files and end processes
_LAST = b"\0"  # no signal: nothing follows
SECONDS_OF_ONE_REQUEST = 0.5  # torchrun, Slurm and a terminal may each send a signal on


class Stopped(BaseException):
    """Raised by the signal itself in a run that has not begun its first step; its number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class StopRequests:
    """What has asked this process to stop so far. A thread of its own reads of every signal what
    the interpreter writes into a pipe, since the main thread may be in a collective, in which it
    hears of none; and sees whether the launcher is alive.
    """

    def __init__(self, launcher: int | None):
        self.number = 0
        """The first request: a signal's number, or LAUNCHER_DIED or FOLDER_LOST; 0: none"""
        self.saves = False
        """Whether the run saves before it stops: it has begun its first step"""
        self._launcher = launcher
        self._launcher_died = False
        self._first: int | None = None
        self._asked_at = 0.0
        self._deadline = float("inf")
        self._heard = False

    def folder_lost(self) -> None:
        """Another run writes into --output_dir now; may be called from any thread."""
        self.number = FOLDER_LOST

    def save_first(self) -> None:
        """The first step begins: from now on a request is only noted, in `number`."""
        self.saves = True

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The handler; runs in the main thread, between two of its instructions."""
        if self.number:
            return
        self.number = LAUNCHER_DIED if self._launcher_died else number
        if not self.saves:
            raise Stopped(self.number)

    def watch(self, pipe: int) -> None:
        """The thread, until _LAST comes through the pipe."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the main thread's
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while True:
            sleeps = self._deadline == float("inf") and self._launcher is None
            if poll.poll(None if sleeps else 1000):
                numbers = os.read(pipe, 64)
                if _LAST in numbers:
                    return
                for number in numbers:
                    if number in STOP_SIGNALS and not self._launcher_died:
                        self._note(number)
            if self._launcher is not None and os.getppid() != self._launcher:
                self._note_launcher()
            if time.monotonic() > self._deadline:
                self._end_late()

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._asked_at = number, now
            if not self.saves:
                self._deadline = now + SECONDS_TO_HEAR
            elif _speaks():
                again = "; a second Ctrl-C ends it at once" if number == signal.SIGINT else ""
                _say(f"{name_of(number)}: the run ends after this step and saves{again}")
        elif self._first == signal.SIGINT and now - self._asked_at > SECONDS_OF_ONE_REQUEST:
            _end(number, "a second request: ended at once, without saving")

    def _note_launcher(self) -> None:
        self._launcher, self._launcher_died = None, True
        seconds = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
        self._deadline = time.monotonic() + (seconds if self.saves else SECONDS_TO_HEAR)
        if _speaks():
            what = "the run ends after this step and saves" if self.saves else "the run ends"
            _say(f"{name_of(LAUNCHER_DIED)}: {what}")
        # wakes the main thread where it waits for a file
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _end_late(self) -> None:
        if self.saves and not self._launcher_died:  # asked as the first step began
            self._deadline = float("inf")
        elif self.number and not self.saves and not self._heard:
            self._heard = True
            self._deadline += SECONDS_TO_END
        else:
            number = LAUNCHER_DIED if self._launcher_died else self._first or signal.SIGTERM
            late = "the step was not done in time: ended without saving"
            _end(number, late if self.saves else "ended before the first step")


def launcher() -> int | None:
    """The process number of torchrun where it has started this process, otherwise None: a shell
    may end before what it has started. Call it early, while torchrun lives.
    """
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def end_at_once(number: int, frame: FrameType | None = None) -> None:
    """A handler for what leaves nothing to clean up: the imports of a program, a command that may
    be killed at any moment.
    """
    _end(number, "ended")


def end_at_once_on_signals() -> None:
    """For a program, at its start: STOP_SIGNALS end it in a line, except for those that it was
    started to ignore (nohup).
    """
    _set_handlers(end_at_once)


@contextmanager
def stop_requests(launcher: int | None = None) -> Iterator[StopRequests]:
    """The requests that reach this process. One that comes before `save_first` is called, or
    whatever exception it turns into on its way, ends the process with a line and the request's
    `exit_status`. launcher: the process whose death is a request. Outside of the main thread, where
    there are no handlers, there are no requests.
    """
    requests = StopRequests(launcher)
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before: dict[signal.Signals, Any] = {}
    thread = threading.Thread(target=requests.watch, args=(reader,), name="signals", daemon=True)
    thread.start()
    try:
        before = _set_handlers(requests.on_signal)
        yield requests
    except BaseException:
        if not requests.number or requests.saves:
            raise
        if _speaks():
            _say(f"{name_of(requests.number)}: ended before the first step")
        # the end of the interpreter may wait for other ranks, but not for long
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(SECONDS_TO_END))
        raise SystemExit(exit_status(requests.number)) from None
    finally:
        for number, handler in before.items():
            # what stood for the time of the imports has done its part
            signal.signal(number, signal.SIG_DFL if handler is end_at_once else handler)
        signal.set_wakeup_fd(wakeup)
        os.write(writer, _LAST)
        thread.join()
        os.close(reader)
        os.close(writer)


def name_of(number: int) -> str:
    """What a request is called."""
    others = {LAUNCHER_DIED: "the launcher died", FOLDER_LOST: "--output_dir was taken over"}
    return others.get(number) or signal.Signals(number).name


def exit_status(number: int) -> int:
    """Of a process that such a request has ended: 128 and the signal, as shells say it; the end of
    what has started a process is a SIGHUP.
    """
    return 128 + (signal.SIGHUP if number == LAUNCHER_DIED else number)


def stopped_line(number: int, step: int, total_steps: int, way_on: str) -> str:
    """What a run says at its end that was asked to stop and has saved."""
    return f"{name_of(number)}: stopped after step {step} of {total_steps}; go on with {way_on}"


def _set_handlers(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """The handlers before, of the signals that now have this one."""
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def _speaks() -> bool:
    """All processes of a machine hear the same; one of them speaks."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _say(line: str) -> None:
    """Past the interpreter's own buffers, whose locks the main thread may hold."""
    rank = os.environ.get("RANK", "0")
    of_rank = "" if rank == "0" else f" (rank {rank})"
    with suppress(OSError):  # nobody may listen any more
        os.write(2, f"megatron_gkd: {line}{of_rank}\n".encode())


def _end(number: int, what: str) -> NoReturn:
    if _speaks():
        _say(f"{name_of(number)}: {what}")
    os._exit(exit_status(number))
