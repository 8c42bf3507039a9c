"""Packing, collation and new responses: exact tensors."""

import pickle

import pytest
import torch

from megatron_gkd.data import Packing, Sample, View, collate
from megatron_gkd.media.positions import MediaTokenIds
from tests.random_media import MediaRow, Prompt

PAD = 99
TIGHT = Packing(PAD)


def sample(prompt, response, *, teacher_prompt=None, row=0, source="s", cut_tokens=0, hole=None):
    trained = [-100 if index == hole else token for index, token in enumerate(response)]

    def view(start):
        return View(start + response, [-100] * len(start) + trained, len(start))

    student = view(prompt)
    teacher = student if teacher_prompt is None else view(teacher_prompt)
    return Sample(student, teacher, source, row, cut_tokens)


def test_exact_tensors():
    batch = collate(
        [
            sample([1, 2], [3, 4], row=7, source="a"),
            sample([5], [6, 7, 8], row=3, source="b", hole=1, cut_tokens=2),
        ],
        TIGHT,
        [5, 1],
    )
    view = batch.student
    assert batch.teacher is view and not batch.is_written
    assert view.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert view.position_ids.tolist() == [[[0, 1, 2, 3, 0, 1, 2, 3]]] * 3
    assert (view.lengths, view.prompt_lengths) == ([4, 4], [2, 1])
    assert (view.starts, view.size) == ([0, 4, 8], 8)
    assert view.response_rows.tolist() == [1, 2, 4, 6]
    assert view.targets.tolist() == [3, 4, 6, 8] and view.num_targets == [2, 2]
    assert view.media_rows.tolist() == view.media_tokens.tolist() == []
    tensors = (
        view.input_ids,
        view.response_rows,
        view.targets,
        view.media_rows,
        view.media_tokens,
    )
    assert {tensor.dtype for tensor in tensors} == {
        torch.int64
    } and view.position_ids.dtype == torch.float32
    assert (batch.rows, batch.sources, batch.cut_tokens) == ([7, 3], ["a", "b"], 2)
    assert (batch.sample_ids, batch.media_pairs) == ([5, 1], ["text > text"] * 2)
    assert batch.media is None and batch.log_probabilities is None


def test_no_padding_unless_parallelism_asks_for_it():
    """Between the rows for a multiple of a row's positions, behind the last for one of all."""
    rows = [sample([1, 2], [3, 4, 5]), sample([6], [7]), sample([8], [9])]
    for sequence_multiple, row_multiple, starts in (
        (1, 1, [0, 5, 7, 9]),
        (2, 1, [0, 5, 7, 10]),
        (4, 1, [0, 5, 7, 12]),
        (9, 1, [0, 5, 7, 9]),
        (2, 2, [0, 6, 8, 10]),
        (4, 2, [0, 6, 8, 12]),
        (8, 4, [0, 8, 12, 16]),
    ):
        view = collate(rows, Packing(PAD, sequence_multiple, row_multiple)).student
        assert (view.starts, view.lengths) == (starts, [5, 2, 2])
        assert view.size == starts[-1] and view.size % sequence_multiple == 0
        assert view.input_ids.shape == (1, view.size)
        assert view.position_ids.shape == (3, 1, view.size)
        ids = view.input_ids[0].tolist()
        for index, tokens in enumerate([[1, 2, 3, 4, 5], [6, 7], [8, 9]]):
            start, end = view.starts[index : index + 2]
            of_row = list(range(len(tokens)))
            assert ids[start:end] == tokens + [PAD] * (end - start - len(tokens))
            planes = view.position_ids[:, 0, start : start + len(tokens)]
            assert planes.tolist() == [of_row] * 3
        second, third = view.starts[1:3]
        assert view.response_rows.tolist() == [1, 2, 3, second, third]
        assert view.targets.tolist() == [3, 4, 5, 7, 9] and view.num_targets == [3, 1, 1]


def test_the_first_token_of_a_row_is_never_trained():
    """Nothing predicts it: what stands before it belongs to another row."""
    views = [View([1, 2], [1, 2], 0), View([3], [3], 0), View([4, 5], [4, 5], 0)]
    samples = [Sample(view, view, "s", row, 0) for row, view in enumerate(views)]
    view = collate(samples, TIGHT).student
    assert view.response_rows.tolist() == [0, 3] and view.targets.tolist() == [2, 5]
    assert view.num_targets == [1, 0, 1]


