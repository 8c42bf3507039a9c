"""Bytes of a file -> a tensor, with plain reads: pages of mapped files would count as this
process's memory.
"""

import os
from pathlib import Path

import torch
from torch import Tensor


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def read_block(
    path: Path, start: int, dtype: torch.dtype, width: int, rows: range, columns: range
) -> Tensor:
    """Rows and columns of the row-major matrix of `width` columns at byte `start`: only their bytes
    are read.

    Raises ValueError naming `path` when it ends early.
    """
    block = torch.empty(len(rows), len(columns), dtype=dtype)
    pieces = [block] if len(columns) == width else list(block)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for number, piece in enumerate(pieces):
            offset = ((rows.start + number) * width + columns.start) * dtype.itemsize
            _read_into(descriptor, piece, start + offset, path)
    finally:
        os.close(descriptor)
    return block


def _read_into(descriptor: int, target: Tensor, offset: int, path: Path) -> None:
    view, done = memory(target), 0
    while done < len(view):
        read = os.preadv(descriptor, [view[done:]], offset + done)
        if not read:
            raise ValueError(
                f"{path}: truncated, ends {len(view) - done} bytes before byte {offset + len(view)}"
            )
        done += read
