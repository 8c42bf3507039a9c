"""Seeded permutations, the same on every rank, machine and numpy version."""

from functools import lru_cache

import numpy

# Purposes of permutations. Each has its own random stream, independent of the others.
SUBSET, SPLIT, EPOCH = 1, 2, 3


def permutation(num_rows: int, seed: int, *stream: int) -> numpy.ndarray:
    """A permutation of range(num_rows), int64, as a pure function of its arguments (no global
    random state).
    """
    bits = numpy.random.MT19937(numpy.random.SeedSequence((seed, *stream)))
    return numpy.random.RandomState(bits).permutation(num_rows)


def batch_indices(step: int, global_batch_size: int, num_rows: int, seed: int) -> numpy.ndarray:
    """Row indices of the global batch of `step`: a slice of the endless sequence of seeded epoch
    permutations. global_batch_size: in samples.
    """
    first = step * global_batch_size
    numbers = numpy.arange(first, first + global_batch_size)
    epochs, positions = numbers // num_rows, numbers % num_rows
    indices = numpy.empty_like(numbers)
    for epoch in numpy.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = _epoch_order(num_rows, seed, int(epoch))[positions[chosen]]
    return indices


@lru_cache(maxsize=2)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> numpy.ndarray:
    return permutation(num_rows, seed, EPOCH, epoch)
