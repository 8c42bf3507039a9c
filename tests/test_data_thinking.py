"""Templates that leave out a part of a response, reasoning or white space: what is trained then,
and what the report says.
"""

import json

import numpy as np
import pytest
import soundfile

from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from megatron_gkd.data import load_datasets
from megatron_gkd.data.chat import load_chat_tokenizer
from megatron_gkd.data.chat_template import Conversation
from megatron_gkd.errors import RowError
from tests.test_data_dataset import settings
from tests.tiny_tokenizer import CHATML, thinking_template, write_bpe_folder

TEMPLATES = {
    # as the case may be: reasoning where there is some, a block in any last turn, and with a
    # generation prompt that opens the block
    "thought": dict(block="thought"),
    "block": dict(block="thought or loop.last"),
    "opened": dict(block="thought or loop.last", opened="<think>\\n"),
    "never": dict(block="false"),
    "never, opened": dict(block="false", opened="<think>\\n"),
}
TEXT = "which sound is it"
MEDIA = [{"type": "audio"}, {"type": "text", "text": TEXT}]
REASONED = "<think>\nA steady tone.\n</think>\n\nA tuning fork."
END = "<|im_end|>"


@pytest.fixture(scope="module")
def chat_of(tmp_path_factory):
    """Name of a template -> ChatTokenizer."""
    found = {}

    def get(name):
        if name not in found:
            template = thinking_template(**TEMPLATES[name])
            folder = write_bpe_folder(tmp_path_factory.mktemp("bpe"), template)
            found[name] = load_chat_tokenizer(folder)
        return found[name]

    return get


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def encode(chat, *messages):
    """(text before the last response, text of each trained turn, changes)"""
    (found,) = chat.encode([Conversation(list(messages))])
    if isinstance(found, RowError):
        raise found
    texts = [
        chat.tokenizer.decode(found.ids[start:end])
        for start, end, change in found.turns
        if change != "shortened"
    ]
    before = chat.tokenizer.decode(found.ids[: found.turns[-1].start])
    return before, texts, [turn.change for turn in found.turns]


def generation_prompt(chat, *messages):
    return chat.tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", [TEXT, MEDIA], ids=["text", "media"])
def test_the_last_response_is_trained_whole(chat_of, name, content):
    """Behind the generation prompt, which may hold the beginning of the reasoning."""
    chat = chat_of(name)
    prompt = generation_prompt(chat, user(content))
    before, texts, changes = encode(chat, user(content), assistant(REASONED))
    assert before == prompt
    opened = "<think>\n" if "opened" in name else ""
    assert prompt.endswith("assistant\n" + opened)
    assert texts == [REASONED.removeprefix(opened) + END] and changes == [""]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "response",
    [REASONED, "A tuning fork.", "<think>\n\n\nA  tone\n</think>A fork. ", " <think>a</think>b"],
)
def test_text_and_media_train_the_same(chat_of, name, response):
    chat = chat_of(name)
    trained, gaps = [], []
    for content in (TEXT, MEDIA):
        try:
            before, texts, changes = encode(chat, user(content), assistant(response))
        except RowError as error:
            assert name == "never, opened" and "</think>" not in response
            assert "its own generation prompt" in str(error)
            trained.append(None)
        else:
            prompt = generation_prompt(chat, user(content))
            assert before.startswith(prompt)
            trained.append((texts, changes))
            gaps.append(before[len(prompt) :])
    assert trained[0] == trained[1]
    if response == "A tuning fork." and gaps:
        # a block that the template puts before a response without reasoning, or closes, is prompt
        assert gaps == {
            "block": ["<think>\n\n</think>\n\n", ""],
            "opened": ["\n</think>\n\n"] * 2,
        }.get(name, ["", ""])
        assert trained[0] == (["A tuning fork." + END], [""])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", [TEXT, MEDIA], ids=["text", "media"])
