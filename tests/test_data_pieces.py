"""Many texts at once against one at a time: the same ids, the same cuts, whatever the tokenizer and
the template, and a conversation that fails fails alone.
"""

import random

import pytest
from transformers import AddedToken, AutoTokenizer

from megatron_gkd.data.chat import ChatTokenizer
from megatron_gkd.data.chat_template import Conversation
from megatron_gkd.data.pieces import Cut, Pieces
from megatron_gkd.errors import RowError
from tests.tiny_tokenizer import CHATML, THINKING, write_bpe_folder, write_sentencepiece_folder

PARTS = [
    *("the sky", " is blue", "a", "quick brown fox", "  b", "{{ m }}", "é", "你好", "😀", "\ue000"),
    *("\n", "\n\n", " ", "\t", "\u0301", ">", "<|", "<|im_end|>\n<|im_start|>user\n"),
    *("<|im_end|>", "<|im_start|>", "<think>", "</think>"),
]


def texts(generator):
    return "".join(generator.choice(PARTS) for _ in range(generator.randint(1, 8)))


def one_at_a_time(tokenizer, text, places):
    """(ids, positions) by a call of the tokenizer for each place: what lies before a place has the
    ids that it has without what follows.
    """

    def ids(start, end):
        return list(tokenizer(text[start:end], add_special_tokens=False)["input_ids"])

    done, part, part_start, last, positions = [], [], 0, 0, []
    for place in places:
        longer = ids(part_start, place)
        if longer[: len(part)] != part:
            done, part_start, longer = done + part, last, ids(last, place)
        part, last = longer, place
        positions.append(len(done) + len(part))
    return done + part, positions


ODD_TOKENS = {
    "plain": {},
    "normalized": dict(normalized=True),
    "lstrip": dict(lstrip=True),
    "single_word": dict(single_word=True),
}


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "folded whitespace", *ODD_TOKENS])
def test_ids_are_those_of_each_text_alone(tmp_path, kind):
    if kind in ("sentencepiece", "folded whitespace"):
        folder = write_sentencepiece_folder(tmp_path, byte_fallback=kind == "sentencepiece")
        tokenizer = ChatTokenizer(AutoTokenizer.from_pretrained(folder), folder).tokenizer
    else:
        tokenizer = AutoTokenizer.from_pretrained(write_bpe_folder(tmp_path))
    if kind in ODD_TOKENS:
        tokens = [AddedToken("<think>", **{"normalized": False, **ODD_TOKENS[kind]})]
        tokenizer.add_tokens([*tokens, AddedToken("<thi", normalized=False)])
    generator = random.Random(kind)
    cuts = []
    for _ in range(300):
        text = texts(generator)
        places = sorted(generator.choices(range(len(text) + 1), k=generator.randint(1, 4)))
        cuts.append(Cut(text, places))
    for cut, (ids, positions) in zip(cuts, Pieces(tokenizer).encode(cuts)):
        assert (ids, positions) == one_at_a_time(tokenizer, *cut)


def located_one_by_one(tokenizer, messages):
    """(text, [start, end) of each assistant turn), by a rendering of the turns before it and one
    with a marker in its place.
    """

    def render(turns, **options):
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)

    text, places = render(messages), []
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        prompt = render(messages[:index], add_generation_prompt=True)
        marker = {"role": "assistant", "content": "MARKER"}
        before, after = render([*messages[:index], marker, *messages[index + 1 :]]).split("MARKER")
        assert text.startswith(prompt) and before.startswith(prompt) and text.endswith(after)
        start = len(before) if text.startswith(before) else len(prompt)
        places += [start, len(text) - len(after) + len(after.split("\n")[0])]
    return text, places


REFUSES = "{% if 'REFUSE' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
LOOKS_AT_TEXT = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if '\ue000' in messages[-1].content %}<think>{% endif %}{% endif %}",
)


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        CHATML.replace("<|im_end|>", " [END]"),
        CHATML.replace("{{ m.content }}", "{{ m.content | trim }}"),
        CHATML.replace("{{ m.content }}", "{{ m.content | replace('sky', 'sea') }}"),
        THINKING.replace("'</think>' in m.content", "false").replace(
            "m.content.split('</think>')[-1].lstrip('\n')", "m.content"
        ),
        LOOKS_AT_TEXT,
    ],
    ids=["chatml", "closed by text", "trims", "replaces", "empty block", "looks at text"],
)
def test_turns_are_those_of_each_conversation_alone(tmp_path, template):
    tokenizer = AutoTokenizer.from_pretrained(write_bpe_folder(tmp_path, REFUSES + template))
    chat, generator, conversations = ChatTokenizer(tokenizer, "here"), random.Random(0), []
    most = 1 if template == LOOKS_AT_TEXT else 3
    for _ in range(200):
        turns = [{"role": "system", "content": "be kind"}] * generator.randint(0, 1)
        for role in ["user", "assistant"] * generator.randint(1, most):
            turns.append({"role": role, "content": f"x{texts(generator)}y"})
        conversations.append(turns)
    refused = [{"role": "user", "content": "REFUSE"}, {"role": "assistant", "content": "x"}]
    conversations[7] = refused
    found = chat.encode([Conversation(turns) for turns in conversations])
    prompts = chat.encode([Conversation(turns, prompt_only=True) for turns in conversations])
    assert (
        str(found[7])
        == str(prompts[7])
        == "the chat template of here refuses the " + ("conversation: no")
    )
    num_same = 0
    for turns, one, prompt in zip(conversations, found, prompts):
        if turns is refused or ("'sea'" in template and "sky" in str(turns)):
            continue  # what a template replaces is put back
        try:
            text, places = located_one_by_one(tokenizer, turns)
        except AssertionError:  # the generation prompt opens reasoning that the text does not have
            assert template == LOOKS_AT_TEXT
            assert isinstance(one, RowError) != ("</think>" in turns[-1]["content"])
            continue
        ids, positions = one_at_a_time(tokenizer, text, places)
        assert one.ids == ids
        assert [turn[:2] for turn in one.turns] == [*zip(positions[::2], positions[1::2])]
        assert prompt.ids == one_at_a_time(tokenizer, text, places[:-1])[0]
        num_same += 1
    assert num_same > 20


def test_a_template_is_rendered_twice_a_conversation(tmp_path, monkeypatch):
    """As a whole and as a prompt; its own texts are found once."""
    tokenizer = AutoTokenizer.from_pretrained(write_bpe_folder(tmp_path))
    rendered = []
    apply = tokenizer.apply_chat_template

    def counted(conversations, **options):
        rendered.extend(conversations)
        return apply(conversations, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    chat = ChatTokenizer(tokenizer, "here")
    turns = [{"role": role, "content": role} for role in ["user", "assistant"] * 3]
    for number in (1, 50):
        rendered.clear()
        chat.encode([Conversation(turns)] * number)
        assert len(rendered) == 2 * number + (4 if number == 1 else 0)
