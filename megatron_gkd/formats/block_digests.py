"""Digests of a Megatron checkpoint's numbers in blocks of rows, written by the converter: a run
compares what it reads while it reads it. A block is read whole where a part of it is needed, so the
cuts of tensor parallelism are edges of blocks: between heads, and in a padded vocabulary.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_gkd.formats.stored_tensor import as_matrix, memory, read_block
from megatron_gkd.formats.word_sum import file_sum, word_sum

DIGESTS = "block_digests.json"
_LEAST_ROWS = 128  # of a block: a head's, and what a rank's rows of a vocabulary are a multiple of
_BLOCK_BYTES = 1 << 19  # of a block of more rows than these, at most
_DIGITS = 16
_WAY_OUT = "; convert it again (python -m checkpoint_tools.hf_to_megatron), or copy it again"


def block_digests(values: Tensor) -> str:
    """Of each block of rows of a chunk 16 hexadecimal digits, one behind the other. values: on the
    CPU, contiguous, rows of one matrix (or of more axes).
    """
    num_rows, width = as_matrix(tuple(values.shape))
    row_bytes, data = width * values.element_size(), memory(values)
    step = _rows_of_block(row_bytes)
    return "".join(
        f"{word_sum(data[first * row_bytes : (first + step) * row_bytes], 0):016x}"
        for first in range(0, num_rows, step)
    )


def _rows_of_block(row_bytes: int) -> int:
    return _LEAST_ROWS * max(1, _BLOCK_BYTES // max(_LEAST_ROWS * row_bytes, 1))


def write_digests(folder: Path, metadata: str, of_chunks: Mapping[str, Mapping[int, str]]) -> None:
    """of_chunks: file -> first byte of each chunk in it -> its `block_digests`. metadata: name of
    the file that says which chunk is where.
    """
    content = {metadata: f"{file_sum(folder / metadata):016x}", "chunks": of_chunks}
    (folder / DIGESTS).write_text(json.dumps(content))


class BlockDigests:
    """What `write_digests` has written of the checkpoint in `folder`."""

    def __init__(self, folder: Path, metadata: str):
        """Raises ValueError naming this file or `metadata` where one of them is damaged."""
        self.path = folder / DIGESTS
        try:
            content = json.loads(self.path.read_bytes())
            of_metadata = content[metadata]
            self._of_chunks: dict[tuple[str, int], str] = {
                (file, int(start)): digests
                for file, chunks in content["chunks"].items()
                for start, digests in chunks.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{self.path}: damaged, not the digests of a checkpoint{_WAY_OUT}"
            ) from error
        found = f"{file_sum(folder / metadata):016x}"
        if found != of_metadata:
            raise ValueError(
                f"{folder / metadata}: its content has digest {found}, and {DIGESTS} says "
                f"{of_metadata}: damaged, or changed since the conversion{_WAY_OUT}"
            )

    def read_block(
        self,
        path: Path,
        chunk_start: int,
        start: int,
        dtype: torch.dtype,
        size: tuple[int, int],
        rows: range,
        columns: range,
    ) -> Tensor:
        """`stored_tensor.read_block` of a chunk's matrix [rows, columns] = `size`, at byte `start`
        of the file, in the chunk that begins at byte `chunk_start`; of every block of rows that it
        has a part of all bytes are read and compared. Raises ValueError naming the file where one
        is not as it was written.
        """
        digests = self._of_chunks.get((path.name, chunk_start), "")
        row_bytes = size[1] * dtype.itemsize
        step = _rows_of_block(row_bytes)
        blocks = range(rows.start // step, -(-rows.stop // step))
        wide = range(blocks.start * step, min(blocks.stop * step, size[0]))
        matrix = read_block(path, start, dtype, size[1], wide, range(size[1]))
        data = memory(matrix)
        for place, block in enumerate(blocks):
            part = data[place * step * row_bytes : (place + 1) * step * row_bytes]
            found = f"{word_sum(part, 0):016x}"
            known = digests[_DIGITS * block : _DIGITS * (block + 1)]
            if found != known:
                first = start + block * step * row_bytes
                raise ValueError(
                    f"{path}: bytes {first:,} to {first + len(part):,} have digest {found}, and "
                    f"{DIGESTS} says {known or 'nothing of them'}: damaged, or changed since the "
                    f"conversion{_WAY_OUT}"
                )
        first_row = rows.start - wide.start
        return matrix[first_row : first_row + len(rows), columns.start : columns.stop]
