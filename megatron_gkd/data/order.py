"""Seeded permutations, the same on every rank, machine and numpy version; the rows of each step."""

from collections.abc import Callable
from functools import lru_cache

import numpy

# Purposes of permutations. Each has its own random stream, independent of the others.
SUBSET, SPLIT, EPOCH, EPOCH_OF_RESPONSES, SAMPLED = 1, 2, 3, 4, 5


def permutation(num_rows: int, seed: int, *stream: int) -> numpy.ndarray:
    """A permutation of range(num_rows), int64, as a pure function of its arguments (no global
    random state).
    """
    bits = numpy.random.MT19937(numpy.random.SeedSequence((seed, *stream)))
    return numpy.random.RandomState(bits).permutation(num_rows)


class StepRows:
    """`step_rows(step)`: the row indices of the step's global batch, a function of (seed, step).

    Where every row has a response, step after step takes its slice of one sequence of epochs.
    Otherwise steps that learn from the data set's own responses go through the rows that have one,
    and the other steps through all rows, each kind of step in epochs of its own: a slice is taken
    by the number of earlier steps of its kind.
    """

    def __init__(
        self,
        has_response: numpy.ndarray,
        needs_response: Callable[[int], bool],
        global_batch_size: int,
        seed: int,
    ):
        """has_response: bool, of each row. needs_response: step -> whether its rows need one."""
        self._num_rows = len(has_response)
        self._with_response = numpy.flatnonzero(has_response)
        self._needs_response = needs_response
        self._size, self._seed = global_batch_size, seed
        self._num_needing = [0]  # of the steps before each step, those that need responses

    def __call__(self, step: int) -> numpy.ndarray:
        if len(self._with_response) == self._num_rows:
            return batch_indices(step, self._size, self._num_rows, self._seed)
        numbers = self._num_needing
        while len(numbers) <= step:
            numbers.append(numbers[-1] + self._needs_response(len(numbers) - 1))
        if not self._needs_response(step):
            return batch_indices(step - numbers[step], self._size, self._num_rows, self._seed)
        rows = self._with_response
        assert len(rows), "a run whose steps need responses has rows with one"
        return rows[
            batch_indices(numbers[step], self._size, len(rows), self._seed, EPOCH_OF_RESPONSES)
        ]


def batch_indices(
    step: int, global_batch_size: int, num_rows: int, seed: int, stream: int = EPOCH
) -> numpy.ndarray:
    """Row indices of the global batch of `step`: a slice of the endless sequence of seeded epoch
    permutations. global_batch_size: in samples.
    """
    first = step * global_batch_size
    numbers = numpy.arange(first, first + global_batch_size)
    epochs, positions = numbers // num_rows, numbers % num_rows
    indices = numpy.empty_like(numbers)
    for epoch in numpy.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = _epoch_order(num_rows, seed, stream, int(epoch))[positions[chosen]]
    return indices


@lru_cache(maxsize=4)  # two epochs of two streams
def _epoch_order(num_rows: int, seed: int, stream: int, epoch: int) -> numpy.ndarray:
    return permutation(num_rows, seed, stream, epoch)
