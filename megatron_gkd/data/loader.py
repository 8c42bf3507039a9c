"""Batches in order. The order is a pure function of (seed, step): a resumed run reads no earlier
batches, and the global batch of a step holds the same rows whatever the number of data-parallel
ranks and workers.

Within a step, micro-batch m of rank r takes samples [(m * dp_size + r) * B, ... + B) of the global
batch, B = per-device batch size.
"""

import math
import signal
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_gkd.data.batch import Batch, collate
from megatron_gkd.data.dataset import SampleDataset
from megatron_gkd.data.order import batch_indices
from megatron_gkd.data.sample import Sample
from megatron_gkd.errors import DataError

PADDING_SAMPLE = -1
"""The index of a padding sample, which fills up a batch"""


def num_steps_of_epochs(num_rows: int, global_batch_size: int, num_epochs: float) -> int:
    """Optimizer steps that cover `num_epochs` epochs, at least 1. The last one may reach into the
    next epoch.
    """
    return max(1, math.ceil(num_rows * num_epochs / global_batch_size - 1e-9))


class _PaddedDataset(Dataset[Sample | DataError | None]):
    """A SampleDataset in which index PADDING_SAMPLE gives None.

    A row whose media cannot be read gives its DataError instead of raising it, which in a worker
    would hide the reason behind a traceback; with --skip_bad_rows it gives None.
    """

    def __init__(self, dataset: SampleDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> Sample | DataError | None:
        if index == PADDING_SAMPLE:
            return None
        try:
            return self.dataset[index]
        except DataError as error:
            if not self.dataset.skip_bad_rows:
                return error
            print(f"Left out (--skip_bad_rows): {error}", file=sys.stderr, flush=True)
            return None


def _collate(
    samples: list[Sample | DataError | None], pad_token_id: int, pad_to_multiple_of: int
) -> Batch | DataError:
    """The batch, or the first error among the samples."""
    good: list[Sample | None] = []
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
        good.append(sample)
    return collate(good, pad_token_id, pad_to_multiple_of)


def _outlive_sigterm(worker: int) -> None:
    """torchrun and Slurm send SIGTERM to every process, and the rank still needs its workers to
    finish its step: they end when it does.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _batches(
    dataset: SampleDataset,
    micro_batches: Iterable[list[int]],
    num_workers: int,
    pad_token_id: int,
    pad_to_multiple_of: int,
) -> Generator[Batch, None, None]:
    """One Batch per list of row indices; torch's global random state is not touched. Close it
    (contextlib.closing): workers that ignore SIGTERM end only when told to, and a process that
    waits for them never exits.
    """
    batches: Any = iter(
        DataLoader(
            _PaddedDataset(dataset),
            batch_sampler=micro_batches,
            collate_fn=partial(
                _collate, pad_token_id=pad_token_id, pad_to_multiple_of=pad_to_multiple_of
            ),
            num_workers=num_workers,
            # forked workers inherit the mapped rows, whose file is already deleted
            multiprocessing_context="fork" if num_workers else None,
            worker_init_fn=_outlive_sigterm,
            generator=torch.Generator(),
        )
    )
    try:
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        if num_workers:
            batches._shutdown_workers()


def _micro_batches(
    indices: Sequence[int] | np.ndarray, size: int, dp_rank: int, dp_size: int
) -> Iterator[list[int]]:
    """This rank's micro-batches of a global batch of `indices`, `size` indices each."""
    for first in range(dp_rank * size, len(indices), dp_size * size):
        yield [int(index) for index in indices[first : first + size]]


def step_loader(
    dataset: SampleDataset,
    *,
    per_device_batch_size: int,
    gradient_accumulation_steps: int,
    dp_rank: int,
    dp_size: int,
    seed: int,
    start_step: int,
    num_steps: int,
    num_workers: int,
    pad_token_id: int,
    pad_to_multiple_of: int,
) -> Generator[list[Batch], None, None]:
    """For each optimizer step in [start_step, num_steps) this rank's micro-batches,
    `gradient_accumulation_steps` of them. Close it (contextlib.closing), however the run ends.

    `num_steps` is the length of the whole run, resumed or not. Raises DataError for a medium that
    cannot be read.
    """
    global_batch_size = per_device_batch_size * gradient_accumulation_steps * dp_size
    micro_batches = (
        micro_batch
        for step in range(start_step, num_steps)
        for micro_batch in _micro_batches(
            batch_indices(step, global_batch_size, len(dataset), seed),
            per_device_batch_size,
            dp_rank,
            dp_size,
        )
    )
    with closing(
        _batches(dataset, micro_batches, num_workers, pad_token_id, pad_to_multiple_of)
    ) as batches:
        for _ in range(start_step, num_steps):
            yield [next(batches) for _ in range(gradient_accumulation_steps)]


def eval_loader(
    dataset: SampleDataset,
    *,
    per_device_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int,
    pad_token_id: int,
    pad_to_multiple_of: int,
) -> Iterator[Batch]:
    """Every row once over all ranks, in order; padding samples at the end give each rank the same
    number of full batches.
    """
    stride = per_device_batch_size * dp_size
    indices = list(range(len(dataset)))
    indices += [PADDING_SAMPLE] * (-len(indices) % stride)
    micro_batches = _micro_batches(indices, per_device_batch_size, dp_rank, dp_size)
    return _batches(dataset, micro_batches, num_workers, pad_token_id, pad_to_multiple_of)