def test_earlier_turns_without_their_reasoning_are_read(chat_of, name, content):
    """What the model reads of an earlier turn is not what it writes: the turn is in the prompt as
    the template has it, untrained.
    """
    chat = chat_of(name)
    turns = [user(content), assistant(REASONED), user(content)]
    before, texts, changes = encode(chat, *turns, assistant(REASONED))
    assert before == generation_prompt(chat, *turns)
    assert "assistant\nA tuning fork.<|im_end|>" in before and "steady" not in before
    assert changes == ["shortened", ""] and len(texts) == 1 and "A steady tone" in texts[0]


@pytest.mark.parametrize("content", [TEXT, MEDIA], ids=["text", "media"])
def test_a_generation_prompt_that_closes_the_block(tmp_path, content):
    """As with enable_thinking: false. Behind turns with media and in earlier turns templates write
    no such block: the response stands behind it all the same, and what was never written so is
    read.
    """
    block = "<think>\n\n</think>\n\n"
    template = thinking_template(block="thought or loop.last", opened=block.replace("\n", "\\n"))
    chat = load_chat_tokenizer(write_bpe_folder(tmp_path, template))
    before, texts, changes = encode(chat, user(content), assistant("A fork."))
    assert before == generation_prompt(chat, user(content)) and before.endswith(block)
    assert texts == ["A fork." + END] and changes == [""]
    turns = [user(content), assistant("One."), user(content)]
    before, texts, changes = encode(chat, *turns, assistant("A fork."))
    assert before == generation_prompt(chat, *turns)
    assert texts == ["A fork." + END] and changes == ["shortened", ""]
    with pytest.raises(RowError, match="closes an empty block of thinking before the response"):
        encode(chat, user(content), assistant(REASONED))


def test_a_turn_before_which_less_stands_later_on(chat_of):
    """The second response was written behind the first one's reasoning, which the third user turn
    takes out of the conversation.
    """
    turns = [user(TEXT), assistant(REASONED), user(MEDIA), assistant("One."), user(TEXT)]
    chat = chat_of("thought")
    before, texts, changes = encode(chat, *turns, assistant(REASONED))
    assert before == generation_prompt(chat, *turns) and "A steady tone" not in before
    assert texts == [REASONED + END] and changes == ["shortened", "shortened", ""]


def test_no_second_block_of_thinking(tmp_path):
    """A template that writes responses as they are, behind an empty block of thinking."""
    template = CHATML.replace(
        "{{ m.role }}\n", "{{ m.role }}\n{% if m.role == 'assistant' %}BLOCK{% endif %}"
    )
    template = template.replace("assistant\n{% endif %}", "assistant\nBLOCK{% endif %}")
    chat = load_chat_tokenizer(
        write_bpe_folder(tmp_path, template.replace("BLOCK", "{{ '<think>\\n\\n</think>\\n\\n' }}"))
    )
    assert encode(chat, user(TEXT), assistant("A fork."))[1] == ["A fork." + END]
    for response in (REASONED, "<think>\n\n</think>\n\nA fork."):
        with pytest.raises(RowError, match="closes an empty block of thinking before"):
            encode(chat, user(TEXT), assistant(response))


def test_an_earlier_turn_that_the_template_keeps_is_trained(chat_of):
    """A user turn with media does not count as the last one with text, so the reasoning before it
    stays in what the model reads.
    """
    before, texts, changes = encode(
        chat_of("thought"), user(TEXT), assistant(REASONED), user(MEDIA), assistant(REASONED)
    )
    assert texts == [REASONED + END] * 2 and changes == ["", ""]
    assert before.count("A steady tone") == 1
    # without reasoning nothing is left out
    turns = [user(TEXT), assistant("One."), user(TEXT), assistant(REASONED)]
    assert encode(chat_of("thought"), *turns)[1:] == (["One." + END, REASONED + END], ["", ""])


