"""The order of rows: a pure function of seed and step, whatever the ranks, workers and the step it
starts from. How a step's rows are cut into micro-batches: test_data_micro_batches.py.
"""

import contextlib
import os
from collections import Counter
from dataclasses import replace

import numpy
import pytest
import torch

from megatron_gkd.data import (
    DataError,
    Sample,
    View,
    eval_loader,
    num_steps_of_epochs,
    step_loader,
)
from megatron_gkd.data.loader import EVAL_WINDOW, PADDING
from megatron_gkd.data.micro_batches import Budget, cut
from megatron_gkd.data.order import StepRows, batch_indices, permutation
from megatron_gkd.media.medium import Medium


class Rows:
    """`num_rows` samples of 3 to 10 tokens whose student prompt is their index again and again;
    every third has a teacher view, one token longer.
    """

    skip_bad_rows = False

    def __init__(self, num_rows):
        self.num_rows = num_rows
        self.lengths = [3 + 5 * row % 8 + (row % 3 == 0) for row in range(num_rows)]

    def __len__(self):
        return self.num_rows

    def __getitem__(self, index):
        assert 0 <= index < self.num_rows
        prompt = [index] * (1 + 5 * index % 8)
        student = self.view(prompt)
        teacher = self.view([index, *prompt]) if index % 3 == 0 else student
        return Sample(student, teacher, f"s{index % 2}", index, 0)

    def view(self, prompt):
        return View(prompt + [1, 2], [-100] * len(prompt) + [1, 2], len(prompt))


def test_lengths_of_rows():
    rows = Rows(20)
    assert rows.lengths == [rows[row].num_tokens for row in range(20)]
    assert len(set(rows.lengths)) > 5


def steps_of(
    dataset,
    *,
    size=2,
    max_tokens=12,
    at_least=1,
    rank=0,
    ranks=1,
    seed=0,
    start=0,
    stop=6,
    workers=0,
):
    """size: rows of a step for each rank."""
    return step_loader(
        dataset,
        lambda step: batch_indices(step, size * ranks, len(dataset), seed),
        lambda step: dataset.lengths,
        global_batch_size=size * ranks,
        budget=Budget(max_tokens, at_least=at_least),
        dp_rank=rank,
        dp_size=ranks,
        start_step=start,
        num_steps=stop,
        num_workers=workers,
    )


def row_of(numbered):
    return -1 if numbered.sample is None else numbered.sample.row


def rows_of(steps):
    return [[list(map(row_of, micro)) for micro in step] for step in steps]


def evaluation_of(dataset, *, max_tokens=12, rank=0, ranks=1):
    return list(
        eval_loader(
            dataset,
            range(len(dataset)),
            dataset.lengths,
            budget=Budget(max_tokens),
            dp_rank=rank,
            dp_size=ranks,
        )
    )


def test_permutations_are_frozen():
    """Fixed numbers: a run resumed with another numpy must see the same rows."""
    assert permutation(10, 42, 3, 0).tolist() == [5, 7, 4, 1, 8, 2, 0, 6, 9, 3]
    assert permutation(10, 42, 3, 1).tolist() == [8, 5, 7, 4, 6, 0, 3, 2, 9, 1]
    assert sorted(permutation(1000, 7, 1).tolist()) == list(range(1000))


def test_every_epoch_has_every_row_once():
    """7 rows in batches of 4: batches straddle epochs, and no row is lost or doubled."""
    stream = numpy.concatenate([batch_indices(step, 4, 7, seed=5) for step in range(14)])
    epochs = stream.reshape(8, 7)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(7))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 8
    assert batch_indices(3, 4, 7, seed=6).tolist() != batch_indices(3, 4, 7, seed=5).tolist()


def test_rows_of_steps_where_some_have_no_response():
    """Each kind of step goes through its rows in epochs of its own, from whichever step it starts;
    where all rows have a response, the kinds share one sequence.
    """
    has_response = numpy.array([True, False, True, True, False, False, True])
    needs = [bool(step % 3) for step in range(42)]

    def rows(has_response, steps=range(42)):
        order = StepRows(has_response, needs.__getitem__, 4, seed=5)
        return [order(step).tolist() for step in steps]

    found = rows(has_response)
    of_kind = {kind: sum((of for of, n in zip(found, needs) if n == kind), []) for kind in needs}
    for epoch in numpy.reshape(of_kind[False], (8, 7)):
        assert sorted(epoch.tolist()) == list(range(7))
    for epoch in numpy.reshape(of_kind[True], (28, 4)):
        assert sorted(epoch.tolist()) == [0, 2, 3, 6]
    assert rows(has_response, range(30, 42)) == found[30:]
    assert rows(~has_response & has_response, [0, 3, 6]) == [
        batch_indices(step, 4, 7, seed=5).tolist() for step in range(3)
    ]
    assert rows(numpy.ones(7, dtype=bool)) == [
        batch_indices(step, 4, 7, seed=5).tolist() for step in range(42)
    ]


