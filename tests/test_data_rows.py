"""check_row: what is accepted, and the reason for everything that is not."""

import pytest

from megatron_gkd.data.rows import check_row
from megatron_gkd.errors import RowError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
IDS = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}


def test_messages_pass_unchanged_and_null_columns_are_absent():
    row = check_row(
        {
            "messages": [USER, ANSWER],
            "images": None,
            "teacher_prompt": None,
            "input_ids": None,
            "id": 7,
        },
        10,
    )
    assert row.messages == [USER, ANSWER]
    assert (row.input_ids, row.labels, row.teacher_messages, row.teacher_input_ids, row.source) == (
        None,
    ) * 5


def test_content_parts_become_one_string():
    parts = [{"type": "text", "text": "h", "image": None}, {"text": "i"}]
    row = check_row({"messages": [{"role": "user", "content": parts, "name": None}, ANSWER]}, 10)
    assert row.messages == [USER, ANSWER]


def test_alpaca_columns():
    row = check_row({"instruction": "add", "input": "1 2", "output": "3", "source": "math"}, 10)
    assert row.messages == [
        {"role": "user", "content": "add\n1 2"},
        {"role": "assistant", "content": "3"},
    ]
    assert row.source == "math"
    assert (
        check_row({"instruction": "add", "input": "", "output": "3"}, 10).messages[0]["content"]
        == "add"
    )
    assert check_row({"instruction": "add", "output": "3"}, 10).messages[0]["content"] == "add"


def test_teacher_prompt_replaces_the_last_user_turn():
    turns = [USER, ANSWER, {"role": "user", "content": "second"}, ANSWER]
    row = check_row({"messages": turns, "teacher_prompt": "more"}, 10)
    assert row.teacher_messages == [USER, ANSWER, {"role": "user", "content": "more"}, ANSWER]
    assert row.messages == turns


