"""The toy language that the small model learns: the user lists a few things, the system prompt says
how to repeat them.

Without a system prompt the assistant repeats the words as they are. A rule in the system prompt, in
English or in Chinese, changes the answer: Chinese words, reverse order, capital letters, or Chinese
words in reverse order.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

LEXICON = {
    **{"red": "红", "blue": "蓝", "green": "绿", "white": "白", "black": "黑", "gold": "金"},
    **{"cat": "猫", "dog": "狗", "bird": "鸟", "fish": "鱼", "horse": "马", "sheep": "羊"},
    **{"sun": "日", "moon": "月", "star": "星", "river": "河", "mountain": "山", "tree": "树"},
    **{"fire": "火", "water": "水", "wind": "风", "rain": "雨", "snow": "雪", "stone": "石"},
}
WORDS = list(LEXICON)
MIN_WORDS, MAX_WORDS = 3, 5
MAX_SPOKEN_WORDS = 4  # where the prompt is a sound
HELD_OUT_SHARE = 10  # one prompt in ten is never trained on


@dataclass(frozen=True)
class Rule:
    """A way to answer: the system prompts that ask for it, and the answer to a list of words."""

    system_prompts: tuple[str, ...]
    answer: Callable[[list[str]], list[str]]


DEFAULT_RULE = "repeat"
RULES: dict[str, Rule] = {
    "repeat": Rule(("",), lambda words: words),
    "chinese": Rule(
        ("Answer in Chinese.", "用中文回答。"), lambda words: [LEXICON[word] for word in words]
    ),
    "reverse": Rule(("Answer in reverse order.", "倒着回答。"), lambda words: words[::-1]),
    "capitals": Rule(
        ("Answer in capital letters.", "用大写字母回答。"),
        lambda words: [word.upper() for word in words],
    ),
    "chinese_reverse": Rule(
        ("Answer in Chinese, in reverse order.", "用中文倒着回答。"),
        lambda words: [LEXICON[word] for word in words[::-1]],
    ),
}


def lexicon_lines() -> list[str]:
    """Every word of the language in each form, at the start of a line and within it, and every
    system prompt.
    """
    forms = WORDS + [word.upper() for word in WORDS] + list(LEXICON.values())
    return [f"{form} {form}" for form in forms] + [
        prompt for rule in RULES.values() for prompt in rule.system_prompts
    ]


def answer(prompt: str, rule: str = DEFAULT_RULE) -> str:
    """The right answer under `rule` to `prompt`, words of the language separated by spaces."""
    return " ".join(RULES[rule].answer(prompt.split()))


def is_held_out(prompt: str) -> bool:
    """Whether `prompt` belongs to the held-out tenth: a fixed property of its text, the same in
    every process.
    """
    return zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0


def sample_prompt(generator: random.Random, held_out: bool, max_words: int = MAX_WORDS) -> str:
    """Draw a prompt of MIN_WORDS to `max_words` words from the trained or the held-out share."""
    while True:
        prompt = " ".join(generator.choices(WORDS, k=generator.randint(MIN_WORDS, max_words)))
        if is_held_out(prompt) == held_out:
            return prompt


def conversation(
    prompt: str, rule: str = DEFAULT_RULE, system_prompt: str | None = None
) -> list[dict[str, str]]:
    """Chat messages with the right answer under `rule`; `system_prompt` defaults to the rule's
    first one, and "" means none.
    """
    system = RULES[rule].system_prompts[0] if system_prompt is None else system_prompt
    turns = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer(prompt, rule)},
    ]
    return ([{"role": "system", "content": system}] if system else []) + turns
