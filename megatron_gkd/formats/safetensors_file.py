"""A safetensors file whose header is known before its numbers: several processes write them, each
to the bytes of its own.

The file has its final size from the start; what nobody writes is zero. Of the file system this asks
what POSIX says of writes to ranges that do not overlap. Network file systems keep it as the file is
used here: opened after it has its size, for writing alone, synced before anybody reads.
"""

import errno
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.errors import naming
from megatron_gkd.formats.stored_tensor import BLOCK_BYTES, memory
from megatron_gkd.formats.word_sum import added, word_sum

FLOAT32_BYTES = 4
_EDGE_BYTES = 64  # of what a process has written, read once more at both ends
SECONDS_TO_APPEAR = 30  # of a file that another machine has made; NFS keeps an old answer as long

Sizes = Mapping[str, Sequence[int]]  # name -> shape of an fp32 tensor


class Run(NamedTuple):
    """Numbers one behind the other in a file: `values`, fp32 [n], begin at byte `start`."""

    start: int
    values: Tensor


class Edge(NamedTuple):
    """Some bytes that this process has written, and where."""

    start: int
    content: bytes


def first_bytes(sizes: Sizes) -> dict[str, int]:
    """Tensor -> its first byte behind the header: in the order of the names, without a gap."""
    found, end = {}, 0
    for name in sorted(sizes):
        found[name] = end
        end += FLOAT32_BYTES * math.prod(sizes[name])
    return found


def total_bytes(sizes: Sizes) -> int:
    """Of all tensors, without the header."""
    return FLOAT32_BYTES * sum(math.prod(size) for size in sizes.values())


def make_header(sizes: Sizes, metadata: dict[str, str], *, compact: bool = True) -> bytes:
    """The header of a file of these tensors, to the bytes: safetensors' own save_file puts metadata
    in an order of chance. compact: without blanks, as save_file writes it.
    """
    comma, colon = (",", ":") if compact else (", ", ": ")
    entries = [f'"__metadata__"{colon}{json.dumps(metadata, separators=(comma, colon))}']
    for name, start in first_bytes(sizes).items():
        shape = comma.join(map(str, sizes[name]))
        stop = start + FLOAT32_BYTES * math.prod(sizes[name])
        # as json.dumps would, which takes a second for the tensors of a large model
        entries.append(
            f'{json.dumps(name)}{colon}{{"dtype"{colon}"F32"{comma}"shape"{colon}[{shape}]{comma}'
            f'"data_offsets"{colon}[{start}{comma}{stop}]}}'
        )
    text = ("{" + comma.join(entries) + "}").encode()
    return text + b" " * (-len(text) % 8)


def write_header(path: Path, header: bytes, num_bytes: int) -> None:
    """Make (or keep) a safetensors file of final size: its header, and room for `num_bytes` of
    tensors.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with naming(path):
            os.ftruncate(descriptor, 8 + len(header) + num_bytes)
            write_all(descriptor, len(header).to_bytes(8, "little") + header, 0)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_to_write(path: Path) -> int:
    """Descriptor of a file that another process has made: a network file system may show it late.
    Raises FileNotFoundError where it does not within SECONDS_TO_APPEAR.
    """
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while True:
        try:
            return os.open(path, os.O_WRONLY)
        except OSError as error:  # ESTALE: a folder of that name that has been replaced
            if error.errno not in (errno.ENOENT, errno.ESTALE) or time.monotonic() > deadline:
                raise
        time.sleep(0.2)
        with suppress(OSError):
            os.listdir(path.parent)  # has the file system ask for the names again


def write_runs(path: Path, runs: Iterable[Run]) -> tuple[int, list[Edge], int]:
    """Write `runs`, none of which overlap, into a file that is there; they are on the disk when
    this returns. (bytes written, what to look at again once all have written, their share of the
    file's word_sum).

    BLOCK_BYTES at a time are gathered on the device and copied to the host; neighbours in the file
    are one write.
    """
    num_bytes, edges, digest = 0, [], 0
    descriptor = open_to_write(path)
    try:
        with naming(path):
            for block in _blocks(sorted(_cut(runs), key=lambda run: run.start)):
                data = memory(torch.cat([run.values for run in block]).cpu())
                first = 0
                for start, stop in _ranges(block):
                    content = data[first : first + stop - start]
                    write_all(descriptor, content, start)
                    digest = added([digest, word_sum(content, start)])
                    first += stop - start
                    edges.append(Edge(start, bytes(content[:_EDGE_BYTES])))
                    tail = bytes(content[-_EDGE_BYTES:])
                    edges.append(Edge(stop - len(tail), tail))
                num_bytes += len(data)
                edges = [edges[0], edges[-1]]
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return num_bytes, edges, digest


def check_edges(path: Path, edges: Iterable[Edge]) -> None:
    """Raise OSError where what this process wrote is not in the file any more: another one that
    wrote beside it took a whole page for its own.
    """
    with open(path, "rb") as file:
        for start, content in edges:
            if os.pread(file.fileno(), len(content), start) != content:
                raise OSError(
                    f"{path}: bytes {start} to {start + len(content)} are not what was written "
                    "there: this file system loses writes of several machines into one file"
                )


def _cut(runs: Iterable[Run]) -> Iterator[Run]:
    """None of them longer than a block."""
    most = BLOCK_BYTES // FLOAT32_BYTES
    for run in runs:
        assert run.values.dtype == torch.float32
        if len(run.values) <= most:
            yield run
            continue
        for first in range(0, len(run.values), most):
            yield Run(run.start + first * FLOAT32_BYTES, run.values[first : first + most])


def _blocks(runs: list[Run]) -> Iterator[list[Run]]:
    block: list[Run] = []
    room = BLOCK_BYTES
    for run in runs:
        if block and run.values.nbytes > room:
            yield block
            block, room = [], BLOCK_BYTES
        block.append(run)
        room -= run.values.nbytes
    if block:
        yield block


def _ranges(block: list[Run]) -> Iterator[tuple[int, int]]:
    """(first byte, behind the last) of what touches in the file."""
    start = stop = block[0].start
    for run in block:
        if run.start != stop:
            yield start, stop
            start = run.start
        stop = run.start + run.values.nbytes
    yield start, stop


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data` at byte `offset`, in as many calls as it takes."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
