"""Weights that several ranks hold, read once (--load_from_peers): each of those ranks reads a part
of them from the file system into its parameters, then all broadcast what they have read.
"""

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from megatron_gkd.formats.megatron_folder import MegatronFolder
from megatron_gkd.formats.safetensors_folder import SafetensorsFolder
from megatron_gkd.model.tensor_slice import ParameterSlice
from megatron_gkd.parallel import Parallel, first_error

BUCKET_BYTES = 64 << 20  # of a broadcast, and of the buffer that it needs on every rank
Folder = SafetensorsFolder | MegatronFolder


@dataclass(frozen=True)
class Bucket:
    """Slices, of one dtype, that a rank of `group` reads and broadcasts to the others."""

    parts: tuple[ParameterSlice, ...]
    group: ProcessGroup
    reader: int
    """Its number in the group"""

    @property
    def is_read_here(self) -> bool:
        return self.group.rank() == self.reader

    def broadcast(self) -> None:
        """Collectives: a broadcast of these slices' bytes in the group."""
        if self.group.size() == 1:
            return
        views = [part.view for part in self.parts]
        sizes = [view.numel() for view in views]
        flat = torch.empty(sum(sizes), dtype=views[0].dtype, device=views[0].device)
        if self.is_read_here:
            torch.cat([view.reshape(-1) for view in views], out=flat)
        source = distributed.get_global_rank(self.group, self.reader)
        # as bytes: not every backend has every dtype
        distributed.broadcast(flat.view(torch.uint8), source, group=self.group)
        if not self.is_read_here:
            for view, values in zip(views, flat.split(sizes)):
                view.copy_(values.view_as(view))


def no_one(number: int) -> None:
    """Who counts what is filled, where nobody does."""


def read(
    parts: Sequence[ParameterSlice], tensors: Folder, count: Callable[[int], object] = no_one
) -> int:
    """Fill `parts` from a folder, cast to their dtypes; returns the bytes that were read. count:
    told the elements that have just been filled. Raises ValueError or OSError for damaged files.
    """
    num_bytes = 0
    for part in parts:
        values = tensors.slice(part.stored.name)[part.stored.slices]
        num_bytes += values.nbytes
        part.view.copy_(values)
        count(values.numel())
    return num_bytes


def read_or_end_all(
    parts: Sequence[ParameterSlice],
    open_folder: Callable[[], Folder],
    parallel: Parallel,
    count: Callable[[int], object] = no_one,
) -> int:
    """`read`, on every rank of the world, of a folder that a rank with nothing to read does not
    open. Raises ValueError on every rank, with the same text, where one of them could not read.
    Collectives: those of `first_error`.
    """
    num_bytes, error, mistake = 0, "", None
    try:
        if parts:
            num_bytes = read(parts, open_folder(), count)
    except (ValueError, OSError, SafetensorError) as caught:
        error = str(caught) or type(caught).__name__
    except Exception as caught:  # of this code: the other ranks wait all the same
        error, mistake = f"{type(caught).__name__}: {caught}", caught
    where = f" (rank {parallel.rank}, on {platform.node()})"
    if said := first_error(error + where if error else "", parallel.device):
        raise mistake or ValueError(said)
    return num_bytes


def read_with_peers(
    shared: Sequence[tuple[Sequence[ParameterSlice], ProcessGroup]],
    open_folder: Callable[[], Folder],
    parallel: Parallel,
    count: Callable[[int], object] = no_one,
) -> int:
    """`read` of slices that other ranks hold too. Every rank of the world calls it, also one that
    holds nothing; returns the bytes that this one has read.

    shared: slices, and the group of the ranks that have the same ones in the same order. The folder
    is opened by the ranks that read something of it.

    Raises as `read_or_end_all`: nothing is broadcast then. Collectives: its own; broadcasts of at
    most BUCKET_BYTES in the groups, each byte of a slice in one of them.
    """
    all_buckets = [bucket for parts, group in shared for bucket in buckets(parts, group)]
    own = [part for bucket in all_buckets if bucket.is_read_here for part in bucket.parts]
    num_bytes = read_or_end_all(own, open_folder, parallel, count)
    for bucket in all_buckets:
        bucket.broadcast()
        if not bucket.is_read_here:
            count(sum(part.view.numel() for part in bucket.parts))
    return num_bytes


def buckets(parts: Sequence[ParameterSlice], group: ProcessGroup) -> Iterator[Bucket]:
    """`parts` in buckets of at most BUCKET_BYTES (or one row), which the ranks of the group read in
    turn: the same on each of them.
    """
    number = 0
    for dtype in dict.fromkeys(part.parameter.dtype for part in parts):
        same = [part for part in parts if part.parameter.dtype == dtype]
        bucket: list[ParameterSlice] = []
        num_bytes = 0
        for piece in (piece for part in same for piece in _pieces(part)):
            if bucket and num_bytes + _num_bytes(piece.view) > BUCKET_BYTES:
                yield Bucket(tuple(bucket), group, number % group.size())
                bucket, num_bytes, number = [], 0, number + 1
            bucket.append(piece)
            num_bytes += _num_bytes(piece.view)
        yield Bucket(tuple(bucket), group, number % group.size())
        number += 1


def _pieces(part: ParameterSlice) -> Iterator[ParameterSlice]:
    """The slice, cut between rows where it is larger than a bucket."""
    view = part.view
    num_rows = len(view)
    step = max(1, BUCKET_BYTES * num_rows // max(1, _num_bytes(view)))
    if step >= num_rows:
        yield part
        return
    *matrix, rows = part.where
    assert isinstance(rows, slice)
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        where = (*matrix, slice(rows.start + first, rows.start + last))
        yield replace(part, stored=part.stored.narrow(first, last), where=where)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
