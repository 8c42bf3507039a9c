"""Rows -> samples: both views, the cut at max_length, and what does not fit."""

import pytest
import torch

from megatron_gkd.data import Packing, collate
from megatron_gkd.data.chat import load_chat_tokenizer
from megatron_gkd.data.encoded import decode_sample, encode_rows
from megatron_gkd.data.rows import check_row
from megatron_gkd.errors import RowError
from megatron_gkd.media.processor import MediaProcessor
from tests.tiny_tokenizer import CHATML, write_bpe_folder

VOCAB = 400
TURNS = [
    {"role": "user", "content": "the sky"},
    {"role": "assistant", "content": "is blue"},
    {"role": "user", "content": "the sea"},
    {"role": "assistant", "content": "is deep"},
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return load_chat_tokenizer(write_bpe_folder(tmp_path_factory.mktemp("bpe")))


def no_chat():
    raise AssertionError("a row of ids asked for the tokenizer")


def sample_of(raw, chat=None, max_length=100, vocab_size=VOCAB):
    get_chat = no_chat if chat is None else lambda: chat
    no_media = MediaProcessor("no folder")
    row = check_row(raw, vocab_size)
    (encoded,) = encode_rows([row], get_chat, max_length, vocab_size, no_media)
    if isinstance(encoded, RowError):
        raise encoded
    return decode_sample(encoded, "here", 5, no_media)


def trained_text(chat, view):
    return chat.tokenizer.decode(view.targets())


def text_before_response(chat, view):
    return chat.tokenizer.decode(view.input_ids[: view.response_start])


def test_tokenised_row():
    sample = sample_of(
        {"input_ids": [7, 8, 9, 10, 11, 12], "labels": [-100, -100, 9, -100, 11, -100]}
    )
    assert sample.student.input_ids == [7, 8, 9, 10, 11]
    assert sample.student.labels == [-100, -100, 9, -100, 11]
    assert sample.student.response_start == 2
    assert sample.teacher is sample.student and not sample.has_teacher_view
    assert (sample.source, sample.row, sample.cut_tokens) == ("here", 5, 0)


def test_tokenised_row_with_the_teachers_prompt():
    raw = {
        "input_ids": [7, 8, 9, 10, 11],
        "labels": [-100, -100, 9, -100, 11],
        "teacher_input_ids": [1, 2, 3, 4],
    }
    sample = sample_of(raw)
    assert sample.has_teacher_view
    assert sample.teacher.input_ids == [1, 2, 3, 4, 9, 10, 11]
    assert sample.teacher.labels == [-100, -100, -100, -100, 9, -100, 11]
    assert sample.teacher.response_start == 4
    assert sample.student.labels == raw["labels"]
    assert sample.teacher.targets() == sample.student.targets() == [9, 11]


def test_messages_train_every_assistant_turn(chat):
    sample = sample_of({"messages": TURNS}, chat)
    assert trained_text(chat, sample.student) == "is blue<|im_end|>is deep<|im_end|>"
    assert text_before_response(chat, sample.student).endswith(
        "the sea<|im_end|>\n<|im_start|>assistant\n"
    )
    assert sample.teacher is sample.student


def test_teacher_messages_share_the_last_response(chat):
    teacher = [
        {"role": "system", "content": "be deep"},
        TURNS[0],
        {"role": "assistant", "content": "to be replaced"},
    ]
    sample = sample_of({"messages": TURNS, "teacher_messages": teacher}, chat)
    assert sample.has_teacher_view
    assert (
        trained_text(chat, sample.student)
        == trained_text(chat, sample.teacher)
        == "is deep<|im_end|>"
    )
    assert text_before_response(chat, sample.teacher) == (
        "<|im_start|>system\nbe deep<|im_end|>\n"
        "<|im_start|>user\nthe sky<|im_end|>\n<|im_start|>assistant\n"
    )
    start = sample.student.response_start
    assert (
        sample.teacher.input_ids[sample.teacher.response_start :]
        == sample.student.input_ids[start:]
    )
    assert (
        chat.tokenizer.decode(sample.student.input_ids).count("is blue") == 1
    )  # still read, no longer trained


def spans_of(view):
    """The trained ids of a view, and the positions that predict them."""
    return [(at - 1, label) for at, label in enumerate(view.labels) if label != -100]


@pytest.mark.parametrize(
    "columns",
    [
        {"teacher_prompt": "the sea below the sky"},
        {"teacher_messages": [{"role": "system", "content": "be deep"}, *TURNS]},
        {
            "teacher_messages": [
                TURNS[0],
                {"role": "assistant", "content": None},
                {"role": "user", "content": "the sea below"},
                {"role": "assistant", "content": "anything"},
            ]
        },
    ],
    ids=["prompt", "system turn", "empty turns"],
)
def test_every_turn_that_both_views_have_is_trained(chat, columns):
    sample = sample_of({"messages": TURNS, **columns}, chat)
    student, teacher = sample.student, sample.teacher
    assert sample.has_teacher_view
    both = "is blue<|im_end|>is deep<|im_end|>"
    assert trained_text(chat, student) == trained_text(chat, teacher) == both
    alone = sample_of({"messages": TURNS}, chat).student
    assert student == alone
    # in each view the turn stands where that view has it
    for view in (student, teacher):
        text = chat.tokenizer.decode(view.input_ids)
        turn, last = chat.tokenizer.encode("is blue<|im_end|>"), spans_of(view)[-1]
        start = spans_of(view)[0][0] + 1
        assert view.input_ids[start : start + len(turn)] == turn
        assert chat.tokenizer.decode(view.input_ids[:start]).endswith("<|im_start|>assistant\n")
        assert last[0] == len(view.input_ids) - 2 and "anything" not in text
    assert "below" in str(columns) or spans_of(teacher) != spans_of(student)


def test_turns_that_are_not_trained_stay_so(chat):
    turns = [*TURNS[:1], {**TURNS[1], "loss": False}, *TURNS[2:]]
    sample = sample_of({"messages": turns, "teacher_prompt": "the sea below"}, chat)
    assert trained_text(chat, sample.student) == "is deep<|im_end|>"
    assert trained_text(chat, sample.teacher) == "is deep<|im_end|>"


def test_the_cut_and_a_new_response_with_several_turns(chat):
    """The last response alone is cut, for the longer view; a rollout's response drops the training
    of the turns before it.
    """
    row = {"messages": TURNS, "teacher_prompt": "the sea below the sky"}
    whole = sample_of(row, chat)
    cut = sample_of(row, chat, max_length=len(whole.teacher.input_ids) - 1)
    assert trained_text(chat, cut.student) == "is blue<|im_end|>is deep"
    assert cut.teacher.targets() == cut.student.targets() and cut.cut_tokens == 1
    assert cut.teacher.labels == whole.teacher.labels[:-1]
    new = whole.with_response([5, 6])
    assert new.student.targets() == new.teacher.targets() == [5, 6]
    batch = collate([whole, new, None], Packing(0, 4, 4))
    assert torch.equal(batch.student.targets, batch.teacher.targets)
    assert (
        batch.student.num_targets
        == batch.teacher.num_targets
        == [
            len(whole.student.targets()),
            2,
            0,
        ]
    )
    for view in (batch.student, batch.teacher):
        after = view.input_ids[0, view.response_rows + 1]
        assert torch.equal(after, view.targets)


def test_turns_of_other_ids_in_the_teachers_view_are_not_trained(tmp_path):
    """A template that writes an earlier turn in another way for the teacher."""
    template = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content | trim if messages[0].content == 'short' and not loop.last else m.content }}",
    )
    chat = load_chat_tokenizer(write_bpe_folder(tmp_path, template))
    turns = [TURNS[0], {"role": "assistant", "content": "is blue "}, *TURNS[2:]]
    teacher = [{"role": "system", "content": "short"}, *turns]
    sample = sample_of({"messages": turns, "teacher_messages": teacher}, chat)
    assert trained_text(chat, sample.student) == "is deep<|im_end|>"
    assert trained_text(chat, sample.teacher) == "is deep<|im_end|>"
    teacher[0] = {"role": "system", "content": "long"}
    sample = sample_of({"messages": turns, "teacher_messages": teacher}, chat)
    assert trained_text(chat, sample.teacher) == "is blue <|im_end|>is deep<|im_end|>"


