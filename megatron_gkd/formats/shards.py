"""How a folder is cut into units of work: tensors that follow each other in a file, up to some
hundred megabytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_gkd.formats.safetensors_folder import StoredTensor

UNIT_BYTES = 256 << 20
BLOCK_BYTES = 32 << 20  # read, hashed and written at once


@dataclass(frozen=True)
class Unit:
    """Tensors of one safetensors file, in the order of their bytes."""

    file: str
    names: tuple[str, ...]
    num_bytes: int


def plan_units(
    files: dict[str, dict[str, StoredTensor]], unit_bytes: int = UNIT_BYTES
) -> list[Unit]:
    """`files`: file -> its tensors in the order of their bytes. A tensor larger than a unit is one
    of its own.
    """
    units = []
    for file, tensors in files.items():
        names, num_bytes = [], 0
        for name, tensor in tensors.items():
            if names and num_bytes + tensor.num_bytes > unit_bytes:
                units.append(Unit(file, tuple(names), num_bytes))
                names, num_bytes = [], 0
            names.append(name)
            num_bytes += tensor.num_bytes
        if names:
            units.append(Unit(file, tuple(names), num_bytes))
    return units


def row_blocks(tensor, cuts: tuple[int, ...] = ()) -> Iterator[slice]:
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
