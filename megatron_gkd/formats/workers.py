"""Shards on several processes, with results and progress as they come; no process outlives the
command.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from megatron_gkd.child_processes import begin_child, stop_signals_wait

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
    workers: dict[Connection, BaseProcess] = {}
    # By fork the children share what this process has imported and read.
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work, os.getpid()), daemon=True)
            with stop_signals_wait():
                process.start()
                theirs.close()
                workers[ours] = process
            ours.send(next(todo, None))
        while workers:
            ready = set(wait(list(workers)))
            for connection in [ours for ours in workers if ours in ready]:
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
        for worker in workers.values():
            worker.kill()
            worker.join()


def _receive(connection: Connection) -> tuple:
    try:
        return connection.recv()
    except EOFError:
        raise RuntimeError(
            "a worker process died (out of memory?); the same command continues, "
            "fewer --num_workers need less memory"
        ) from None


def _serve(connection: Connection, work: Work, parent: int) -> None:
    """A worker: shard after shard until None comes. Exits at once when the parent is gone."""
    begin_child(parent, ignored=(signal.SIGINT,))  # the parent answers Ctrl-C
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