@pytest.mark.parametrize(
    "template, response, trained, change",
    [
        (CHATML.replace("{{ m.content }}", "{{ m.content | trim }}"), " x \n", "x", "trimmed"),
        (CHATML.replace("{{ m.content }}", "{{ m.content | trim }}"), "x y", "x y", ""),
        (CHATML.replace("{{ m.content }}", "{{ m.content.strip('\n') }}"), "\nx ", "x ", "trimmed"),
        (CHATML.replace("{{ m.content }}", "{{ m.content.split('(')[0] }}"), "a (b)", "a (b)", ""),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content | replace('<think>', '[THINK]') }}"),
            "<think>x</think>y",
            "[THINK]x</think>y",
            "",
        ),
    ],
)
def test_what_else_templates_change(tmp_path, template, response, trained, change):
    """White space is the template's and is counted; tags of reasoning are the template's too; text
    is the row's.
    """
    chat = load_chat_tokenizer(write_bpe_folder(tmp_path, template))
    _, texts, changes = encode(chat, user("a"), assistant(response))
    assert texts == [trained + END] and changes == [change]


def test_reasoning_in_a_field_of_its_own(tmp_path):
    """It is text of the turn as its content is."""
    template = thinking_template(block="thought").replace(
        "{%- set thought = '' -%}", "{%- set thought = turn.reasoning_content or '' -%}"
    )
    chat = load_chat_tokenizer(write_bpe_folder(tmp_path, template))
    turn = assistant("A tuning fork.") | {"reasoning_content": "A steady tone."}
    for content in (TEXT, MEDIA):
        assert encode(chat, user(content), turn)[1:] == ([REASONED + END], [""])
    earlier = [user(TEXT), turn, user(TEXT), turn]
    assert encode(chat, *earlier)[1:] == ([REASONED + END], ["shortened", ""])


def test_rows_with_sound_and_the_report(tmp_path):
    """From files, on a folder whose template keeps reasoning only after a turn of text."""
    model = build_folder(
        str(tmp_path / "model"),
        TinyModelConfig(num_hidden_layers=1, hidden_size=64, vocab_size=640),
    )
    template = thinking_template().replace(
        "'<|' + part.type + '|>'", "'<|audio_start|><|audio_pad|><|audio_end|>'"
    )
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(8000) / 9).astype("float32"), 16000)
    sound = [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": TEXT}]
    rows = [
        {"messages": [user(sound), assistant(REASONED)]},
        {"messages": [user("<audio>" + TEXT), assistant(REASONED)], "audios": ["a.wav"]},
        {"messages": [user(TEXT), assistant(REASONED)]},
        {"messages": [user(TEXT), assistant(REASONED), user("how high"), assistant(REASONED)]},
        {"messages": [user(TEXT), assistant("<think>\nA tone.\n\n</think>A fork.")]},
        {
            "messages": [user(TEXT), assistant("One."), user("and"), assistant(REASONED)],
            "teacher_prompt": "and it hums",
        },
        {
            "messages": [user(sound), assistant("One."), user(sound), assistant(REASONED)],
            "teacher_messages": [user(TEXT), assistant(""), user("hums"), assistant("")],
            "teacher_audios": [],
        },
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    train, _ = load_datasets(settings(str(path), max_length=300), model, 640, 0)
    decode = load_chat_tokenizer(model).tokenizer.decode
    texts = [decode(train[index].student.targets()) for index in range(len(train))]
    whole = REASONED + END
    fork = "<think>\nA tone.\n</think>\n\nA fork." + END
    assert texts == [whole, whole, whole, whole, fork, *["One." + END + whole] * 2]
    for index in (5, 6):  # each turn where its view has it
        student, teacher = train[index].student, train[index].teacher
        assert train[index].has_teacher_view and teacher.targets() == student.targets()
        for view in (student, teacher):
            first = next(at for at, label in enumerate(view.labels) if label != -100)
            assert decode(view.input_ids[:first]).endswith("<|im_start|>assistant\n")
            assert decode(view.input_ids[first:]).startswith("One." + END + "\n<|im_start|>user")
    assert len(student.media) == 2 and not teacher.media and student.position_ids is not None
    report = train.report
    assert report.shortened_turns == (1, [f"{path}:4"])
    assert report.trimmed_turns == (1, [f"{path}:5"])
    assert report.summary().endswith(
        "; earlier assistant turns that are read and not trained, since the chat template leaves "
        f"out a part of them, such as reasoning: 1 ({path}:4); assistant turns of which the chat "
        f"template leaves out white space: 1 ({path}:5)"
    )
