"""Samples in order. The order is a pure function of (seed, step): a resumed run reads no earlier
samples, and the global batch of a step holds the same rows whatever the number of data-parallel
ranks, workers and micro-batches. How a step's rows are cut into micro-batches: micro_batches.py.
"""

import math
import os
import pickle
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_gkd.child_processes import STOP_SIGNALS, begin_child, stop_signals_wait
from megatron_gkd.data.micro_batches import Budget, cut_of_rank
from megatron_gkd.data.sample import Sample
from megatron_gkd.errors import DataError

EVAL_WINDOW = 256  # rows of a data-parallel rank that are cut into micro-batches together


class Numbered(NamedTuple):
    """A row of a step."""

    number: int
    """Its index in the step's global batch"""
    sample: Sample | None
    """None: a padding sample"""


PADDING = Numbered(-1, None)


class Samples(Protocol):
    """What loaders read: a SampleDataset."""

    skip_bad_rows: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def num_steps_of_epochs(num_rows: int, global_batch_size: int, num_epochs: float) -> int:
    """Optimizer steps that cover `num_epochs` epochs, at least 1. The last one may reach into the
    next epoch.
    """
    return max(1, math.ceil(num_rows * num_epochs / global_batch_size - 1e-9))


class _NumberedDataset(Dataset[Numbered | DataError]):
    """(number in the global batch, index of the row) -> Numbered.

    A row whose media cannot be read gives its DataError instead of raising it, which in a worker
    would hide the reason behind a traceback; with --skip_bad_rows it gives a padding sample.
    """

    def __init__(self, dataset: Samples):
        self.dataset = dataset

    def __getitem__(self, numbers: tuple[int, int]) -> Numbered | DataError:
        number, index = numbers
        try:
            return Numbered(number, self.dataset[index])
        except DataError as error:
            if not self.dataset.skip_bad_rows:
                return error
            print(f"Left out (--skip_bad_rows): {error}", file=sys.stderr, flush=True)
            return PADDING


def _begin_worker(parent: int, worker: int) -> None:
    """torchrun and Slurm send their signal to every process, a terminal too, and the rank still
    needs its workers to finish its step: they end when it does.
    """
    begin_child(parent, ignored=STOP_SIGNALS)


def _samples(
    dataset: Samples, numbers: Iterable[tuple[int, int]], num_workers: int, num_ahead: int
) -> Generator[Numbered, None, None]:
    """A sample for each (number, row index); torch's global random state is not touched. Workers
    are up to `num_ahead` rows ahead. Close it (contextlib.closing): workers that ignore signals end
    only when told to or when this process has gone, which waits for them at its end.

    Samples come from workers as bytes: in shared memory every tensor would hold a file descriptor.
    """
    reader = _NumberedDataset(dataset)
    if not num_workers:
        yield from (_checked(reader[pair]) for pair in numbers)
        return
    loader = DataLoader(
        reader,
        sampler=numbers,
        batch_size=None,
        collate_fn=pickle.dumps,
        num_workers=num_workers,
        prefetch_factor=max(2, math.ceil(num_ahead / num_workers)),
        # forked workers inherit the mapped rows, whose file is already deleted
        multiprocessing_context="fork",
        worker_init_fn=partial(_begin_worker, os.getpid()),
        generator=torch.Generator(),
    )
    with stop_signals_wait():
        loaded: Any = iter(loader)
    try:
        for found in loaded:
            yield _checked(pickle.loads(found))
    finally:
        loaded._shutdown_workers()


def _checked(found: Numbered | DataError) -> Numbered:
    if isinstance(found, DataError):
        raise found
    return found


def step_loader(
    dataset: Samples,
    step_rows: Callable[[int], np.ndarray],
    lengths: Callable[[int], Sequence[int] | np.ndarray],
    *,
    global_batch_size: int,
    budget: Budget,
    dp_rank: int,
    dp_size: int,
    start_step: int,
    num_steps: int,
    num_workers: int,
) -> Generator[list[list[Numbered]], None, None]:
    """For each optimizer step in [start_step, num_steps) the samples of this rank's micro-batches,
    as many as any other rank has. Close it (contextlib.closing), however the run ends.

    step_rows: step -> indices of its rows (`StepRows`). lengths: step -> tokens that each row of
    the data set will have in it. global_batch_size: rows of a step over all data-parallel ranks.
    `num_steps` is the length of the whole run, resumed or not. Raises DataError for a medium that
    cannot be read.
    """

    # the rows are asked for ahead of the step in which they are trained on
    @lru_cache(maxsize=64)
    def plan(step: int) -> list[list[tuple[int, int]]]:
        rows = step_rows(step)
        mine = cut_of_rank(np.asarray(lengths(step))[rows], budget, dp_size, dp_rank)
        return [[(number, int(rows[number])) for number in micro] for micro in mine]

    steps = range(start_step, num_steps)
    numbers = (pair for step in steps for micro in plan(step) for pair in micro)
    of_step = math.ceil(global_batch_size / dp_size)
    with closing(_samples(dataset, numbers, num_workers, num_ahead=of_step)) as samples:
        for step in steps:
            yield [[next(samples) for _ in micro] or [PADDING] for micro in plan(step)]


def eval_loader(
    dataset: Samples,
    rows: Sequence[int] | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    *,
    budget: Budget,
    dp_rank: int,
    dp_size: int,
) -> Iterator[list[Numbered]]:
    """The rows of these indices once over all ranks, cut window by window; every rank gets the same
    number of micro-batches. lengths: tokens of each row of the data set.
    """
    window, reader = EVAL_WINDOW * dp_size, _NumberedDataset(dataset)
    for first in range(0, len(rows), window):
        of_window = [int(row) for row in rows[first : first + window]]
        of_rows = [int(lengths[row]) for row in of_window]
        for micro in cut_of_rank(of_rows, budget, dp_size, dp_rank):
            found = [_checked(reader[of_window[place], of_window[place]]) for place in micro]
            yield found or [PADDING]
