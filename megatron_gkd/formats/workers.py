"""Shards on several processes, with results and progress as they come; no process outlives the
command.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

Report = Callable[[int], None]  # called with a number of bytes done
Work = Callable[[int, Report], Any]  # shard number, report -> result


def run_workers(
    work: Work, shards: Iterable[int], num_workers: int, report: Report
) -> Iterator[tuple[int, Any]]:
    """Yield (shard, work(shard)) as shards finish. `report` is called in this process.

    Raises ValueError with a worker's own message when its shard fails, RuntimeError when a worker
    dies.
    """
    todo = iter(shards)
    workers: dict[Connection, multiprocessing.Process] = {}
    context = multiprocessing.get_context(
        "fork"
    )  # the children share what this process has imported and read
    try:
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
            ours.send(next(todo, None))
        while workers:
            for connection in wait(list(workers)):
                kind, *content = _receive(connection)
                if kind == "bytes":
                    report(*content)
                elif kind == "done":
                    connection.send(next(todo, None))
                    yield tuple(content)
                elif kind == "error":
                    raise ValueError(content[0])
                else:
                    workers.pop(connection).join()
    finally:
        for process in workers.values():
            process.kill()
            process.join()


def _receive(connection: Connection) -> tuple:
    try:
        return connection.recv()
    except EOFError:
        raise RuntimeError(
            "a worker process died (out of memory?); the same command continues, fewer --num_workers need less memory"
        ) from None


def _serve(connection: Connection, work: Work, parent: int) -> None:
    """A worker's life: one shard after the other until None comes. Leaves at once when the parent is
    gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    torch.set_num_threads(1)

    def leave_if_orphaned() -> None:
        if os.getppid() != parent:
            os._exit(1)

    def report(num_bytes: int) -> None:
        leave_if_orphaned()
        connection.send(("bytes", num_bytes))

    while True:
        while not connection.poll(0.5):
            leave_if_orphaned()
        shard = connection.recv()
        if shard is None:
            connection.send(("bye",))
            return
        try:
            connection.send(("done", shard, work(shard, report)))
        except Exception as error:  # whatever it is, the command says it and stops
            kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
            connection.send(("error", f"{kind}{error}"))
            return