def test_a_batch_larger_than_the_data():
    assert Counter(batch_indices(0, 9, 3, seed=0).tolist()) == {0: 3, 1: 3, 2: 3}


@pytest.mark.parametrize(
    "ranks, size, max_tokens, at_least",
    [(1, 8, 100, 1), (2, 4, 20, 1), (4, 2, 20, 1), (8, 1, 20, 1), (1, 8, 12, 1), (2, 4, 5, 1)]
    + [(2, 4, 100, 3), (1, 8, 100, 4), (4, 2, 100, 3)],
)
def test_the_global_batch_is_the_same_at_any_layout(ranks, size, max_tokens, at_least):
    """Each row once, with the number that it has in the global batch; every rank has the same
    number of micro-batches, those that are left over hold a padding sample.
    """
    dataset = Rows(21)
    cuts = dict(size=size, max_tokens=max_tokens, at_least=at_least)
    parts = [list(steps_of(dataset, **cuts, rank=rank, ranks=ranks)) for rank in range(ranks)]
    for step in range(6):
        of_step = [part[step] for part in parts]
        assert len({len(of_rank) for of_rank in of_step}) == 1 and len(of_step[0]) >= at_least
        micro_batches = [micro for of_rank in of_step for micro in of_rank]
        assert all(micro == [PADDING] or PADDING not in micro for micro in micro_batches)
        for micro in micro_batches:
            tokens = sum(0 if sample is None else sample.num_tokens for _, sample in micro)
            assert tokens <= max_tokens or len(micro) == 1
        numbered = [one for micro in micro_batches for one in micro if one != PADDING]
        gathered = [row_of(one) for one in sorted(numbered, key=lambda one: one.number)]
        assert sorted(one.number for one in numbered) == list(range(8))
        assert gathered == batch_indices(step, 8, 21, seed=0).tolist()
        lengths = [dataset.lengths[row] for row in gathered]
        expected = cut(lengths, Budget(max_tokens, at_least=at_least), ranks)
        numbers = [[[one.number for one in micro] for micro in of_rank] for of_rank in of_step]
        assert numbers == [[rows or [-1] for rows in of_rank] for of_rank in expected]
    assert all(len(part) == 6 for part in parts)


def test_a_step_may_have_lengths_of_its_own():
    """Of a step whose responses are yet to be written: other cuts, the same rows."""
    dataset = Rows(8)
    settings = dict(global_batch_size=8, budget=Budget(20), start_step=0, num_steps=2)
    settings |= dict(dp_rank=0, dp_size=1, num_workers=0)
    lengths = [dataset.lengths, [20] * 8]
    order = StepRows(numpy.ones(8, dtype=bool), bool, 8, seed=0)
    (usual, written) = rows_of(step_loader(dataset, order, lengths.__getitem__, **settings))
    assert len(written) == 8 > len(usual)
    assert sorted(row for rows in usual for row in rows) == sorted(row for (row,) in written)


def test_samples_of_workers_hold_no_file_descriptors():
    """As a sample with media and positions has them: many small tensors."""

    class WithTensors(Rows):
        def __getitem__(self, index):
            medium = Medium("audio", torch.zeros(4, 5), None, 1)
            return replace(super().__getitem__(index), media=(medium,) * 20)

    before = len(os.listdir("/proc/self/fd"))
    with contextlib.closing(steps_of(WithTensors(40), size=40, stop=3, workers=2)) as steps:
        kept = [next(steps) for _ in range(2)]
        assert len(os.listdir("/proc/self/fd")) - before < 20
    assert sum(len(micro) for step in kept for micro in step) == 80


def test_resuming_gives_the_rest_without_reading_the_beginning():
    dataset = Rows(10)
    whole = rows_of(steps_of(dataset, size=3, rank=1, ranks=2, stop=9))
    read = []

    class Watched(Rows):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    rest = rows_of(steps_of(Watched(10), size=3, rank=1, ranks=2, start=4, stop=9))
    assert rest == whole[4:]
    assert read == [row for step in rest for rows in step for row in rows if row >= 0]
    assert rows_of(steps_of(dataset, start=6, stop=6)) == []