def test_teacher_view():
    batch = collate([sample([1], [2, 3], teacher_prompt=[4, 5, 6]), sample([7, 8], [9])], TIGHT)
    assert batch.teacher is not batch.student
    assert batch.teacher.input_ids.tolist() == [[4, 5, 6, 2, 3, 7, 8, 9]]
    assert batch.student.input_ids.tolist() == [[1, 2, 3, 7, 8, 9]]
    assert batch.teacher.prompt_lengths == [3, 2] and batch.student.prompt_lengths == [1, 2]
    assert (batch.teacher.starts, batch.student.starts) == ([0, 5, 8], [0, 3, 6])
    assert batch.student.response_rows.tolist() == [0, 1, 4]
    assert batch.teacher.response_rows.tolist() == [2, 3, 6]
    assert torch.equal(batch.teacher.targets, batch.student.targets)


def test_views_that_disagree_are_caught():
    broken = sample([1], [2, 3], teacher_prompt=[4])
    broken = Sample(broken.student, View([4, 2, 9], [-100, 2, 9], 1), "s", 0, 0)
    with pytest.raises(AssertionError, match="train different tokens"):
        collate([broken], TIGHT)


def test_padding_samples():
    batch = collate([sample([1, 2], [3], row=4), None], Packing(PAD, 2))
    assert batch.student.input_ids.tolist() == [[1, 2, 3, PAD]]
    assert batch.student.lengths == [3, 1] and batch.student.prompt_lengths == [2, 1]
    assert batch.student.response_rows.tolist() == [1] and batch.student.num_targets == [1, 0]
    assert batch.rows == [4, -1] and batch.sources == ["s", ""] and batch.teacher is batch.student
    assert (batch.sample_ids, batch.media_pairs) == ([0, -1], ["text > text", ""])
    alone = collate([None], Packing(PAD, 4))
    assert alone.student.input_ids.tolist() == [[PAD] * 4] and alone.student.lengths == [1]
    assert alone.student.response_rows.tolist() == [] and alone.student.targets.tolist() == []
    assert not alone.is_written and alone.teacher is alone.student and alone.cut_tokens == 0


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
    packing = Packing(PAD, 4)
    batch = collate(samples, packing)
    assert batch.media.audio_row_lengths.tolist() == [900, *expected, 5]
    assert batch.media.audio_lengths.tolist() == [
        900,
        *(size for kind, size, *_ in media if kind == "audio"),
        5,
    ]
    samples = [samples[0], None, samples[2].with_response([2] * 9), samples[3].with_response([3])]
    written = collate(samples, packing)
    assert all(map(torch.equal, tensors_of(written.media), tensors_of(batch.media)))


def tensors_of(media):
    return [value for value in vars(media).values() if isinstance(value, torch.Tensor)]


def test_a_medium_that_rows_share_is_there_once():
    """As in several responses to a prompt."""
    row = MediaRow(TOKENS, 0, [IMAGE, ("audio", 40)], Prompt([0, 1]), Prompt([1])).sample(0)
    other = MediaRow(TOKENS, 1, [("audio", 70)], Prompt([0])).sample(1)
    apart = [collate([sample], TIGHT) for sample in (row, other)]
    batch = collate([row, other, row.with_response([5, 6])], TIGHT)
    assert batch.media.audio_lengths.tolist() == [40, 70] and len(batch.media.grid_thw) == 1
    num_audio = batch.media.audio_tokens.tolist()
    assert [item.kind for item in batch.media.items] == ["audio", "audio", "image"]
    assert batch.media.items[0] is row.media[1] and batch.media.items[2] is row.media[0]
    for side in ("student", "teacher"):
        view, alone = getattr(batch, side), [getattr(of_row, side) for of_row in apart]
        of_rows = zip([alone[0], alone[1], alone[0]], view.starts)
        expected = torch.cat([one.media_rows + start for one, start in of_rows])
        assert torch.equal(view.media_rows, expected)
        # alone: the row's audio, then its image; together the other row's audio lies between
        of_row = alone[0].media_tokens
        of_row = torch.where(of_row < num_audio[0], of_row, of_row + num_audio[1])
        of_other = alone[1].media_tokens + num_audio[0]
        assert torch.equal(view.media_tokens, torch.cat([of_row, of_other, of_row]))


