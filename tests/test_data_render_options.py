"""What flags and columns give the chat template, in the tokens that come of it."""

import inspect
import json

import pytest
from transformers import PreTrainedTokenizerBase

from demo.tiny.tokenizer import train_tokenizer, write_tokenizer
from megatron_gkd.data import DataError, load_datasets
from megatron_gkd.data.chat import load_chat_tokenizer, read_stop_token_ids
from megatron_gkd.data.render_options import RESERVED
from megatron_gkd.data_settings import DataConfig
from megatron_gkd.loss.rows import IGNORED_LABEL
from tests.tiny_tokenizer import CHATML, write_bpe_folder

VOCAB = 1200
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
BLOCK = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_tokenizer(train_tokenizer(1024), str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A template without variables and tools."""
    return write_bpe_folder(tmp_path_factory.mktemp("plain"))


def load(tmp_path, folder, *rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(dataset=[str(path)], max_length=400, **settings)
    return load_datasets(data, folder, VOCAB, 0)[0]


def texts(folder, view):
    """(the whole view, what of it is trained)."""
    decode = load_chat_tokenizer(folder).tokenizer.decode
    trained = [label for label in view.labels if label != IGNORED_LABEL]
    return decode(view.input_ids), decode(trained)


CALL = '<tool_call>\n{"name": "aqi", "arguments": {"city": "Rome"}}\n</tool_call>'


def test_calls_of_tools_are_trained_and_results_are_not(tmp_path, demo_folder):
    """A row in OpenAI's form and the same in ms-swift's."""
    tool = {"name": "aqi", "parameters": {"type": "object"}}
    call = {"name": "aqi", "arguments": '{"city":"Rome"}'}
    system, results = {"role": "system", "content": "be kind"}, ["10", "12"]
    openai = [
        system,
        USER,
        {"role": "assistant", "content": "I look.", "tool_calls": [{"function": call}] * 2},
        *({"role": "tool", "content": result} for result in results),
        ANSWER,
    ]
    swift = [
        USER,
        {"role": "assistant", "content": "I look."},
        *[{"role": "tool_call", "content": json.dumps(call)}] * 2,
        *({"role": "tool_response", "content": result} for result in results),
        ANSWER,
    ]
    rows = load(
        tmp_path,
        demo_folder,
        {"messages": openai, "tools": [{"type": "function", "function": tool}]},
        {"messages": swift, "tools": json.dumps([tool]), "system": "be kind"},
        {"messages": openai, "tools": [tool], "teacher_prompt": "hi there"},
    )
    whole, trained = texts(demo_folder, rows[0].student)
    assert trained == f"I look.\n{CALL}\n{CALL}<|im_end|>ho<|im_end|>"
    assert whole.startswith("<|im_start|>system\nbe kind\n\nTools") and '{"name": "aqi"' in whole
    assert "<tool_response>\n10\n</tool_response>\n<tool_response>\n12\n" in whole
    assert rows[1].student == rows[0].student
    teacher, _ = texts(demo_folder, rows[2].teacher)
    assert "hi there<|im_end|>" in teacher and '{"name": "aqi"' in teacher


def test_a_call_may_be_the_response(tmp_path, demo_folder):
    call = {"role": "tool_call", "content": '{"name": "aqi", "arguments": {"city": "Rome"}}'}
    row = load(tmp_path, demo_folder, {"messages": [USER, call], "teacher_prompt": "hm"})[0]
    assert texts(demo_folder, row.student)[1] == texts(demo_folder, row.teacher)[1]
    assert texts(demo_folder, row.student)[1] == CALL + "<|im_end|>"


def test_turns_without_loss_are_context(tmp_path, demo_folder):
    turns = [USER, ANSWER | {"weight": 0}, USER, {"role": "assistant", "content": "yes"}]
    [row] = [load(tmp_path, demo_folder, {"messages": turns})[0]]
    whole, trained = texts(demo_folder, row.student)
    assert "ho<|im_end|>" in whole and trained == "yes<|im_end|>"


def test_variables_and_system_turns_of_both_views(tmp_path, demo_folder):
    """The flags, a column that wins, and a teacher that differs in them alone."""
    row = {"messages": [USER, ANSWER]}
    off = '{"enable_thinking": false}'
    own = {"chat_template_kwargs": {"enable_thinking": True}}
    data = load(tmp_path, demo_folder, row, row | own, chat_template_kwargs=off, system="be kind")
    first, second = (texts(demo_folder, data[index].student) for index in (0, 1))
    prompt = (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert first == (f"{prompt}{BLOCK}ho<|im_end|>", "ho<|im_end|>")
    assert second == (f"{prompt}ho<|im_end|>", "ho<|im_end|>")
    assert not data[0].has_teacher_view
    opened = load(tmp_path, demo_folder, row, teacher_chat_template_kwargs=off)[0]
    assert BLOCK in texts(demo_folder, opened.teacher)[0]
    assert BLOCK not in texts(demo_folder, opened.student)[0]
    (tmp_path / "t.txt").write_text("be brief")
    told = load(tmp_path, demo_folder, row, teacher_system=str(tmp_path / "t.txt"))[0]
    assert texts(demo_folder, told.teacher)[0].startswith("<|im_start|>system\nbe brief<|im_end|>")
    assert texts(demo_folder, told.student)[0].startswith("<|im_start|>user")


def test_a_template_file(tmp_path, demo_folder):
    file = tmp_path / "upper.jinja"
    file.write_text(
        CHATML.replace("m.role }}", "m.role | upper }}").replace("assistant", "ASSISTANT")
    )
    row = load(tmp_path, demo_folder, {"messages": [USER, ANSWER]}, chat_template=str(file))[0]
    assert texts(demo_folder, row.student)[0] == (
        "<|im_start|>USER\nhi<|im_end|>\n<|im_start|>ASSISTANT\nho<|im_end|>"
    )
    as_folders_keep_it = tmp_path / "chat_template.json"
    as_folders_keep_it.write_text(json.dumps({"chat_template": file.read_text()}))
    again = load(
        tmp_path, demo_folder, {"messages": [USER, ANSWER]}, chat_template=str(as_folders_keep_it)
    )
    assert again[0] == row
    for held in ({"template": "x"}, {"chat_template": ["x"]}, []):
        as_folders_keep_it.write_text(json.dumps(held))
        with pytest.raises(DataError, match="chat_template.json: holds no text `chat_template`"):
            load_chat_tokenizer(demo_folder, str(as_folders_keep_it))
    # a response ends with what the template closes it with, and with the folder's own
    file.write_text(CHATML.replace("<|im_end|>", "<|endoftext|>"))
    ids = load_chat_tokenizer(demo_folder).tokenizer.convert_tokens_to_ids
    both = sorted([ids("<|im_end|>"), ids("<|endoftext|>")])
    assert read_stop_token_ids(demo_folder, str(file)) == both
    assert read_stop_token_ids(demo_folder) == [ids("<|im_end|>")]


@pytest.mark.parametrize(
    "row, settings, message",
    [
        ({}, {"chat_template_kwargs": '{"enable_thinkin": true}'}, "never names `enable_thinkin`"),
        ({}, {"teacher_chat_template_kwargs": '{"tools": []}'}, "use the column `tools`"),
        ({}, {"system": "gone.txt"}, "--system gone.txt: "),
        ({"chat_template_kwargs": {"a": 1}}, {}, "never names `a` and would leave it out"),
        ({"tools": [{"name": "f"}]}, {}, "never names `tools`"),
        ({"messages": [USER, ANSWER | {"reasoning_content": "x"}]}, {}, "`reasoning_content`"),
        ({}, {"columns": '{"id": "messages"}'}, "and the row has a `messages` already"),
    ],
)
def test_what_the_template_would_leave_out(tmp_path, plain, row, settings, message):
    with pytest.raises(DataError) as error:
        load(tmp_path, plain, {"messages": [USER, ANSWER], "id": 7} | row, **settings)
    assert message in str(error.value)


def test_columns_under_other_names(tmp_path, demo_folder):
    names = '{"question": "query", "answer": "response"}'
    rows = load(
        tmp_path,
        demo_folder,
        {"question": "hi", "answer": "ho"},
        {"query": "hi", "response": "ho"},
        columns=names,
    )
    assert rows[0].student == rows[1].student


@pytest.mark.parametrize(
    "flag", ["columns", "chat_template_kwargs", "teacher_chat_template_kwargs"]
)
def test_json_flags_are_checked_at_once(flag):
    for text, reason in (("{x}", "it is not JSON"), ("[1]", "it is a list")):
        with pytest.raises(ValueError, match=f"--{flag} .*must be a JSON object; {reason}"):
            DataConfig(dataset=["x"], **{flag: text})


def test_the_reserved_names_are_those_of_transformers():
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert parameters.keys() - {"self", "kwargs"} <= set(RESERVED)