@pytest.mark.parametrize("placeholder", ["", None])
def test_the_replaced_turn_may_be_empty(chat, placeholder):
    teacher = [
        {"role": "system", "content": "s"},
        TURNS[0],
        {"role": "assistant", "content": placeholder},
    ]
    assert sample_of({"messages": TURNS[:2], "teacher_messages": teacher}, chat).has_teacher_view


def test_teacher_prompt(chat):
    sample = sample_of(
        {
            "instruction": "the sky",
            "output": "is blue",
            "teacher_prompt": "a long story about the sky",
        },
        chat,
    )
    assert (
        text_before_response(chat, sample.teacher)
        == "<|im_start|>user\na long story about the sky<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (
        text_before_response(chat, sample.student)
        == "<|im_start|>user\nthe sky<|im_end|>\n<|im_start|>assistant\n"
    )
    assert trained_text(chat, sample.teacher) == "is blue<|im_end|>"


def test_teacher_messages_for_a_tokenised_row(chat):
    raw = {"input_ids": [7, 8, 9], "labels": [-100, 8, 9], "teacher_messages": TURNS[:2]}
    sample = sample_of(raw, chat)
    assert sample.teacher.input_ids[-2:] == [8, 9]
    assert (
        text_before_response(chat, sample.teacher)
        == "<|im_start|>user\nthe sky<|im_end|>\n<|im_start|>assistant\n"
    )


