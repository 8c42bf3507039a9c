"""The forms in which other programs write rows: each becomes the messages that say the same, and
what has no meaning here is answered with what to write instead.
"""

import json

import pytest

from megatron_gkd.data.render_options import RowDefaults
from megatron_gkd.data.rows import check_row
from megatron_gkd.errors import RowError


def turn(role, content, **others):
    return {"role": role, "content": content, **others}


SYSTEM, USER, ANSWER = turn("system", "be kind"), turn("user", "hi"), turn("assistant", "ho")
SECOND, LAST = turn("user", "more"), turn("assistant", "no more")
CALL = {"type": "function", "function": {"name": "aqi", "arguments": {"city": "北京"}}}
RESULT = turn("tool", '{"aqi": 10}')
TOOL = {"name": "aqi", "description": "of a city", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    "raw, messages",
    [
        # ShareGPT, in LLaMA-Factory's and ms-swift's names
        (
            {
                "conversations": [
                    {"from": "system", "value": "be kind"},
                    {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "ho"},
                ]
            },
            [SYSTEM, USER, ANSWER],
        ),
        (
            {"conversations": [{"from": "user", "value": "hi"}, {"from": "bot", "value": "ho"}]},
            [USER, ANSWER],
        ),
        ({"messages": [{"from": "human", "value": "hi"}, ANSWER]}, [USER, ANSWER]),
        ({"messages": [turn("developer", "be kind"), USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
        (
            {"system": "be kind", "conversation": [{"human": "hi", "assistant": "ho"}]},
            [SYSTEM, USER, ANSWER],
        ),
        ({"conversations": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
        # ms-swift
        ({"query": "hi", "response": "ho"}, [USER, ANSWER]),
        (
            {
                "query": "more",
                "response": "no more",
                "history": [["hi", "ho"]],
                "system": "be kind",
            },
            [SYSTEM, USER, ANSWER, SECOND, LAST],
        ),
        (
            {"query": "more", "response": "no more", "history": '[["hi", "ho"]]'},
            [USER, ANSWER, SECOND, LAST],
        ),
        ({"query": "hi", "response": "ho", "system": "", "history": []}, [USER, ANSWER]),
        ({"query": "hi", "response": "ho", "history": ""}, [USER, ANSWER]),
        ({"query": "hi", "response": "ho", "system_prompt": "be kind"}, [SYSTEM, USER, ANSWER]),
        # TRL
        ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
        ({"prompt": "hi", "completion": "ho"}, [USER, ANSWER]),
        ({"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}, [USER, ANSWER]),
        (
            {"prompt": '[{"a": 1}] is what?', "completion": "[{}]"},
            [turn("user", '[{"a": 1}] is what?'), turn("assistant", "[{}]")],
        ),
        *(  # responses that are lists of other objects
            ({"prompt": "hi", "completion": text}, [USER, turn("assistant", text)])
            for text in ('[{"from": "Bonn", "to": "Ulm"}]', '[{"value": 3}]', '[{"content": "x"}]')
        ),
        (
            {"prompt": json.dumps([dict(content="hi", role="user")]), "completion": "ho"},
            [USER, ANSWER],
        ),
        ({"prompt": "hi", "response": "ho"}, [USER, ANSWER]),
        # a response in the name of another form's
        ({"prompt": "hi", "output": "ho"}, [USER, ANSWER]),
        ({"query": "hi", "output": "ho"}, [USER, ANSWER]),
        ({"instruction": "hi", "response": "ho"}, [USER, ANSWER]),
        ({"instruction": "hi", "input": "", "completion": "ho", "context": "c"}, [USER, ANSWER]),
        ({"instruction": "hi", "output": "ho", "response": "of a model"}, [USER, ANSWER]),
        ({"instruction": "hi", "context": "", "response": "ho"}, [USER, ANSWER]),
        # alpaca
        (
            {"instruction": "mo", "input": "", "output": "x", "history": [["hi", "ho"]]},
            [USER, ANSWER, turn("user", "mo"), turn("assistant", "x")],
        ),
        (
            {"instruction": "a", "input": "b", "output": "x", "system": "be kind"},
            [SYSTEM, turn("user", "a\nb"), turn("assistant", "x")],
        ),
        # a system turn and the same text in its column
        ({"messages": [SYSTEM, USER, ANSWER], "system": "be kind"}, [SYSTEM, USER, ANSWER]),
        # columns that are other forms' in other rows
        (
            {"messages": [USER, ANSWER], "prompt": "p", "query": "q", "response": "r"},
            [USER, ANSWER],
        ),
    ],
)
def test_each_form_becomes_messages(raw, messages):
    row = check_row(raw, 10)
    assert row.messages == messages
    assert row.teacher_messages is None and not row.untrained


def test_media_of_the_forms(tmp_path):
    for raw in (
        {"query": "<audio>what", "response": "ho", "audios": ["a.wav"]},
        {
            "conversations": [{"from": "human", "value": "<audio>what"}, ANSWER],
            "audios": ["a.wav"],
        },
        {"prompt": "<audio>what", "completion": "ho", "audios": ["a.wav"]},
    ):
        row = check_row(raw, 10, "/data")
        assert row.messages[0]["content"] == [{"type": "audio"}, {"type": "text", "text": "what"}]
        assert [reference.path for reference in row.media["audio"]] == ["/data/a.wav"]


@pytest.mark.parametrize(
    "turns",
    [
        # OpenAI
        [USER, turn("assistant", None, tool_calls=[CALL]), RESULT, ANSWER],
        [
            USER,
            turn(
                "assistant",
                "",
                tool_calls=[{"function": {"name": "aqi", "arguments": '{"city":"北京"}'}}],
            ),
            RESULT,
            ANSWER | {"tool_calls": "", "function_call": {}, "name": None, "refusal": None},
        ],
        [USER, {"role": "assistant", "function_call": CALL["function"]}, RESULT, ANSWER],
        # ms-swift
        [
            USER,
            turn("tool_call", '{"name": "aqi", "arguments": {"city": "北京"}}'),
            turn("tool_response", '{"aqi": 10}'),
            ANSWER,
        ],
        # LLaMA-Factory
        [
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": {"aqi": 10}},
            {"from": "gpt", "value": "ho"},
        ],
    ],
)
def test_calls_of_tools_have_one_form(turns):
    called = turn("assistant", "", tool_calls=[CALL])
    assert check_row({"messages": turns}, 10).messages == [USER, called, RESULT, ANSWER]


def test_calls_belong_to_the_turn_before_them():
    call = turn("tool_call", json.dumps(CALL["function"]))
    row = check_row(
        {"messages": [USER, turn("assistant", "let me see"), call, call, RESULT, LAST]}, 9
    )
    both = turn("assistant", "let me see", tool_calls=[CALL, CALL])
    assert row.messages == [USER, both, RESULT, LAST]
    several = turn("function-call", json.dumps([CALL["function"]] * 2))
    assert check_row({"messages": [USER, several]}, 9).messages == [
        USER,
        turn("assistant", "", tool_calls=[CALL, CALL]),
    ]


def test_what_templates_may_render_is_passed_on():
    turns = [
        USER | {"name": "Ann"},
        turn("assistant", "", tool_calls=[CALL | {"id": "c1"}], reasoning_content="a city"),
        RESULT | {"tool_call_id": "c1", "name": "aqi"},
        ANSWER,
    ]
    assert check_row({"messages": turns}, 10).messages == turns


def test_tools_are_those_of_both_views():
    for given in ([TOOL], json.dumps([TOOL]), [{"type": "function", "function": TOOL}]):
        row = check_row({"messages": [USER, ANSWER], "tools": given, "teacher_prompt": "x"}, 10)
        wrapped = [{"type": "function", "function": TOOL}]
        assert row.options.tools == row.teacher_options.tools == wrapped
    assert check_row({"messages": [USER, ANSWER], "tools": "[]"}, 10).options.tools is None


@pytest.mark.parametrize("flag", [{"loss": False}, {"weight": 0}, {"loss_scale": 0.0}])
def test_flags_of_turns(flag):
    row = check_row({"messages": [USER, ANSWER | flag, SECOND, LAST | {"loss": True}]}, 10)
    assert row.messages == [USER, ANSWER, SECOND, LAST] and row.untrained == {1}
    row = check_row({"messages": [USER, ANSWER | flag, SECOND, LAST], "system": "be kind"}, 10)
    assert row.messages[0] == SYSTEM and row.untrained == {2}
    # what follows the last trained turn is left out, for the teacher too
    row = check_row({"messages": [USER, ANSWER, SECOND, LAST | flag], "teacher_prompt": "x"}, 10)
    assert row.messages == [USER, ANSWER] and not row.untrained
    assert row.teacher_messages == [turn("user", "x"), ANSWER]


def test_of_prompt_and_completion_the_completion_is_trained():
    row = check_row({"prompt": [USER, ANSWER, SECOND], "completion": [LAST]}, 10)
    assert row.messages == [USER, ANSWER, SECOND, LAST] and row.untrained == {1}


def test_prompts_alone():
    for raw in ({"query": "hi"}, {"prompt": "hi"}, {"prompt": [USER], "completion": []}):
        assert check_row(raw, 10).messages == [USER]
    calls = [USER, turn("tool_call", CALL["function"]), RESULT]
    assert check_row({"conversations": calls}, 10).messages[-1] == RESULT


def test_teacher_messages_in_other_names():
    turns = [{"from": "human", "value": "hint"}, {"from": "gpt", "value": "", "loss": False}]
    row = check_row({"query": "hi", "response": "ho", "teacher_messages": turns}, 10)
    assert row.teacher_messages == [turn("user", "hint"), turn("assistant", "ho")]


@pytest.mark.parametrize(
    "raw, reason",
    [
        ({"conversations": []}, "conversations is empty"),
        ({"conversations": "[{"}, "conversations is text that is not JSON"),
        (
            {"conversations": [{"from": "robot", "value": "x"}]},
            "conversations[0].from 'robot' is unknown: system, user, assistant, tool are the roles",
        ),
        (
            {"conversations": [{"from": "human", "value": 3}, ANSWER]},
            "conversations[0].value must be a string, got an integer 3",
        ),
        (
            {"query": "hi", "conversations": [USER, ANSWER]},
            "has conversations and query/response: one of them must go",
        ),
        ({"prompt": str([USER]), "completion": "a"}, "prompt is text that is not JSON"),
        ({"prompt": "hi", "completion": "a", "response": "b"}, "has response and completion"),
        (
            {"prompt": "hi", "chosen": "a", "rejected": "b"},
            "prompt/completion end without a response, and column `chosen` would be left out",
        ),
        ({"chosen": [USER], "rejected": [USER]}, "keep the better one, as the response"),
        ({"text": "once upon a time"}, "`text` is not divided into prompt and response"),
        ({"query": "hi", "response": ["a", "b"]}, "response must be a string, got a list"),
        ({"query": "hi", "response": "x", "history": [["a"]]}, "history[0] must be [prompt, resp"),
        ({"query": "hi", "response": "x", "history": [["a", None]]}, "history[0][1] must be a str"),
        ({"messages": [USER, ANSWER], "history": [["a", "b"]]}, "write it into messages"),
        (
            {"messages": [SYSTEM, USER, ANSWER], "system": "be rude"},
            "has a system turn and column `system`, which say different things",
        ),
        (
            {"query": "q", "response": "r", "system": "a", "system_prompt": "b"},
            "system_prompt: one",
        ),
        (
            {"messages": [USER, ANSWER], "teacher_conversations": [USER]},
            "name it `teacher_messages`",
        ),
        (
            {"messages": [USER, ANSWER | {"loss": 0.5}]},
            "messages[1].loss is 0.5: 1 or true trains the turn, 0 or false does not",
        ),
        (
            {"messages": [USER | {"weight": 1}, ANSWER]},
            "messages[0].weight is 1: only assistant turns can be trained",
        ),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "no assistant turn is trained"),
        (
            {
                "messages": [USER, ANSWER, SECOND, LAST | {"weight": 0}],
                "teacher_messages": [USER, ANSWER, SECOND, LAST],
            },
            "the turns after messages[1] are not trained",
        ),
        (
            {"messages": [USER, ANSWER, turn("tool_call", json.dumps(TOOL), loss=False)]},
            "messages[2] is a call of the turn before it, and only one of them is trained",
        ),
        (
            {"messages": [USER, turn("assistant", "x", tool_calls=[{"function": {}}])]},
            "messages[1].tool_calls[0] is a call without a name",
        ),
        (
            {
                "messages": [
                    USER,
                    turn("assistant", "", tool_calls=[{"name": "f", "arguments": "x = 1"}]),
                ]
            },
            "messages[1].tool_calls[0].arguments must be an object or its JSON text, got a string",
        ),
        ({"messages": [USER, turn("tool_call", "f(x)")]}, "messages[1].content must be a call"),
        ({"messages": [USER, ANSWER], "tools": "aqi"}, "tools must be a list of objects"),
        ({"messages": [USER, ANSWER | {"thinking": "x"}]}, "thinking: name it reasoning_content"),
        ({"messages": [USER | {"images": ["a"]}, ANSWER]}, "media stand in the content's parts"),
        (
            {"messages": [USER, ANSWER], "chat_template_kwargs": {"max_pixels": 9}},
            "max_pixels belongs to the media, not to the template",
        ),
        (
            {"messages": [USER, ANSWER], "teacher_chat_template_kwargs": {"tokenize": True}},
            "teacher_chat_template_kwargs: tokenize is no variable of a template",
        ),
        (
            {"messages": [USER, ANSWER], "teacher_system": "x", "teacher_input_ids": [1]},
            "`teacher_system` is for turns, and the teacher's view of this row is ids",
        ),
        (
            {"messages": [USER, ANSWER], "tools": [{"name": "\ud800"}]},
            "tools is not valid Unicode: lone surrogate",
        ),
        (
            {"messages": [USER, ANSWER], "tools": [{"name": b"f"}]},
            "tools cannot be written as JSON",
        ),
        (
            {"messages": [USER, turn("tool_call", {"name": "f", "arguments": {"a": "\udc00"}})]},
            "messages[1].content[0] is not valid Unicode",
        ),
        ({"messages": [USER, turn("tool", None), ANSWER]}, "messages[1].content must be a string"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": 3}, "must be a JSON object such as"),
        ({"messages": [USER | {"x" * 9999: 1}, ANSWER]}, "messages[0] has xxxxxxxxxxxxx...xxx"),
    ],
)
def test_what_has_no_meaning_is_answered(raw, reason):
    with pytest.raises(RowError) as error:
        check_row(raw, 10)
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 500


FLAGS = RowDefaults("S", "T", {"a": 1, "b": 1}, {"b": 2})


@pytest.mark.parametrize(
    "raw, defaults, student, teacher",
    [
        # the flags: for views that have no system turn
        ({}, FLAGS, "S", "T"),
        ({}, RowDefaults(system="S"), "S", None),
        ({}, RowDefaults(teacher_system="T"), None, "T"),
        ({}, RowDefaults("S", ""), "S", ""),
        ({"system": "c"}, FLAGS, "c", None),
        ({"system": ""}, FLAGS, None, None),
        ({"teacher_prompt": "x"}, FLAGS, "S", "T"),
        ({"teacher_messages": [USER, ANSWER]}, FLAGS, "S", "T"),
        ({"teacher_messages": [turn("system", "o"), USER, ANSWER]}, FLAGS, "S", "o"),
        # the columns
        ({"teacher_system": "t"}, FLAGS, "S", "t"),
        ({"system": "c", "teacher_system": "t"}, RowDefaults(), "c", "t"),
        ({"system": "c", "teacher_system": ""}, RowDefaults(), "c", ""),
        ({"messages": [turn("system", "m"), USER, ANSWER]}, FLAGS, "m", None),
        (
            {"messages": [turn("system", "m"), USER, ANSWER], "teacher_system": "t"},
            FLAGS,
            "m",
            "t",
        ),
    ],
)
def test_system_turns(raw, defaults, student, teacher):
    """None: the student's view (teacher), no system turn (student); "": no system turn."""
    row = check_row({"messages": [USER, ANSWER]} | raw, 10, "", defaults)
    assert [turn["content"] for turn in row.messages if turn["role"] == "system"] == (
        [student] if student else []
    )
    variables = defaults.teacher_variables
    if teacher is None and not variables:
        assert row.teacher_messages is None
    else:
        found = [turn["content"] for turn in row.teacher_messages if turn["role"] == "system"]
        expected = (student if teacher is None else teacher) or None
        assert found == ([expected] if expected else [])


def test_variables_of_the_template():
    own = {"chat_template_kwargs": {"b": 3}, "teacher_chat_template_kwargs": '{"c": 4}'}
    row = check_row({"messages": [USER, ANSWER], **own}, 10, "", FLAGS)
    assert row.options.variables == {"a": 1, "b": 3}
    assert row.teacher_options.variables == {"a": 1, "b": 2, "c": 4}
    # another view than the student's, of the same turns
    row = check_row({"messages": [USER, ANSWER]}, 10, "", RowDefaults(teacher_variables={"b": 2}))
    assert row.teacher_messages == row.messages
