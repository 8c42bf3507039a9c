"""The order of batches: a pure function of seed and step, whatever the ranks, workers and the step
it starts from.
"""

from collections import Counter

import numpy
import pytest
import torch

from megatron_gkd.data import (
    Sample,
    View,
    eval_loader,
    num_steps_of_epochs,
    step_loader,
)
from megatron_gkd.data.order import batch_indices, permutation


class Rows:
    """`num_rows` samples whose student prompt is their index; every third has a teacher view."""

    def __init__(self, num_rows):
        self.num_rows = num_rows

    def __len__(self):
        return self.num_rows

    def __getitem__(self, index):
        assert 0 <= index < self.num_rows
        student = View([index, 1, 2], [-100, 1, 2], 1)
        teacher = View([index, index, 1, 2], [-100, -100, 1, 2], 2) if index % 3 == 0 else student
        return Sample(student, teacher, teacher is not student, f"s{index % 2}", index, 0)


def steps_of(
    dataset, *, size=2, accumulation=1, rank=0, ranks=1, seed=0, start=0, stop=6, workers=0
):
    return step_loader(
        dataset,
        per_device_batch_size=size,
        gradient_accumulation_steps=accumulation,
        dp_rank=rank,
        dp_size=ranks,
        seed=seed,
        start_step=start,
        num_steps=stop,
        num_workers=workers,
        pad_token_id=0,
        pad_to_multiple_of=2,
    )


def rows_of(steps):
    return [[batch.rows for batch in step] for step in steps]


def evaluation_of(dataset, *, size=2, rank=0, ranks=1, workers=0):
    return list(
        eval_loader(
            dataset,
            per_device_batch_size=size,
            dp_rank=rank,
            dp_size=ranks,
            num_workers=workers,
            pad_token_id=0,
            pad_to_multiple_of=1,
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


def test_a_batch_larger_than_the_data():
    assert Counter(batch_indices(0, 9, 3, seed=0).tolist()) == {0: 3, 1: 3, 2: 3}


@pytest.mark.parametrize(
    "ranks, size, accumulation",
    [(1, 8, 1), (2, 4, 1), (4, 2, 1), (8, 1, 1), (1, 2, 4), (2, 1, 4), (2, 2, 2)],
)
def test_the_global_batch_is_the_same_at_any_layout(ranks, size, accumulation):
    dataset = Rows(21)
    parts = [
        rows_of(steps_of(dataset, size=size, accumulation=accumulation, rank=rank, ranks=ranks))
        for rank in range(ranks)
    ]
    for step in range(6):
        gathered = [
            row
            for micro in range(accumulation)
            for rank in range(ranks)
            for row in parts[rank][step][micro]
        ]
        assert gathered == batch_indices(step, 8, 21, seed=0).tolist()
    assert all(len(part) == 6 and all(len(step) == accumulation for step in part) for part in parts)


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
    assert read == [row for step in rest for rows in step for row in rows]
    assert rows_of(steps_of(dataset, start=6, stop=6)) == []


def test_workers_give_the_same_batches():
    dataset = Rows(11)
    alone = list(steps_of(dataset, accumulation=2, stop=5))
    helped = list(steps_of(dataset, accumulation=2, stop=5, workers=2))
    assert rows_of(alone) == rows_of(helped)
    for one, other in zip(
        (b for step in alone for b in step), (b for step in helped for b in step)
    ):
        assert torch.equal(one.student.input_ids, other.student.input_ids) and torch.equal(
            one.student.labels, other.student.labels
        )
        assert torch.equal(one.teacher.input_ids, other.teacher.input_ids)
        assert (
            (one.teacher is one.student)
            == (other.teacher is other.student)
            == (not one.has_teacher_view)
        )
        assert one.sources == other.sources
    evaluation = [
        [batch.rows for batch in evaluation_of(dataset, workers=workers)] for workers in (0, 2)
    ]
    assert evaluation[0] == evaluation[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_untouched(workers):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    state = numpy.random.get_state()[1].copy()
    list(steps_of(Rows(5), stop=3, workers=workers))
    evaluation_of(Rows(5), workers=workers)
    assert torch.equal(torch.get_rng_state(), before)
    assert (numpy.random.get_state()[1] == state).all()


@pytest.mark.parametrize(
    "num_rows, ranks, size", [(7, 2, 2), (8, 2, 2), (1, 4, 3), (9, 1, 4), (5, 3, 1)]
)
def test_evaluation_covers_each_row_once(num_rows, ranks, size):
    parts = [
        evaluation_of(Rows(num_rows), size=size, rank=rank, ranks=ranks) for rank in range(ranks)
    ]
    assert len({len(part) for part in parts}) == 1
    assert {len(batch.rows) for part in parts for batch in part} == {size}
    order = [row for micro in zip(*parts) for batch in micro for row in batch.rows]
    assert order[:num_rows] == list(range(num_rows))
    assert set(order[num_rows:]) <= {-1} and len(order) - num_rows < ranks * size
    for part in parts:
        for batch in part:
            assert batch.student.targets.numel() == 2 * sum(row >= 0 for row in batch.rows)


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