def test_teacher_input_ids_for_messages(chat):
    sample = sample_of({"messages": TURNS[:2], "teacher_input_ids": [5, 6]}, chat)
    assert sample.teacher.input_ids[:2] == [5, 6]
    assert trained_text(chat, sample.teacher) == "is blue<|im_end|>"


def test_an_equal_teacher_view_is_none(chat):
    assert not sample_of(
        {"messages": TURNS[:2], "teacher_prompt": "the sky"}, chat
    ).has_teacher_view
    assert not sample_of(
        {"input_ids": [7, 8], "labels": [-100, 8], "teacher_input_ids": [7]}
    ).has_teacher_view


def test_responses_are_cut_at_their_end():
    raw = {"input_ids": list(range(10)), "labels": [-100] * 4 + [4, 5, -100, 7, 8, 9]}
    whole = sample_of(raw, max_length=10)
    assert whole.student.input_ids == list(range(10)) and whole.cut_tokens == 0
    cut = sample_of(raw, max_length=8)
    assert cut.student.input_ids == list(range(8)) and cut.cut_tokens == 2
    in_the_hole = sample_of(raw, max_length=7)
    assert in_the_hole.student.labels == [-100] * 4 + [4, 5] and in_the_hole.cut_tokens == 3


def test_both_views_fit_after_the_cut():
    raw = {
        "input_ids": list(range(10)),
        "labels": [-100] * 4 + [4, 5, -100, 7, 8, 9],
        "teacher_input_ids": [1] * 6,
    }
    sample = sample_of(raw, max_length=8)
    assert sample.teacher.input_ids == [1] * 6 + [4, 5]
    assert sample.student.input_ids == [0, 1, 2, 3, 4, 5]
    assert sample.teacher.targets() == sample.student.targets() == [4, 5]
    assert sample.cut_tokens == 3


@pytest.mark.parametrize(
    "teacher, max_length, reason",
    [
        (None, 4, "the prompt has 4 tokens and leaves no room for a response in --max_length 4"),
        (
            [1] * 6,
            6,
            "the teacher's prompt has 6 tokens and leaves no room for a response in --max_length 6",
        ),
    ],
)
def test_a_prompt_that_does_not_fit(teacher, max_length, reason):
    raw = {
        "input_ids": list(range(10)),
        "labels": [-100] * 4 + list(range(4, 10)),
        "teacher_input_ids": teacher,
    }
    with pytest.raises(RowError, match=reason):
        sample_of(raw, max_length=max_length)
    assert len(sample_of(raw, max_length=max_length + 1).student.targets()) == 1


def test_a_tokenizer_of_another_model(chat):
    with pytest.raises(
        RowError, match=r"the tokenizer gives id \d+, out of the model's vocabulary \[0, 50\)"
    ):
        sample_of({"messages": TURNS}, chat, vocab_size=50)
    with pytest.raises(RowError, match="the tokenizer gives id"):
        sample_of(
            {"input_ids": [7, 8], "labels": [-100, 8], "teacher_messages": TURNS},
            chat,
            vocab_size=50,
        )
