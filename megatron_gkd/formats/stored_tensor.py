"""A tensor in a file, not read yet: any rows and columns of it, and the shards in which a folder's
tensors are read, hashed and written.

Bytes come with plain reads: pages of mapped files would count as this process's memory.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
DECODER_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # nothing quantised
DECODER_DTYPE_NAMES = tuple(SAFETENSORS_NAMES[dtype] for dtype in DECODER_DTYPES)
SHARD_BYTES = 256 << 20
BLOCK_BYTES = 32 << 20  # read, hashed and written at once


class LazyTensor(Protocol):
    """A tensor of a folder or a checkpoint: described at once, read by the rows asked for."""

    @property
    def num_bytes(self) -> int: ...

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str:
        """safetensors' name"""

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        """`[rows, columns]` of a matrix; `[rows]` are whole rows, in the tensor's own shape."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file: a `LazyTensor`."""

    path: Path
    name: str
    dtype_name: str
    size: tuple[int, ...]
    start: int  # first byte in the file

    def get_shape(self) -> list[int]:
        return list(self.size)

    def get_dtype(self) -> str:
        return self.dtype_name

    @property
    def dtype(self) -> torch.dtype:
        """Raises ValueError for a type that torch does not have."""
        if self.dtype_name not in SAFETENSORS_DTYPES:
            raise ValueError(
                f"{self.path}: tensor {self.name} is {self.dtype_name}, "
                f"expected one of {sorted(SAFETENSORS_DTYPES)}"
            )
        return SAFETENSORS_DTYPES[self.dtype_name]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        rows = range(*index[0].indices(self.size[0])) if self.size else range(1)
        width = math.prod(self.size[1:])
        columns = range(*index[1].indices(width)) if len(index) > 1 else range(width)
        found = read_block(self.path, self.start, self.dtype, width, rows, columns)
        return found if len(index) > 1 else as_rows(found, self.size)


def as_rows(matrix: Tensor, size: tuple[int, ...]) -> Tensor:
    """Whole rows of a tensor of shape `size`, read as a matrix, in that tensor's number of axes."""
    return matrix.reshape([len(matrix), *size[1:]] if size else [])


def as_matrix(size: tuple[int, ...]) -> tuple[int, int]:
    """[rows, columns] of a tensor of shape `size`: its first axis, and all others as one."""
    return (size[0] if size else 1, math.prod(size[1:]))


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_block(
    path: Path, start: int, dtype: torch.dtype, width: int, rows: range, columns: range
) -> Tensor:
    """Rows and columns of the row-major matrix of `width` columns at byte `start`: only their bytes
    are read.

    Raises ValueError naming `path` when it ends early.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_opened(descriptor, path, start, dtype, width, rows, columns)
    finally:
        os.close(descriptor)


def read_opened(
    descriptor: int,
    path: Path,
    start: int,
    dtype: torch.dtype,
    width: int,
    rows: range,
    columns: range,
) -> Tensor:
    """`read_block` of an open file, for many small tensors of one: a network file system asks
    its server at each opening.
    """
    matrix = torch.empty(len(rows), len(columns), dtype=dtype)
    contiguous = [matrix] if len(columns) == width else list(matrix)
    for number, target in enumerate(contiguous):
        offset = ((rows.start + number) * width + columns.start) * dtype.itemsize
        _read_into(descriptor, target, start + offset, path)
    return matrix


def _read_into(descriptor: int, target: Tensor, offset: int, path: Path) -> None:
    view, done = memory(target), 0
    while done < len(view):
        read = os.preadv(descriptor, [view[done:]], offset + done)
        if not read:
            raise ValueError(
                f"{path}: truncated, ends {len(view) - done} bytes before byte {offset + len(view)}"
            )
        done += read


@dataclass(frozen=True)
class Shard:
    """Tensors that follow each other in one safetensors file, in the order of their bytes: what a
    worker process converts at a time.
    """

    file: str
    names: tuple[str, ...]
    num_bytes: int


def plan_shards(
    files: dict[str, dict[str, StoredTensor]], shard_bytes: int = SHARD_BYTES
) -> list[Shard]:
    """`files`: file -> its tensors in the order of their bytes. A tensor larger than `shard_bytes`
    is a shard by itself.
    """
    shards = []
    for file, tensors in files.items():
        names: list[str] = []
        num_bytes = 0
        for name, tensor in tensors.items():
            if names and num_bytes + tensor.num_bytes > shard_bytes:
                shards.append(Shard(file, tuple(names), num_bytes))
                names, num_bytes = [], 0
            names.append(name)
            num_bytes += tensor.num_bytes
        if names:
            shards.append(Shard(file, tuple(names), num_bytes))
    return shards


def row_blocks(tensor: LazyTensor, cuts: tuple[int, ...] = ()) -> Iterator[slice]:
    """The tensor's rows in order, in blocks of at most BLOCK_BYTES, none of them across one of the
    rows `cuts`.
    """
    size = tensor.get_shape()
    num_rows = size[0] if size else 1
    row_bytes = max(tensor.num_bytes // max(num_rows, 1), 1)
    step = max(BLOCK_BYTES // row_bytes, 1)
    edges = sorted({0, num_rows, *(cut for cut in cuts if 0 < cut < num_rows)})
    for start, stop in zip(edges, edges[1:]):
        for first in range(start, stop, step):
            yield slice(first, min(first + step, stop))
    if not num_rows:
        yield slice(0, 0)
