"""Conversations -> ids and spans: exact ids, what the spans say when decoded, and templates that do
not play along.
"""

import json
import os

import pytest

from demo.tiny.tokenizer import train_tokenizer, write_tokenizer
from megatron_gkd.data.chat import load_chat_tokenizer
from megatron_gkd.data.chat_template import Conversation
from megatron_gkd.errors import DataError, RowError
from tests.tiny_tokenizer import (
    CHATML,
    THINKING,
    write_bpe_folder,
    write_sentencepiece_folder,
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def encode(chat, messages, **options):
    """(ids, [start, end] of each assistant turn)."""
    (found,) = chat.encode([Conversation(messages, **options)])
    if isinstance(found, RowError):
        raise found
    return found.ids, [turn[:2] for turn in found.turns]


def spans_as_text(chat, messages):
    ids, spans = encode(chat, messages)
    return [chat.tokenizer.decode(ids[start:end]) for start, end in spans]


def template_ids(chat, messages, **options):
    return list(chat.tokenizer.apply_chat_template(messages, **options)["input_ids"])


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return load_chat_tokenizer(write_bpe_folder(tmp_path_factory.mktemp("bpe")))


CONVERSATION = [
    {"role": "system", "content": "be kind"},
    user("hi"),
    assistant("the sky is blue"),
    user("和 é"),
    assistant("你好 😀 !"),
]


def test_ids_are_those_of_the_whole_conversation(chat):
    ids, spans = encode(chat, CONVERSATION)
    whole = template_ids(chat, CONVERSATION)
    assert ids == whole[:-1]  # without the newline after the last <|im_end|>
    assert chat.tokenizer.decode(whole[-1:]) == "\n"
    for index, (start, end) in zip((2, 4), spans):
        assert ids[:start] == template_ids(chat, CONVERSATION[:index], add_generation_prompt=True)
        assert ids[start:end] == template_ids(chat, CONVERSATION[: index + 1])[start:-1]
        assert ids[end - 1] == chat.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_spans_are_content_and_closing_token(chat):
    assert spans_as_text(chat, CONVERSATION) == ["the sky is blue<|im_end|>", "你好 😀 !<|im_end|>"]
    assert spans_as_text(chat, [user("a"), assistant("x"), assistant("y")]) == [
        "x<|im_end|>",
        "y<|im_end|>",
    ]


@pytest.mark.parametrize(
    "content",
    [
        " leading",
        "trailing \n",
        "<|im_start|>user\nfake",
        "a<|im_end|>\nb",
        "{{ m }}",
        "\ue000",
        "\t\u2028x",
    ],
)
def test_awkward_contents_stay_whole(chat, content):
    assert spans_as_text(
        chat, [user(content), assistant(content), user(content), assistant("z")]
    ) == [
        content + "<|im_end|>",
        "z<|im_end|>",
    ]


def test_a_response_never_shares_a_token_with_its_prompt(chat):
    """The newline that ends the prompt and the ones that begin the response would be one token: the
    prompt stays as generation sees it.
    """
    messages = [user("a"), assistant("\n\nb")]
    ids, [(start, end)] = encode(chat, messages)
    assert ids[:start] == template_ids(chat, messages[:1], add_generation_prompt=True)
    assert chat.tokenizer.decode(ids[start:end]) == "\n\nb<|im_end|>"


def test_an_empty_thinking_block_belongs_to_the_prompt(tmp_path):
    chat = load_chat_tokenizer(write_bpe_folder(tmp_path, THINKING))
    messages = [user("q"), assistant("one"), user("r"), assistant("two")]
    ids, spans = encode(chat, messages)
    assert spans_as_text(chat, messages) == ["one<|im_end|>", "two<|im_end|>"]
    assert chat.tokenizer.decode(ids[: spans[-1][0]]).endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert chat.tokenizer.decode(ids) + "\n" == chat.tokenizer.apply_chat_template(
        messages, tokenize=False
    )


def test_the_tokenizer_of_the_tiny_model(tmp_path):
    write_tokenizer(train_tokenizer(1024), str(tmp_path))
    chat = load_chat_tokenizer(str(tmp_path))
    assert type(chat.tokenizer).__name__ == "Qwen2Tokenizer"
    ids, spans = encode(chat, CONVERSATION)
    assert ids == template_ids(chat, CONVERSATION)[:-1]
    assert encode(chat, CONVERSATION, prompt_only=True)[0] == ids[: spans[-1][0]]
    assert encode(chat, CONVERSATION, prompt_only=True)[0] == template_ids(
        chat, CONVERSATION[:-1], add_generation_prompt=True
    )
    assert spans_as_text(chat, CONVERSATION) == ["the sky is blue<|im_end|>", "你好 😀 !<|im_end|>"]


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ messages[0].content + 1 }}", "refuses the conversation: can only concatenate str"),
        (
            CHATML.replace("assistant\n{% endif %}", "bot\n{% endif %}"),
            "does not begin assistant turn 1 with its own generation prompt",
        ),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"),
            "renders an assistant turn's content 2 times, not once",
        ),
        (CHATML.replace("<|im_end|>", ""), "does not close assistant turns"),
        ("{{ raise_exception('no system turns') }}", "refuses the conversation: no system turns"),
        (
            CHATML.replace("<|im_end|>\n", "<|im_end|>{{ m.content | length }}\n"),
            "what follows assistant turn 1 depending on its content",
        ),
    ],
)
def test_templates_that_break_the_rules_are_refused(tmp_path, template, reason):
    chat = load_chat_tokenizer(write_bpe_folder(tmp_path, template))
    with pytest.raises(RowError, match="chat template of") as error:
        encode(chat, [user("hi"), assistant("the sky")])
    assert reason in str(error.value)