def test_new_responses():
    packing = Packing(PAD, 2)
    old = [
        sample([1], [2, 3], teacher_prompt=[4, 5], row=6, source="a", cut_tokens=1),
        sample([7, 8], [9], row=2),
    ]
    new = [old[0].with_response([11]), old[1].with_response([12, 13, 14])]
    batch = collate(new, packing)
    assert (
        batch.is_written
        and not collate(old, packing).is_written
        and batch.teacher is not batch.student
    )
    assert collate([old[0], new[1]], packing).is_written
    assert batch.student.input_ids.tolist() == [[1, 11, 7, 8, 12, 13, 14, PAD]]
    assert batch.teacher.input_ids.tolist() == [[4, 5, 11, 7, 8, 12, 13, 14]]
    assert new[0].student.labels == [-100, 11] and new[0].teacher.labels == [-100, -100, 11]
    assert new[1].student.labels == [-100, -100, 12, 13, 14]
    assert batch.teacher.prompt_lengths == [2, 2] and batch.student.prompt_lengths == [1, 2]
    assert batch.student.targets.tolist() == batch.teacher.targets.tolist() == [11, 12, 13, 14]
    assert (batch.rows, batch.sources, batch.cut_tokens) == ([6, 2], ["a", "s"], 0)
    assert new[1].teacher is new[1].student and new[0].teacher is not new[0].student
    assert (new[0].num_tokens, new[1].num_tokens) == (3, 5)
    again = collate([new[0].with_response([15]), new[1].with_response([16])], TIGHT)
    assert again.student.input_ids.tolist() == [[1, 15, 7, 8, 16]]
    assert old[0].student.input_ids == [1, 2, 3] and old[0].cut_tokens == 1


def test_positions_of_a_response_continue_those_of_the_prompt():
    positions = torch.tensor([[0, 1, 1, 5, 6], [0, 1, 2, 5, 6], [0, 1, 3, 5, 6]]).float()
    view = View([1, 2, 3, 4, 5], [-100] * 4 + [5], 4, positions)
    new = view.with_response([6, 7, 8]).position_ids
    expected = torch.cat([positions[:, :4], torch.tensor([[6.0, 7.0, 8.0]] * 3)], dim=1)
    assert torch.equal(new, expected) and new.dtype == torch.float32


def test_log_probabilities_of_all_rows_or_none():
    rows = [sample([1], [2, 3]), sample([4], [5])]
    drawn = [rows[0].with_response([6, 7], [-0.5, -1.5]), rows[1].with_response([8], [-2.0])]
    batch = collate([drawn[1], None, drawn[0]], TIGHT)
    assert batch.log_probabilities.dtype == torch.float32
    assert batch.log_probabilities.tolist() == [-2.0, -0.5, -1.5]
    assert batch.student.targets.tolist() == [8, 6, 7]
    for others in ([drawn[0], rows[1]], [drawn[0], rows[1].with_response([8])], [None]):
        assert collate(others, TIGHT).log_probabilities is None
    # drawn again: the old ones are gone
    assert collate([drawn[1].with_response([9])], TIGHT).log_probabilities is None


def test_a_response_drops_the_training_of_earlier_turns():
    view = View([1, 2, 3, 4], [-100, 2, -100, 4], 3)
    new = Sample(view, view, "s", 0, 0).with_response([8, 9])
    assert new.student.input_ids == [1, 2, 3, 8, 9]
    assert new.student.labels == [-100, -100, -100, 8, 9]
    assert new.teacher is new.student


def test_an_empty_response_is_refused():
    with pytest.raises(ValueError, match="row 3 got a response of no token"):
        sample([1], [2], row=3).with_response([])


def test_to_moves_everything_and_keeps_a_shared_view_shared():
    shared = collate([sample([1], [2])], TIGHT).to("meta")
    assert shared.teacher is shared.student and shared.student.position_ids.device.type == "meta"
    written = sample([1], [2], teacher_prompt=[3]).with_response([4], [-1.0])
    apart = collate([written], TIGHT, [6]).to("meta")
    tensors = [
        getattr(view, name)
        for view in (apart.student, apart.teacher)
        for name in (
            "input_ids",
            "position_ids",
            "response_rows",
            "targets",
            "media_rows",
            "media_tokens",
        )
    ]
    tensors.append(apart.log_probabilities)
    assert {tensor.device.type for tensor in tensors} == {
        "meta"
    } and apart.teacher is not apart.student
    assert apart.samples == [written] and apart.sample_ids == [6] and apart.student.lengths == [2]
    heard = MediaRow(TOKENS, 0, [("audio", 40)], Prompt([0])).sample(0)
    media = collate([heard], TIGHT).to("meta").media
    assert {tensor.device.type for tensor in tensors_of(media)} == {"cpu"}  # towers fetch them
    assert media.items == list(heard.media)


def test_a_shared_view_survives_the_way_from_a_worker():
    (row,) = pickle.loads(pickle.dumps([sample([1], [2])]))
    assert row.teacher is row.student
    batch = collate([row], TIGHT)
    assert batch.teacher is batch.student
