"""Collation and new responses: exact tensors."""

import pickle

import pytest
import torch

from megatron_gkd.data import Sample, View, collate, with_responses
from megatron_gkd.media.positions import MediaTokenIds
from tests.random_media import MediaRow, Prompt

PAD = 99


def sample(prompt, response, *, teacher_prompt=None, row=0, source="s", cut_tokens=0, hole=None):
    trained = [-100 if index == hole else token for index, token in enumerate(response)]

    def view(start):
        return View(start + response, [-100] * len(start) + trained, len(start))

    student = view(prompt)
    teacher = student if teacher_prompt is None else view(teacher_prompt)
    return Sample(student, teacher, teacher_prompt is not None, source, row, cut_tokens)


def test_exact_tensors():
    batch = collate(
        [
            sample([1, 2], [3, 4], row=7, source="a"),
            sample([5], [6, 7, 8], row=3, source="b", hole=1, cut_tokens=2),
        ],
        PAD,
        4,
    )
    view = batch.student
    assert batch.teacher is view and not batch.has_teacher_view and not batch.on_policy
    assert view.input_ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert view.labels.tolist() == [[-100, -100, 3, 4], [-100, 6, -100, 8]]
    assert view.lengths.tolist() == [4, 4]
    assert view.prompt_lengths.tolist() == [2, 1]
    assert view.response_rows.tolist() == [1, 2, 4, 6]
    assert view.targets.tolist() == [3, 4, 6, 8]
    assert view.position_ids.tolist() == [[[0, 1, 2, 3]] * 2] * 3
    tensors = (
        view.input_ids,
        view.labels,
        view.lengths,
        view.prompt_lengths,
        view.response_rows,
        view.targets,
        view.media_rows,
        view.media_tokens,
    )
    assert {tensor.dtype for tensor in tensors} == {
        torch.int64
    } and view.position_ids.dtype == torch.float32
    assert (batch.rows, batch.sources, batch.cut_tokens) == ([7, 3], ["a", "b"], 2)


def test_padding_to_a_multiple():
    for multiple, size in ((1, 5), (2, 6), (4, 8), (5, 5)):
        view = collate([sample([1, 2], [3, 4, 5]), sample([6], [7])], PAD, multiple).student
        assert view.input_ids.shape == view.labels.shape == (
            2,
            size,
        ) and view.position_ids.shape == (3, 2, size)
        assert view.input_ids[1].tolist() == [6, 7] + [PAD] * (size - 2)
        assert view.labels[1].tolist() == [-100, 7] + [-100] * (size - 2)
        assert view.response_rows.tolist() == [1, 2, 3, size]


def test_teacher_view():
    batch = collate([sample([1], [2, 3], teacher_prompt=[4, 5, 6]), sample([7, 8], [9])], PAD, 1)
    assert batch.has_teacher_view and batch.teacher is not batch.student
    assert batch.teacher.input_ids.tolist() == [[4, 5, 6, 2, 3], [7, 8, 9, PAD, PAD]]
    assert batch.teacher.prompt_lengths.tolist() == [3, 2]
    assert batch.student.response_rows.tolist() == [0, 1, 4]
    assert batch.teacher.response_rows.tolist() == [2, 3, 6]
    assert torch.equal(batch.teacher.targets, batch.student.targets)


def test_views_that_disagree_are_caught():
    broken = sample([1], [2, 3], teacher_prompt=[4])
    broken = Sample(broken.student, View([4, 2, 9], [-100, 2, 9], 1), True, "s", 0, 0)
    with pytest.raises(AssertionError, match="train different tokens"):
        collate([broken], PAD, 1)


def test_padding_samples():
    batch = collate([sample([1, 2], [3], row=4), None], PAD, 2)
    assert batch.student.input_ids.tolist() == [[1, 2, 3, PAD], [PAD] * 4]
    assert batch.student.lengths.tolist() == [3, 1] and batch.student.prompt_lengths.tolist() == [
        2,
        1,
    ]
    assert batch.student.response_rows.tolist() == [1]
    assert batch.rows == [4, -1] and batch.sources == ["s", ""] and batch.teacher is batch.student
    alone = collate([None, None], PAD, 4)
    assert alone.student.response_rows.tolist() == [] and alone.student.targets.tolist() == []


TOKENS = MediaTokenIds(151, 152, 153, 154, 155, 156, 157, 13.0, 2)
IMAGE, VIDEO = ("image", (2, 4)), ("video", (2, 4, 4), 0.5)


