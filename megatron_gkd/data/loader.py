"""Batches in order. The order is a pure function of (seed, step): nothing is iterated to resume,
and the global batch of a step is the same rows whatever the number of data-parallel ranks and
workers.

Within a step, micro-batch m of rank r takes samples [(m * dp_size + r) * B, ... + B) of the global
batch, B = per-device batch size.
"""

import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial

import torch
from torch.utils.data import DataLoader

from megatron_gkd.data.batch import Batch, collate
from megatron_gkd.data.dataset import SampleDataset
from megatron_gkd.data.order import batch_indices
from megatron_gkd.data.sample import Sample
from megatron_gkd.errors import DataError

FILLER = -1


def num_steps_of_epochs(num_rows: int, global_batch_size: int, num_epochs: float) -> int:
    """Steps that see `num_epochs` times the rows, at least 1; the last one may run into the next
    epoch.
    """
    return max(1, math.ceil(num_rows * num_epochs / global_batch_size - 1e-9))


class _WithFillers:
    """A SampleDataset in which index FILLER gives None, and a row whose media cannot be read its
    DataError, or under --skip_bad_rows None too: a worker that raised would bury the reason under
    its traceback.
    """

    def __init__(self, dataset: SampleDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> Sample | DataError | None:
        if index == FILLER:
            return None
        try:
            return self.dataset[index]
        except DataError as error:
            if not self.dataset.skip_bad_rows:
                return error
            print(f"Left out (--skip_bad_rows): {error}", file=sys.stderr, flush=True)
            return None


def _collate(samples: list, pad_token_id: int, pad_to_multiple_of: int) -> Batch | DataError:
    errors = [sample for sample in samples if isinstance(sample, DataError)]
    return errors[0] if errors else collate(samples, pad_token_id, pad_to_multiple_of)


def _outlive_sigterm(worker: int) -> None:
    """torchrun and Slurm send SIGTERM to every process: the rank still needs its workers for the
    step it is in. They end with it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _batches(
    dataset, micro_batches, num_workers: int, pad_token_id: int, pad_to_multiple_of: int
) -> Iterator[Batch]:
    """One Batch per list of row indices. The loader has a generator of its own: torch's global
    random state stays untouched. Close it (contextlib.closing): workers that ignore SIGTERM end
    only when they are told to, and a process that waits for them never exits.
    """
    batches = iter(
        DataLoader(
            _WithFillers(dataset),
            batch_sampler=micro_batches,
            collate_fn=partial(
                _collate, pad_token_id=pad_token_id, pad_to_multiple_of=pad_to_multiple_of
            ),
            num_workers=num_workers,
            multiprocessing_context="fork"
            if num_workers
            else None,  # the rows' file is gone, their mapping is inherited
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
    indices: Sequence[int], size: int, dp_rank: int, dp_size: int
) -> Iterator[list[int]]:
    """This rank's lists of `size` indices out of a global batch, in order."""
    for first in range(dp_rank * size, len(indices), dp_size * size):
        yield [int(index) for index in indices[first : first + size]]


class _StepSampler:
    """Index lists of the micro-batches of steps [start_step, num_steps)."""

    def __init__(
        self,
        num_rows: int,
        size: int,
        accumulation: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        start_step: int,
        num_steps: int,
    ):
        self.num_rows, self.size, self.seed = num_rows, size, seed
        self.dp_rank, self.dp_size, self.global_batch_size = (
            dp_rank,
            dp_size,
            size * accumulation * dp_size,
        )
        self.steps = range(start_step, num_steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            indices = batch_indices(step, self.global_batch_size, self.num_rows, self.seed)
            yield from _micro_batches(indices, self.size, self.dp_rank, self.dp_size)


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
) -> Iterator[list[Batch]]:
    """For each optimizer step in [start_step, num_steps) this rank's micro-batches,
    `gradient_accumulation_steps` of them. Close it (contextlib.closing) in whatever way the run
    ends.

    `num_steps` is the length of the whole run, resumed or not. Raises DataError for a medium that
    cannot be read.
    """
    sampler = _StepSampler(
        len(dataset),
        per_device_batch_size,
        gradient_accumulation_steps,
        dp_rank,
        dp_size,
        seed,
        start_step,
        num_steps,
    )
    with closing(
        _batches(dataset, sampler, num_workers, pad_token_id, pad_to_multiple_of)
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
    """Every row once over all ranks, in order; filler rows at the end give each rank equally many
    batches of full size.
    """
    stride = per_device_batch_size * dp_size
    indices = list(range(len(dataset)))
    indices += [FILLER] * (-len(indices) % stride)
    micro_batches = list(_micro_batches(indices, per_device_batch_size, dp_rank, dp_size))
    return _batches(dataset, micro_batches, num_workers, pad_token_id, pad_to_multiple_of)
