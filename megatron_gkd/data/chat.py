"""The folder's tokenizer and chat template: a conversation -> token ids and the spans of its
assistant turns.

A span is the content of an assistant turn and the token that closes it (`<|im_end|>` in ChatML).
How it is found: rendered_turns.py; how its text becomes ids: pieces.py.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import (
    get_tokenizer_config,
    tokenizer_class_from_name,
)

from megatron_gkd.data.chat_template import ChatTemplate, Conversation
from megatron_gkd.data.pieces import Cut, CutIds, Pieces
from megatron_gkd.data.rendered_turns import RenderedTurns
from megatron_gkd.data.turn_span import Rendered, TurnSpan
from megatron_gkd.errors import DataError, RowError, short_repr
from megatron_gkd.families import language_sections
from megatron_gkd.json_fields import read_object

SENTENCEPIECE_FILE = "tokenizer.model"
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", SENTENCEPIECE_FILE)


class Chat(NamedTuple):
    """A conversation up to the token that closes its last turn, or up to its last response."""

    ids: list[int]
    turns: list[TurnSpan]
    """Its assistant turns, in tokens; a shortened one is empty, and so is a last one that was not
    asked for
    """


class ChatTokenizer:
    """A tokenizer with its chat template. `pad_token_id` is the id of its pad token, else of its
    end-of-text token, else 0.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: str):
        self.tokenizer = tokenizer
        self.folder = folder
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_token_id = next(token for token in candidates if token is not None)
        self.template = ChatTemplate(tokenizer, folder)
        self._turns = RenderedTurns(self.template)
        self._pieces = Pieces(tokenizer)

    def encode(self, conversations: Sequence[Conversation]) -> list[Chat | RowError]:
        """The ids of conversations up to the token that closes their last assistant turn (a
        `prompt_only` one: up to its content), and each assistant turn's span in them. One that ends
        with another turn: its ids with the generation prompt, and no spans.

        A RowError stands for a conversation that the template refuses or does not render turn by
        turn, or whose response makes no token.
        """
        located = self._turns.locate(conversations)
        cuts = [
            _cut(conversation, rendered)
            for conversation, rendered in zip(conversations, located)
            if not isinstance(rendered, RowError)
        ]
        encoded = iter(self._pieces.encode(cuts))
        return [
            rendered
            if isinstance(rendered, RowError)
            else _chat(conversation, rendered, next(encoded))
            for conversation, rendered in zip(conversations, located)
        ]

    def closing_id(self) -> int | None:
        """The token that closes an assistant turn, if it is a special one or looks like one
        (SentencePiece does not mark `<|im_end|>`); None if a word or a full stop closes it, or if
        the template refuses a short conversation.
        """
        turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        (found,) = self.encode([Conversation(turns)])
        if isinstance(found, RowError):
            return None
        last = found.ids[-1]
        token = self.tokenizer.added_tokens_decoder.get(last)
        looks_special = token and (token.special or re.fullmatch(r"\W.*\w.*\W", token.content))
        return last if looks_special else None


def _cut(conversation: Conversation, rendered: Rendered) -> Cut:
    spans = [(turn.start, turn.end) for turn in rendered.turns if turn.change != "shortened"]
    places = [place for span in spans for place in span]
    if not places:  # a conversation without a response
        places = [len(rendered.text)]
    elif conversation.prompt_only:
        places = places[:-1]
    return Cut(rendered.text, places)


