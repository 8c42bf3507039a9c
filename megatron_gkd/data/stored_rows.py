"""Encoded rows on disk: written as arrow files, in processes if wished; memory-mapped, and read a
row or some columns at a time.
"""

import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from signal import SIGKILL
from typing import Any, cast

import numpy as np
import pyarrow
from tqdm import tqdm

from megatron_gkd.child_processes import begin_child, stop_signals_wait
from megatron_gkd.errors import DataError

ROWS_AT_ONCE = 100  # held in memory while they are written: a row may hold its media
SECONDS_OF_A_LINE = 30.0


class StoredRows:
    """Rows of arrow files with one schema, or some of them in ascending order. The files may be
    deleted afterwards; forked processes share the mapped memory.
    """

    def __init__(
        self,
        schema: pyarrow.Schema,
        batches: Sequence[pyarrow.RecordBatch],
        chosen: np.ndarray | None = None,
    ):
        self.schema, self._batches = schema, list(batches)
        lengths = [batch.num_rows for batch in self._batches]
        self._starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        self._chosen = np.arange(self._starts[-1]) if chosen is None else chosen

    @classmethod
    def open(cls, schema: pyarrow.Schema, files: Sequence[str]) -> "StoredRows":
        """Those of `files`, one behind the other."""
        batches = []
        for file in files:
            with pyarrow.ipc.open_stream(pyarrow.memory_map(file)) as reader:
                batches += list(reader)
        return cls(schema, batches)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self._chosen[index]
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        start = int(place - self._starts[number])
        return self._batches[number].slice(start, 1).to_pylist()[0]

    def __add__(self, other: "StoredRows") -> "StoredRows":
        chosen = np.concatenate((self._chosen, other._chosen + self._starts[-1]))
        return StoredRows(self.schema, self._batches + other._batches, chosen)

    def select(self, indices: Sequence[int] | np.ndarray) -> "StoredRows":
        """The rows at `indices`, which ascend."""
        places = self._chosen[np.asarray(indices, dtype=np.int64)]
        return StoredRows(self.schema, self._batches, places)

    def columns(self, *names: str) -> pyarrow.Table:
        """These columns of all rows; the others are not read."""
        parts = []
        ends = np.searchsorted(self._chosen, self._starts)
        for batch, start, first, end in zip(self._batches, self._starts, ends, ends[1:]):
            part = batch.select(names)
            whole = end - first == batch.num_rows
            parts.append(
                part if whole else part.take(pyarrow.array(self._chosen[first:end] - start))
            )
        return pyarrow.Table.from_batches(
            parts, pyarrow.schema([self.schema.field(name) for name in names])
        )


def write_rows(
    make_rows: Callable[[range], list[dict[str, Any]]],
    num_rows: int,
    schema: pyarrow.Schema,
    path: str,
    num_proc: int,
    description: str,
) -> list[str]:
    """`make_rows` of all parts of range(num_rows) into files named after `path`, one for each of
    `num_proc` forked processes; returns their names in the order of the rows. Rank 0 shows how far
    it is: a bar on a terminal, elsewhere a line now and then. Raises what `make_rows` raises, and
    DataError where a process dies.
    """
    num_proc = max(1, min(num_proc, num_rows))
    ends = [num_rows * part // num_proc for part in range(num_proc + 1)]
    files = [f"{path}.{part}" for part in range(num_proc)]
    works = [
        _write(make_rows, range(first, end), schema, file)
        for first, end, file in zip(ends, ends[1:], files)
    ]
    numbers = works[0] if num_proc == 1 else _in_processes(works)
    is_first = os.environ.get("RANK", "0") == "0"
    on_terminal = sys.stderr.isatty()
    start = shown = time.monotonic()
    done = 0
    bar = tqdm(
        total=num_rows, desc=description, unit=" rows", disable=not (is_first and on_terminal)
    )
    with bar:
        for number in numbers:
            done += number
            bar.update(number)
            now = time.monotonic()
            if is_first and not on_terminal and now - shown >= SECONDS_OF_A_LINE:
                shown, rate = now, done / (now - start)
                left = f", {(num_rows - done) / rate:.0f} s left" if done < num_rows else ""
                line = f"{description}: {done} of {num_rows}, {rate:.0f} rows/s{left}"
                print(line, file=sys.stderr, flush=True)
    return files


def _write(
    make_rows: Callable[[range], list[dict[str, Any]]],
    indices: range,
    schema: pyarrow.Schema,
    file: str,
) -> Iterator[int]:
    """Write one file; yields the number of rows after each of its batches."""
    with pyarrow.OSFile(file, "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for first in range(0, len(indices), ROWS_AT_ONCE):
            rows = make_rows(indices[first : first + ROWS_AT_ONCE])
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema))
            yield len(rows)


def _in_processes(works: Sequence[Iterator[int]]) -> Iterator[int]:
    """What the works yield, each in a fork of this process, which needs nothing pickled. No fork
    outlives the iteration. `os.fork`, since a daemonic rank may have no multiprocessing children.
    """
    running: dict[Connection, int] = {}
    try:
        for work in works:
            receiver, sender = Pipe(duplex=False)
            parent = os.getpid()
            with stop_signals_wait():
                process = os.fork()
                if not process:
                    try:
                        begin_child(parent)
                        # without a reader a fork whose parent was killed ends at its next number
                        for one in (*running, receiver):
                            one.close()
                        _run(work, sender)
                    finally:
                        os._exit(1)
                sender.close()
                running[receiver] = process
        while running:
            for ready in wait(list(running)):
                receiver = cast(Connection, ready)
                try:
                    found = receiver.recv()
                except EOFError:
                    _wait_for_own_signal()
                    raise DataError(
                        f"one of {len(works)} processes that read the rows was killed, perhaps for "
                        "want of memory: a lower --dataset_num_proc needs less"
                    ) from None
                if isinstance(found, tuple):
                    error, said = found
                    raise error from (None if isinstance(error, DataError) else RuntimeError(said))
                if found is None:
                    os.waitpid(running.pop(receiver), 0)
                    receiver.close()
                else:
                    yield found
    finally:
        for receiver, process in running.items():
            receiver.close()
            with suppress(ProcessLookupError):
                os.kill(process, SIGKILL)
            os.waitpid(process, 0)


def _wait_for_own_signal() -> None:
    """A signal to all processes may end a fork a moment before this process has heard of it, and is
    then the reason to tell.
    """
    time.sleep(0.2)


def _run(work: Iterator[int], sender: Connection) -> None:
    """A fork's life: numbers, then None, or an exception and its traceback's text."""
    last: tuple[BaseException, str] | None = None
    try:
        for number in work:
            sender.send(number)
    except BaseException as error:
        said = traceback.format_exc()
        try:
            last = pickle.loads(pickle.dumps(error)), said
        except Exception:
            last = RuntimeError(f"{type(error).__name__}: {error}"), said
    finally:
        with suppress(OSError):
            sender.send(last)
        os._exit(0)
