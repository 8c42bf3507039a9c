"""Tokenizer folders for the data tests: a byte-level BPE, and SentencePiece models, each with a
chat template.
"""

import json
import os

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thinking as Qwen3 renders it: the last assistant turn gets a thinking block, earlier ones lose
# theirs.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if m.role != 'assistant' %}{{ m.content }}"
    "{% elif loop.last %}<think>\n"
    "{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}{% endif %}"
    "{{ '\n</think>\n\n' + answer }}{% else %}{{ answer }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Reasoning as the Thinking models' template has it: kept after the last user turn, if that is text.
# A content of parts is no such turn. The options of `thinking_template` are what folders differ in.
_REASONING = (
    "{%- macro parts(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}"
    "{%- for part in content -%}{%- if part.type == 'text' -%}{{- part.text -}}{%- else -%}"
    "{{- '<|' + part.type + '|>' -}}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{%- set ns = namespace(searching=true, query=messages|length - 1) -%}"
    "{%- for turn in messages[::-1] -%}"
    "{%- if ns.searching and turn.role == 'user' and turn.content is string -%}"
    "{%- set ns.searching = false -%}{%- set ns.query = messages|length - 1 - loop.index0 -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- for turn in messages -%}{%- set text = parts(turn.content) -%}{%- set thought = '' -%}"
    "{%- if turn.role == 'assistant' and '</think>' in text -%}"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{- '<|im_start|>' + turn.role + '\n' -}}"
    "{%- if turn.role == 'assistant' and loop.index0 > ns.query and (BLOCK) -%}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}"
    "{{- text + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\nOPENED' -}}{%- endif -%}"
)


def thinking_template(*, block="thought", opened=""):
    """block: when reasoning is written (`false`: never; `thought or loop.last`: an empty block as
    well). opened: how the generation prompt begins a response.
    """
    return _REASONING.replace("BLOCK", block).replace("OPENED", opened)


SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "system user assistant what colour is the sky",
    "the sky is blue and the sea is deep",
    "你好 世界 天空 是 蓝色 的",
] * 10


def write_bpe_folder(folder, chat_template=CHATML, vocab_size=400):
    """A folder with a byte-level BPE tokenizer (about `vocab_size` ids) and the template; returns
    its path.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS + ["a\n\nb\n\n\nc"] * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
    )
    fast.save_pretrained(folder)
    return str(folder)


def write_sentencepiece_folder(folder, *, byte_fallback, chat_template=CHATML, **config):
    """A folder with nothing but a SentencePiece `tokenizer.model` and a tokenizer_config.json of
    `config`; returns its path.
    """
    os.makedirs(folder, exist_ok=True)
    corpus = os.path.join(folder, "corpus.txt")
    with open(corpus, "w", encoding="utf-8") as file:
        file.write("\n".join(CORPUS))
    kind = (
        dict(
            model_type="bpe", vocab_size=400, byte_fallback=True, normalization_rule_name="identity"
        )
        if byte_fallback
        else dict(model_type="unigram", vocab_size=120, hard_vocab_limit=False)
    )
    sentencepiece.SentencePieceTrainer.train(
        input=corpus,
        model_prefix=os.path.join(folder, "tokenizer"),
        user_defined_symbols=SPECIAL_TOKENS[1:],
        minloglevel=2,
        **kind,
    )
    os.remove(corpus)
    os.remove(os.path.join(folder, "tokenizer.vocab"))
    if chat_template is not None:
        config["chat_template"] = chat_template
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file)
    return str(folder)