def test_workers_give_the_same_batches():
    dataset = Rows(11)
    settings = dict(size=4, at_least=3, stop=5)
    alone = list(steps_of(dataset, **settings))
    helped = list(steps_of(dataset, **settings, workers=2))
    assert rows_of(alone) == rows_of(helped)
    assert alone == helped  # samples and their numbers in the global batch
    for step in helped:
        for _, sample in (one for micro in step for one in micro):
            assert (sample.teacher is sample.student) == (not sample.has_teacher_view)


def test_workers_read_the_rows_of_the_steps_to_come():
    """Prompts alone in the steps that write: workers are ahead, and the kinds of steps differ."""
    dataset, has_response = Rows(9), numpy.arange(9) % 3 > 0
    settings = dict(global_batch_size=4, budget=Budget(20), dp_rank=0, dp_size=1, num_steps=8)

    def rows(workers, start):
        order = StepRows(has_response, lambda step: step in (1, 2, 6), 4, seed=3)
        lengths = [dataset.lengths] * 8
        steps = step_loader(
            dataset,
            order,
            lengths.__getitem__,
            start_step=start,
            num_workers=workers,
            **settings,
        )
        return [[row for rows in step for row in rows] for step in rows_of(steps)]

    found = rows(0, 0)
    assert rows(2, 0) == found and rows(2, 3) == found[3:]
    assert all(has_response[found[step]].all() for step in (1, 2, 6))
    assert not all(has_response[rows].all() for rows in found)


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_untouched(workers):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    state = numpy.random.get_state()[1].copy()
    list(steps_of(Rows(5), stop=3, workers=workers))
    evaluation_of(Rows(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert (numpy.random.get_state()[1] == state).all()


@pytest.mark.parametrize(
    "num_rows, ranks, max_tokens",
    [(7, 2, 20), (8, 2, 12), (1, 4, 30), (9, 1, 40), (5, 3, 1), (600, 2, 100), (515, 1, 50)],
)
def test_evaluation_covers_each_row_once(num_rows, ranks, max_tokens):
    """Several windows of rows too: a micro-batch has rows of one of them."""
    dataset = Rows(num_rows)
    parts = [
        evaluation_of(dataset, max_tokens=max_tokens, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    assert len({len(part) for part in parts}) == 1
    micro_batches = [micro for part in parts for micro in part]
    assert all(micro == [PADDING] or PADDING not in micro for micro in micro_batches)
    data = [micro for micro in micro_batches if micro != [PADDING]]
    assert sorted(row_of(one) for micro in data for one in micro) == list(range(num_rows))
    for micro in data:
        assert all(number == sample.row for number, sample in micro)
        assert len({number // (EVAL_WINDOW * ranks) for number, _ in micro}) == 1
        assert sum(sample.num_tokens for _, sample in micro) <= max_tokens or len(micro) == 1


class WithoutSome(Rows):
    """Rows whose media cannot be read."""

    def __init__(self, num_rows, missing, skip):
        super().__init__(num_rows)
        self.missing, self.skip_bad_rows = missing, skip

    def __getitem__(self, index):
        if index in self.missing:
            raise DataError(f"row {index} is torn")
        return super().__getitem__(index)


def test_rows_that_cannot_be_read(capfd):
    """Padding samples stand for them, in the micro-batch where they would be; or the run ends."""
    settings = dict(size=8, stop=1, max_tokens=20)
    whole = rows_of(steps_of(Rows(8), **settings))
    found = rows_of(steps_of(WithoutSome(8, {2, 5}, skip=True), **settings))
    assert found == [
        [[-1 if row in (2, 5) else row for row in micro] for micro in step] for step in whole
    ]
    assert capfd.readouterr().err.count("Left out (--skip_bad_rows): row ") == 2
    with pytest.raises(DataError, match="row 5 is torn"):
        list(steps_of(WithoutSome(8, {5}, skip=False), **settings))


@pytest.mark.parametrize(
    "num_rows, size, epochs, steps",
    [
        (100, 8, 1, 13),
        (96, 8, 1, 12),
        (100, 8, 0.5, 7),
        (3, 8, 0.1, 1),
        (100, 8, 3, 38),
        (1000, 1, 0.3, 300),
    ],
)
def test_number_of_steps(num_rows, size, epochs, steps):
    assert num_steps_of_epochs(num_rows, size, epochs) == steps