def test_tokenised_rows_end_with_the_last_trained_token():
    row = check_row({"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, -100, 4, -100]}, 10)
    assert (row.input_ids, row.labels) == ([1, 2, 3, 4], [-100, 2, -100, 4])


def test_prompts_alone_end_before_the_response():
    before = [USER, ANSWER, {"role": "user", "content": "second"}]
    hint = [{"role": "user", "content": "more"}]
    for last in ([], [{"role": "assistant", "content": " \n"}], [{"role": "assistant"}]):
        row = check_row({"messages": before + last, "teacher_prompt": "more"}, 10)
        assert not row.has_response and row.messages == before
        assert row.teacher_messages == [USER, ANSWER, *hint]
    for last in ([], [ANSWER], [{"role": "assistant", "content": ""}]):
        row = check_row({"messages": before, "teacher_messages": hint + last}, 10)
        assert row.teacher_messages == hint
    # as many turns as the row has before its response: each is the row's own
    for last in ([], [ANSWER]):
        view = [USER, {"role": "assistant", "content": ""}, *hint, *last]
        row = check_row({"messages": before, "teacher_messages": view}, 10)
        assert row.teacher_messages == [USER, ANSWER, *hint]
    for output in ({}, {"output": None}, {"output": " "}):
        row = check_row({"instruction": "hi", **output}, 10)
        assert not row.has_response and row.messages == [USER]
    row = check_row({"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}, 10)
    assert not row.has_response and (row.input_ids, row.labels) == ([1, 2], None)
    assert (
        check_row(IDS, 10).has_response and check_row({"messages": [USER, ANSWER]}, 10).has_response
    )


def test_a_trained_first_token_has_nothing_that_predicts_it():
    row = check_row({"input_ids": [1, 2], "labels": [1, 2]}, 10)
    assert row.labels == [-100, 2]


def test_a_mask_over_the_cut_off_padding_is_fine():
    row = check_row(
        {"input_ids": [1, 2, 0], "labels": [-100, 2, -100], "attention_mask": [1, 1, 0]}, 10
    )
    assert row.input_ids == [1, 2]


@pytest.mark.parametrize(
    "raw, reason",
    [
        ([1], "a row is a JSON object, this is a list"),
        ("text", "this is a string"),
        (None, "this is null"),
        (
            {},
            "has none of `messages`, `instruction` + `output`, `conversations`, `query` + "
            "`response`, `prompt` + `completion`, `input_ids` + `labels` (every column is empty)",
        ),
        ({"question": "x", "id": 3}, "(its columns: question, id)"),
        (
            {"messages": [USER, ANSWER], **IDS},
            "has messages and input_ids/labels: one of them must go",
        ),
        (
            {"messages": [USER, ANSWER], "instruction": "x", "output": "y"},
            "has messages and instruction/output",
        ),
        ({"messages": "hi"}, "messages must be a list of turns, got a string"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hi"]}, "messages[0] must be an object with role and content, got a string"),
        (
            {"messages": [USER, {"role": "robot", "content": "x"}]},
            "messages[1].role 'robot' is unknown: system, user, assistant, tool are the roles",
        ),
        ({"messages": [USER, {"content": "x"}]}, "messages[1].role None is unknown"),
        (
            {"messages": [{"role": ["user"], "content": "x"}]},
            "messages[0].role ['user'] is unknown",
        ),
        (
            {"messages": [{"role": "user", "content": 3}, ANSWER]},
            "messages[0].content must be a string, got an integer 3",
        ),
        (
            {"messages": [{"role": "user"}, ANSWER]},
            "messages[0].content must be a string, got null",
        ),
        (
            {"messages": [{"role": "user", "content": ["x"]}, ANSWER]},
            "messages[0].content[0] must be an object",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]},
            "content[0].text must be a string, got null",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "movie", "movie": "a.mp4"}]},
                    ANSWER,
                ]
            },
            "content[0] is of type 'movie': text, audio, image, video are the types",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "x", "audio": "a.wav"}]},
                    ANSWER,
                ]
            },
            "content[0] is text and holds audio: one part, one thing",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": "a", "path": "b"}]},
                    ANSWER,
                ]
            },
            "content[0] is of type image and holds more than `image`",
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]},
                ]
            },
            "messages[1].content[0] is of type image: no media stand in assistant turns",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image", "image": "a"}, {"type": "image"}],
                    },
                    ANSWER,
                ],
                "images": ["b"],
            },
            "messages hold images in some parts and not in others or in `images`: use one of them",
        ),
        (
            {"messages": [{"role": "user", "content": "\ud800"}, ANSWER]},
            "messages[0].content is not valid Unicode: lone surrogate at character 0",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": " \n"}, USER]},
            "messages[1]: empty response",
        ),
        (
            {"messages": [USER, ANSWER, {"role": "assistant", "content": None}]},
            "messages[2]: empty response",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "x", "mood": "glad"}]},
            "messages[1] has mood: a turn has role and content",
        ),
        (
            {"messages": [USER, ANSWER, {"role": "system", "content": "s"}]},
            "messages end with a system turn: the last turn must be the user's, or the assistant's",
        ),
        ({"messages": [ANSWER]}, "messages[0] is an assistant turn: nothing stands before it"),
        ({"instruction": "x", "output": 3.5}, "output must be a string, got a float 3.5"),
        (
            {"instruction": "x", "input": float("nan"), "output": "y"},
            "input must be a string, got a float nan",
        ),
        (
            {"instruction": " ", "output": "y"},
            "empty prompt: neither instruction nor input has text",
        ),
        ({"output": "y"}, "has none of"),
        (
            {"messages": [USER], "response": "y"},
            "messages end without a response, and column `response` would be left out",
        ),
        (
            {"conversations": [USER], "chosen": ANSWER, "rejected": ANSWER},
            "conversations end without a response, and column `chosen` would be left out",
        ),
        (
            {"instruction": "x", "context": "about it", "response": "y"},
            "column `context` would be left out",
        ),
        (
            {"messages": [USER, ANSWER], "image": "a.png", "images": ["a.png"]},
            "has `image` and `images`: one of them must go",
        ),
        (
            {"messages": [USER, ANSWER], "images": [3]},
            "images[0] must be a path, bytes, base64 or an array, got 3",
        ),
        (
            {"messages": [USER, ANSWER], "images": [[[[300, 0, 0]]]]},
            "images[0] is a list and not the pixels [height][width][3]",
        ),
        (
            {"messages": [USER, ANSWER], "audios": [{"array": [0.0]}]},
            "audios[0] must have an array of samples, or",
        ),
        (
            {"messages": [USER, ANSWER], "teacher_audios": ["http://x/a.wav"]},
            "media are files here, nothing is fetched",
        ),
        (
            {"messages": [USER, ANSWER], "use_audio_in_video": "yes"},
            "use_audio_in_video must be true or false",
        ),
        (
            {**IDS, "system": "be kind"},
            "column `system` is not supported beside input_ids/labels: write it into input_ids",
        ),
        ({"messages": [USER, ANSWER], "source": 3}, "source must be a string, got an integer 3"),
        (
            {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]},
            "attention_mask[1] is 0 and a later one is not",
        ),
        ({"labels": [1, 2]}, "`input_ids` is missing"),
        # TRL's and verl's rows: read as prompts alone, their prompts would be their responses
        ({"input_ids": [1, 2], "completion_mask": [0, 1]}, "`completion_mask` is not read"),
        ({"input_ids": [1, 2], "loss_mask": [0, 1]}, "`loss_mask` is not read: mark the response"),
        ({**IDS, "loss_scale": [0, 1, 0.5]}, "column `loss_scale` is not supported"),
        ({"input_ids": [], "labels": []}, "input_ids is empty"),
        (
            {"input_ids": [1, True], "labels": [-100, 1]},
            "input_ids[1] must be an integer, got a boolean True",
        ),
        (
            {"input_ids": [1, 2.0], "labels": [-100, 2]},
            "input_ids[1] must be an integer, got a float 2.0",
        ),
        (
            {"input_ids": [[1, 2]], "labels": [[-100, 2]]},
            "input_ids[0] must be an integer, got a list [1, 2]",
        ),
        (
            {"input_ids": [1, 10], "labels": [-100, 9]},
            "input_ids[1] is 10, out of the vocabulary [0, 10)",
        ),
        (
            {"input_ids": [1, -1], "labels": [-100, 9]},
            "input_ids[1] is -1, out of the vocabulary [0, 10)",
        ),
        (
            {"input_ids": [1, 10**40], "labels": [-100, 9]},
            f"input_ids[1] is {10**40}, out of the vocabulary",
        ),
        (
            {"input_ids": [1, 2], "labels": [-100, -1]},
            "labels[1] is -1, out of the vocabulary [0, 10) or -100",
        ),
        (
            {"input_ids": [1, 2], "labels": [-100, 10]},
            "labels[1] is 10, out of the vocabulary [0, 10) or -100",
        ),
        ({"input_ids": [1, 2, 3], "labels": [-100, 2]}, "input_ids has 3 tokens and labels 2"),
        (
            {"input_ids": [1, 2], "labels": [-100, -100]},
            "empty response: no label after the first is other than -100",
        ),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "empty response"),
        (
            {"input_ids": [0, 1, 2], "labels": [-100, 1, 2], "attention_mask": [0, 1, 1]},
            "attention_mask[0] is 0 before the last trained token",
        ),
        (
            {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1]},
            "attention_mask must be a list as long as input_ids",
        ),
        ({**IDS, "teacher_input_ids": []}, "teacher_input_ids is empty"),
        ({**IDS, "teacher_input_ids": [10]}, "teacher_input_ids[0] is 10, out of the vocabulary"),
        (
            {**IDS, "teacher_input_ids": "1"},
            "teacher_input_ids must be a list of integers, got a string",
        ),
        (
            {**IDS, "teacher_prompt": "x"},
            "teacher_prompt replaces a user turn, and a tokenised row has none",
        ),
        (
            {"input_ids": [1, 2], "labels": [1, 2], "teacher_input_ids": [3]},
            "labels[0] is trained: with a teacher view",
        ),
        (
            {**IDS, "teacher_input_ids": [1], "teacher_messages": [USER, ANSWER]},
            "has teacher_messages and teacher_input_ids: the teacher has one view",
        ),
        ({"messages": [USER, ANSWER], "teacher_prompt": ""}, "teacher_prompt has no text"),
        (
            {"messages": [{"role": "system", "content": "s"}, ANSWER], "teacher_prompt": "x"},
            "replaces the last user turn, and messages have none",
        ),
        (
            {"messages": [USER, ANSWER], "teacher_messages": [USER]},
            "teacher view without response: teacher_messages end with a user turn",
        ),
        ({"messages": [USER, ANSWER], "teacher_messages": []}, "teacher_messages is empty"),
        (
            {"messages": [USER, ANSWER], "teacher_messages": [{"role": "x", "content": "y"}]},
            "teacher_messages[0].role 'x' is unknown",
        ),
        ({"teacher_messages": [USER, ANSWER]}, "has none of `messages`"),
        (
            {"messages": [USER, ANSWER], "teacher_message": [USER, ANSWER]},
            "column `teacher_message` is unknown: is it `teacher_messages`?",
        ),
        (
            {"messages": [USER, ANSWER], "teacher_audois": ["x.wav"]},
            "column `teacher_audois` is unknown: is it `teacher_audios`?",
        ),
        (
            {"input_ids": [1, 2, 3, 4], "labels": [-100, 3, 4, -100]},
            "each trained label is the next token of input_ids",
        ),
        (
            {"input_ids": [1, 2, 3, 4], "labels": [-100, 3, 4, 9]},
            "these labels are shifted already",
        ),
    ],
)
def test_bad_rows_name_the_reason(raw, reason):
    with pytest.raises(RowError) as error:
        check_row(raw, 10)
    assert reason in str(error.value)