def test_a_template_that_trims_and_closes_with_text(tmp_path):
    template = CHATML.replace("<|im_end|>", " [END]").replace(
        "{{ m.content }}", "{{ m.content | trim }}"
    )
    chat = load_chat_tokenizer(write_bpe_folder(tmp_path, template))
    assert spans_as_text(chat, [user("a"), assistant(" x "), user("b"), assistant("y")]) == [
        "x [END]",
        "y [END]",
    ]


def test_processor_template_file(tmp_path):
    folder = write_bpe_folder(tmp_path, chat_template=None)
    with pytest.raises(DataError, match="tokenizer without a chat template"):
        load_chat_tokenizer(folder)
    with open(os.path.join(folder, "chat_template.json"), "w") as file:
        json.dump({"chat_template": CHATML}, file)
    assert spans_as_text(load_chat_tokenizer(folder), [user("a"), assistant("b")]) == [
        "b<|im_end|>"
    ]


def test_pad_token(chat, tmp_path):
    assert chat.pad_token_id == chat.tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    sentencepiece = load_chat_tokenizer(write_sentencepiece_folder(tmp_path, byte_fallback=True))
    assert sentencepiece.tokenizer.pad_token_id is None
    assert sentencepiece.pad_token_id == sentencepiece.tokenizer.eos_token_id == 2


def test_no_tokenizer_files(tmp_path):
    assert load_chat_tokenizer(str(tmp_path)) is None


@pytest.mark.parametrize(
    "config",
    [{}, {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "Qwen2Tokenizer"}],
    ids=str,
)
def test_sentencepiece_model_alone(tmp_path, config):
    """Byte fallback keeps every character: the ids are those of the whole text, spaces and newlines
    included.
    """
    folder = write_sentencepiece_folder(tmp_path, byte_fallback=True, **config)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump({"model_type": "qwen3_omni_moe"}, file)
    chat = load_chat_tokenizer(folder)
    ids, spans = encode(chat, CONVERSATION)
    assert ids == template_ids(chat, CONVERSATION)[: len(ids)]
    assert (
        chat.tokenizer.decode(ids)
        == chat.tokenizer.apply_chat_template(CONVERSATION, tokenize=False)[:-1]
    )
    assert spans_as_text(chat, CONVERSATION) == ["the sky is blue<|im_end|>", "你好 😀 !<|im_end|>"]


def test_sentencepiece_that_folds_whitespace(tmp_path):
    """The default normaliser turns the newline before a response into a space that may melt into
    its first piece.
    """
    chat = load_chat_tokenizer(write_sentencepiece_folder(tmp_path, byte_fallback=False))
    messages = [
        user("what colour is the sky"),
        assistant("the sky is blue"),
        user("who is lazy"),
        assistant("dog"),
    ]
    ids, spans = encode(chat, messages)
    assert [text.strip() for text in spans_as_text(chat, messages)] == [
        "the sky is blue<|im_end|>",
        "dog<|im_end|>",
    ]
    for index, (start, _) in zip((1, 3), spans):
        prompt = template_ids(chat, messages[:index], add_generation_prompt=True)
        assert ids[:start][-len(prompt) :][-5:] == prompt[-5:]
    assert chat.tokenizer.unk_token_id not in ids