@pytest.mark.parametrize(
    "media, student, teacher, expected",
    [
        pytest.param([("audio", 40), ("audio", 70)], [0, 1], None, [70, 70], id="one-view"),
        pytest.param([("audio", 40), ("audio", 70)], [0], [1], [40, 70], id="apart"),
        pytest.param([("audio", 40), ("audio", 70)], [0], [0, 1], [40, 70], id="student-first"),
        pytest.param([("audio", 40), ("audio", 70)], [1], [1, 0], [70, 70], id="teacher-more"),
        pytest.param([("audio", 40), ("audio", 70)], [], [1, 0], [70, 70], id="teacher-only"),
        pytest.param([("audio", 40), ("audio", 70)], [0], [], [40, 70], id="in-neither"),
        pytest.param(
            [IMAGE, ("audio", 30), VIDEO, ("audio", 250), ("audio", 9)],
            Prompt([("both", 2, 1), 3], True),
            [0, 4, 1],
            [250, 250, 30],
            id="track-of-a-video",
        ),
    ],
)
def test_audio_row_lengths(media, student, teacher, expected):
    """The student's view decides where it has the audio, then the teacher's; other rows of the
    batch, other kinds of media and new responses do not matter.
    """

    def prompt(items):
        return Prompt(items) if isinstance(items, list) else items

    row = MediaRow(TOKENS, 0, media, prompt(student), prompt(teacher))
    before = MediaRow(TOKENS, 1, [IMAGE, ("audio", 900)], Prompt([1]))
    after = MediaRow(TOKENS, 2, [VIDEO, ("audio", 5)], Prompt([1]), Prompt([0]))
    samples = [before.sample(0), None, row.sample(1), after.sample(2)]
    batch = collate(samples, PAD, 4)
    assert batch.media.audio_row_lengths.tolist() == [900, *expected, 5]
    assert batch.media.audio_lengths.tolist() == [
        900,
        *(size for kind, size, *_ in media if kind == "audio"),
        5,
    ]
    written = with_responses(batch, [[1], [], [2] * 9, [3]], PAD, 4)
    assert written.media is batch.media


def test_with_responses():
    batch = collate(
        [
            sample([1], [2, 3], teacher_prompt=[4, 5], row=6, source="a", cut_tokens=1),
            sample([7, 8], [9], row=2),
        ],
        PAD,
        2,
    )
    new = with_responses(batch, [[11], [12, 13, 14]], PAD, 2)
    assert new.on_policy and not batch.on_policy and new.has_teacher_view
    assert new.student.input_ids.tolist() == [[1, 11, PAD, PAD, PAD, PAD], [7, 8, 12, 13, 14, PAD]]
    assert new.student.labels.tolist() == [
        [-100, 11, -100, -100, -100, -100],
        [-100, -100, 12, 13, 14, -100],
    ]
    assert new.teacher.input_ids.tolist() == [[4, 5, 11, PAD, PAD, PAD], [7, 8, 12, 13, 14, PAD]]
    assert new.teacher.prompt_lengths.tolist() == [
        2,
        2,
    ] and new.student.prompt_lengths.tolist() == [1, 2]
    assert new.student.targets.tolist() == new.teacher.targets.tolist() == [11, 12, 13, 14]
    assert (new.rows, new.sources, new.cut_tokens) == ([6, 2], ["a", "s"], 0)
    again = with_responses(new, [[15], [16]], PAD, 1)
    assert again.student.input_ids.tolist() == [[1, 15, PAD], [7, 8, 16]]


def test_with_responses_drops_the_training_of_earlier_turns():
    view = View([1, 2, 3, 4], [-100, 2, -100, 4], 3)
    new = with_responses(collate([Sample(view, view, False, "s", 0, 0)], PAD, 1), [[8, 9]], PAD, 1)
    assert new.student.input_ids.tolist() == [[1, 2, 3, 8, 9]]
    assert new.student.labels.tolist() == [[-100, -100, -100, 8, 9]]
    assert new.teacher is new.student


def test_with_responses_and_padding_samples():
    batch = collate([sample([1], [2]), None], PAD, 1)
    new = with_responses(batch, [[5, 6], []], PAD, 1)
    assert new.student.input_ids.tolist() == [
        [1, 5, 6],
        [PAD] * 3,
    ] and new.student.targets.tolist() == [5, 6]
    assert new.student.lengths.tolist() == [3, 1]
    for responses, reason in (
        ([[], []], "row 0 got a response of 0"),
        ([[5], [6]], "row -1 got a response of 1"),
        ([[5]], "1 responses for a batch of 2"),
    ):
        with pytest.raises(ValueError, match=reason):
            with_responses(batch, responses, PAD, 1)


def test_to_moves_everything_and_keeps_a_shared_view_shared():
    shared = collate([sample([1], [2])], PAD, 1).to("meta")
    assert shared.teacher is shared.student and shared.student.position_ids.device.type == "meta"
    apart = collate([sample([1], [2], teacher_prompt=[3])], PAD, 1).to("meta")
    tensors = [
        getattr(view, name)
        for view in (apart.student, apart.teacher)
        for name in ("input_ids", "labels", "lengths", "prompt_lengths", "position_ids")
    ]
    assert {tensor.device.type for tensor in tensors} == {"meta"} and apart.has_teacher_view


def test_a_shared_view_survives_the_way_from_a_worker():
    batch = pickle.loads(pickle.dumps(collate([sample([1], [2])], PAD, 1)))
    assert batch.teacher is batch.student