def test_metadata_about_the_teachers_columns_is_left_alone():
    names = (
        "teacher_prompt_id",
        "teacher_message_id",
        "teacher_image_ids",
        "teacher_images_n",
        "teacher_model",
        "teacher",
    )
    assert (
        check_row({"messages": [USER, ANSWER], **dict.fromkeys(names, "x")}, 10).teacher_messages
        is None
    )


def media_of(raw, folder="/data"):
    row = check_row(raw, 10, folder)
    return row, {
        kind: [reference.path for reference in references] for kind, references in row.media.items()
    }


def test_media_stand_in_parts_or_in_columns():
    parts = [
        {"type": "audio", "audio": "a.wav"},
        {"type": "text", "text": "and"},
        {"type": "image", "url": "/b.png"},
    ]
    in_parts, media = media_of({"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert media == {"audio": ["/data/a.wav"], "image": ["/b.png"], "video": []}
    columns = {"audios": ["a.wav"], "images": ["/b.png"]}
    typed = [
        {"type": part["type"]} | ({"text": part["text"]} if "text" in part else {})
        for part in parts
    ]
    for content in (typed, "<audio>and<image>"):
        row, same = media_of(
            {"messages": [{"role": "user", "content": content}, ANSWER], **columns}
        )
        assert same == media and row.messages == in_parts.messages
    assert in_parts.messages[0]["content"] == [
        {"type": "audio"},
        {"type": "text", "text": "and"},
        {"type": "image"},
    ]
    row, _ = media_of(
        {
            "messages": [{"role": "user", "content": "<b> <video> <audio>"}, ANSWER],
            "audios": ["a.wav"],
        }
    )
    assert row.messages[0]["content"] == [
        {"type": "text", "text": "<b> <video> "},
        {"type": "audio"},
    ]
    row, _ = media_of({"messages": [{"role": "user", "content": "an <image> tag"}, ANSWER]})
    assert row.messages[0]["content"] == "an <image> tag" and not row.has_media


def test_the_teachers_media():
    def teacher(**columns):
        row, media = media_of(
            {
                "messages": [{"role": "user", "content": "<audio>?"}, ANSWER],
                "audios": ["a"],
                **columns,
            }
        )
        assert media["audio"] == ["/data/a"]
        own = row.teacher_media
        return own and {
            kind: [reference.path for reference in references] for kind, references in own.items()
        }

    silent = [{"role": "user", "content": "it says so"}, ANSWER]
    assert (
        teacher() is None
        and teacher(teacher_prompt="<audio>!") is None
        and teacher(teacher_audios=["a"]) is None
    )
    assert teacher(teacher_audios=[], teacher_messages=silent) == {
        "audio": [],
        "image": [],
        "video": [],
    }
    assert teacher(teacher_audios=["clean"]) == {"audio": ["/data/clean"], "image": [], "video": []}
    assert teacher(teacher_images=["c"]) == {
        "audio": ["/data/a"],
        "image": ["/data/c"],
        "video": [],
    }
    # In columns, absent means the same as the student's; what stands in the student's turns belongs
    # to those turns.
    assert teacher(teacher_messages=silent) is None
    heard = [{"role": "user", "content": [{"type": "audio", "audio": "a"}]}, ANSWER]
    assert (
        check_row({"messages": heard, "teacher_messages": silent}, 10).teacher_media["audio"] == []
    )
    own = [{"role": "user", "content": [{"type": "audio", "audio": "b"}]}, ANSWER]
    assert (
        check_row({"messages": heard, "teacher_messages": own}, 10).teacher_media["audio"][0].path
        == "b"
    )