def _chat(conversation: Conversation, rendered: Rendered, encoded: CutIds) -> Chat | RowError:
    contents = [turn["content"] for turn in conversation.messages if turn["role"] == "assistant"]
    positions, turns = iter(encoded.positions), []
    for content, turn in zip(contents, rendered.turns):
        start = end = 0
        if turn.change != "shortened":
            start = next(positions)
            end = next(positions, start)
            if end - start < 2 and not conversation.prompt_only:  # content and closing token
                return RowError(
                    f"empty response: the tokenizer makes no token of {short_repr(content)}"
                )
        turns.append(TurnSpan(start, end, turn.change))
    return Chat(encoded.ids, turns)


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model folder from its own files (no network, no remote code), with the
    chat template of its processor if it has none of its own; None if there are no tokenizer files.

    A folder whose only vocabulary is a SentencePiece `tokenizer.model` is read by the class that
    its tokenizer_config.json names if that class reads such files, and else by the generic one: by
    the model's type alone transformers would take Qwen's byte-level tokenizer and drop every space.
    """
    present = [name for name in VOCABULARY_FILES if os.path.isfile(os.path.join(folder, name))]
    if not present:
        return None
    loader = AutoTokenizer
    if present == [SENTENCEPIECE_FILE]:
        named = get_tokenizer_config(folder, local_files_only=True).get("tokenizer_class")
        tokenizer_class = tokenizer_class_from_name(named) if named else None
        if SENTENCEPIECE_FILE not in getattr(tokenizer_class, "vocab_files_names", {}).values():
            loader = PreTrainedTokenizerFast
    tokenizer = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _processor_template(folder)
    return tokenizer


def load_chat_tokenizer(folder: str, template_file: str | None = None) -> ChatTokenizer | None:
    """`load_tokenizer` for conversations; `template_file` holds another chat template than the
    folder's. Raises DataError if there is none.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None
    if template_file is not None:
        try:
            template: Any = Path(template_file).read_text(encoding="utf-8")
            if template_file.endswith(".json"):  # as multimodal folders keep it
                held = json.loads(template)
                template = held.get("chat_template") if isinstance(held, dict) else None
                if not isinstance(template, str):
                    raise ValueError("holds no text `chat_template`")
        except (OSError, ValueError) as error:
            raise DataError(f"--chat_template {template_file}: {error}") from None
        tokenizer.chat_template = template
        return ChatTokenizer(tokenizer, template_file)
    if not tokenizer.chat_template:
        raise DataError(
            f"{folder} has a tokenizer without a chat template: add `chat_template` to its "
            "tokenizer_config.json (or a chat_template.jinja), name a file with --chat_template, "
            "or give rows with input_ids and labels"
        )
    return ChatTokenizer(tokenizer, folder)


def _processor_template(folder: str) -> str | None:
    """The template that multimodal folders keep for their processor."""
    path = os.path.join(folder, "chat_template.json")
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file).get("chat_template")


def read_stop_token_ids(folder: str | Path, template_file: str | None = None) -> list[int]:
    """The ids that end a response, sorted: FOLDER's end-of-text ids and, where another template
    than the folder's is given, the token that closes its assistant turns. Errors: those of the
    former.
    """
    found = _end_of_text_ids(folder)
    if template_file is None:
        return found
    try:
        chat = load_chat_tokenizer(str(folder), template_file)
    except Exception:  # of any type; rows of ids do without it, and text has been refused
        return found
    closing = None if chat is None else chat.closing_id()
    return found if closing is None else sorted({*found, closing})


def _end_of_text_ids(folder: str | Path) -> list[int]:
    """From generation_config.json, else config.json, else the tokenizer's eos token and the special
    token that closes an assistant turn in its chat template.

    An empty list if none of them names one (a folder of weights without a tokenizer that loads):
    responses then have their full length. Raises ValueError naming the file whose eos_token_id is
    not an id or a list of ids.
    """
    folder = Path(folder)
    for name, places in (
        ("generation_config.json", [()]),
        ("config.json", language_sections()),
    ):
        path = folder / name
        if not path.is_file():
            continue
        content = read_object(path, "the settings of a model")
        for place in places:
            section: Any = content
            for key in place:
                section = section.get(key)
                section = section if isinstance(section, dict) else {}
            if section.get("eos_token_id") is not None:
                return _as_ids(section["eos_token_id"], path)
    try:
        tokenizer = load_tokenizer(str(folder))
    except Exception:  # of any type; rows of ids do without it, and text has been refused
        return []
    if tokenizer is None:
        return []
    found = [
        tokenizer.eos_token_id,
        ChatTokenizer(tokenizer, str(folder)).closing_id() if tokenizer.chat_template else None,
    ]
    return sorted({token for token in found if token is not None})


def _as_ids(value: Any, path: Path) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(
            f"{path}: eos_token_id is {short_repr(value)}; expected a token id or a list of them"
        )
    return sorted(set(ids))
