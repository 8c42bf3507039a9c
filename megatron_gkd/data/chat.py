"""The folder's tokenizer and chat template: a conversation -> token ids and the spans of its
assistant turns.

A span is the content of an assistant turn and the token that closes it (`<|im_end|>` in ChatML).
Templates are programs, so the spans come from what a template does and not from what it is supposed
to look like: each turn is rendered as a prompt (`add_generation_prompt`) and once more with a
marker instead of its content. Both must agree with the text of the whole conversation, which
is what the model sees; a template that does not keep to this is refused with the reason.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import (
    get_tokenizer_config,
    tokenizer_class_from_name,
)

from megatron_gkd.data.conversation import Messages, RenderOptions
from megatron_gkd.errors import DataError, RowError, short_repr
from megatron_gkd.families import language_sections

SENTENCEPIECE_FILE = "tokenizer.model"
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", SENTENCEPIECE_FILE)
_NO_OPTIONS = RenderOptions()
_MAY_BE_LEFT_OUT = ("tool_calls", "reasoning_content")
_MARKER = "\ue000response\ue001"

Span = tuple[int, int]


class ChatTokenizer:
    """A tokenizer with its chat template. `pad_token_id` is the id of its pad token, else of its
    end-of-text token, else 0.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: str):
        self.tokenizer = tokenizer
        self.folder = folder
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_token_id = next(token for token in candidates if token is not None)
        self._named_by_template: dict[tuple[str, bool], bool] = {}
        self._added_tokens = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)

    def encode(
        self, messages: Messages, options: RenderOptions = _NO_OPTIONS
    ) -> tuple[list[int], list[Span]]:
        """Ids of a conversation that ends with an assistant turn, up to the token that closes it,
        and each assistant turn's span in them.

        Raises RowError if the template refuses the conversation or does not render it turn by turn.
        """
        ids, positions = self._tokenise(*self._cut(messages, options))
        spans = list(zip(positions[::2], positions[1::2]))
        contents = [turn["content"] for turn in messages if turn["role"] == "assistant"]
        for (start, end), content in zip(spans, contents):
            if end - start < 2:  # content and closing token
                raise RowError(
                    f"empty response: the tokenizer makes no token of {short_repr(content)}"
                )
        return ids, spans

    def encode_prompt(self, messages: Messages, options: RenderOptions = _NO_OPTIONS) -> list[int]:
        """The ids of `encode` before the last assistant turn's span."""
        text, cuts = self._cut(messages, options)
        return self._tokenise(text, cuts[:-1])[0]

    def encode_request(self, messages: Messages, options: RenderOptions = _NO_OPTIONS) -> list[int]:
        """The ids of turns that the assistant is to answer, the template's generation prompt
        included.
        """
        return self._ids(self._render(messages, options, add_generation_prompt=True))

    def closing_id(self) -> int | None:
        """The token that closes an assistant turn, if it is a special one or looks like one
        (SentencePiece does not mark `<|im_end|>`); None if a word or a full stop closes it, or if
        the template refuses a short conversation.
        """
        turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        try:
            last = self.encode(turns)[0][-1]
        except RowError:
            return None
        token = self.tokenizer.added_tokens_decoder.get(last)
        looks_special = token and (token.special or re.fullmatch(r"\W.*\w.*\W", token.content))
        return last if looks_special else None

    def _cut(self, messages: Messages, options: RenderOptions) -> tuple[str, list[int]]:
        """The whole conversation as text, and the characters at which each assistant turn's span
        starts and ends.
        """
        text = self._render(messages, options)
        assistants = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
        spans = [self._locate(messages, options, index, text) for index in assistants]
        return text, [cut for span in spans for cut in span]

    def _render(
        self, messages: Messages, options: RenderOptions, *, add_generation_prompt: bool = False
    ) -> str:
        self.check_renders(messages, options)
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=options.tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **options.variables,
            )
        except Exception as error:  # a template is a program and may raise any error
            raise RowError(
                f"the chat template of {self.folder} refuses the conversation: {error}"
            ) from error

    def check_renders(self, messages: Messages, options: RenderOptions) -> None:
        """Raises RowError for a variable, for tools, their calls or reasoning that the template
        does not even name: it would leave them out without a word.
        """
        of_turns = {name for turn in messages for name in _MAY_BE_LEFT_OUT if turn.get(name)}
        tools = ["tools"] if options.tools else []
        for name in [*options.variables, *tools, *sorted(of_turns)]:
            key = (name, bool(tools))
            if key not in self._named_by_template:
                template = self.tokenizer.get_chat_template(tools=options.tools)
                found = re.search(rf"\b{re.escape(name)}\b", template)
                self._named_by_template[key] = found is not None
            if not self._named_by_template[key]:
                raise RowError(
                    f"the chat template of {self.folder} never names `{name}` and would leave it "
                    "out: do so, or give --chat_template FILE"
                )

    def _locate(self, messages: Messages, options: RenderOptions, index: int, text: str) -> Span:
        """Characters [start, end) that are trained for turn `index`, in `text`, the whole
        conversation.
        """
        prompt = self._render(messages[:index], options, add_generation_prompt=True)
        marked = list(messages)
        marked[index] = {"role": "assistant", "content": _MARKER}
        around = self._render(marked, options).split(_MARKER)
        if len(around) != 2:
            raise RowError(
                f"the chat template of {self.folder} renders an assistant turn's content "
                f"{len(around) - 1} times, not once"
            )
        before, after = around
        if not (text.startswith(prompt) and before.startswith(prompt)):
            raise RowError(
                f"the chat template of {self.folder} does not begin assistant turn {index} with "
                f"its own generation prompt {short_repr(prompt[-30:])}: prompt and response cannot "
                "be told apart"
            )
        closing = self._closing(after)
        if not closing:
            raise RowError(
                f"the chat template of {self.folder} does not close assistant turns: the model "
                "could not learn to stop"
            )
        if not text.endswith(after):
            raise RowError(
                f"the chat template of {self.folder} renders what follows assistant turn {index} "
                "depending on its content"
            )
        # What the template itself writes before the content (an empty thinking block) belongs to
        # the prompt.
        start = len(before) if text.startswith(before) else len(prompt)
        return start, len(text) - len(after) + len(closing)

    def _closing(self, after: str) -> str:
        """The closing token and the space before it, out of the text after a turn's content; "" if
        there is none.
        """
        bare = after.lstrip()
        space = after[: len(after) - len(bare)]
        for token in self._added_tokens:
            if bare.startswith(token):
                return space + token
        return after.split("\n")[0].rstrip()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _tokenise(self, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
        """Ids of text[:cuts[-1]] and the token position of each cut.

        The ids are those of the whole text wherever a token ends at the cut. Where a token would
        cross it (a newline of the prompt and one of the response are one token), the text is
        tokenised in two parts: at generation time the prompt is tokenised alone, too.
        """
        done: list[int] = []
        part: list[int] = []
        part_start, last_cut, positions = 0, 0, []
        for cut in cuts:
            longer = self._ids(text[part_start:cut])
            if longer[: len(part)] == part:
                part = longer
            else:
                done += part
                part_start, part = last_cut, self._ids(text[last_cut:cut])
            positions.append(len(done) + len(part))
            last_cut = cut
        return done + part, positions


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
            tokenizer.chat_template = Path(template_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--chat_template {template_file}: {error}") from None
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
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: must hold an object, is a {type(content).__name__}")
        for place in places:
            section = content
            for key in place:
                section = section.get(key) or {}
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
            f"{path}: eos_token_id is {value!r}; expected a token id or a list of them"
        )
    return sorted(set(ids))
