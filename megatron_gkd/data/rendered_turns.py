"""A conversation as its template writes it -> which characters each assistant turn is.

A turn's span is its content and what closes it (`<|im_end|>` in ChatML). Templates are programs, so
spans come from what a template does and not from what it is supposed to look like: a turn is
rendered as a prompt (`add_generation_prompt`) and once more with a marker instead of its content.
Both must agree with the text of the whole conversation, which is what the model sees; a template
that does not keep to this is refused with the reason.

Templates also leave parts of a response out: reasoning where no user turn of text stands before it
(a user turn with media), or in all turns but the last. The last response is what the model writes
after the generation prompt, so all of it is trained there, in the form that the template gives it
after turns of text. An earlier turn that lacks a part is what the model reads later on and never
what it writes: it is not trained.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from megatron_gkd.data.chat_template import ChatTemplate, Conversation
from megatron_gkd.data.conversation import Messages, RenderOptions
from megatron_gkd.data.template_texts import TemplateTexts
from megatron_gkd.data.turn_span import MARKER, Change, Rendered, TurnSpan
from megatron_gkd.errors import RowError, short_repr


class _Around(NamedTuple):
    """The text of a whole conversation around an assistant turn's content."""

    before: str
    after: str
    closing: str
    """The start of `after` that closes the turn"""


class RenderedTurns:
    """Locates assistant turns in what a template writes."""

    def __init__(self, template: ChatTemplate):
        self._template = template
        self._name = f"the chat template of {template.folder}"
        self._texts = TemplateTexts(template)

    def locate(self, conversations: Sequence[Conversation]) -> list[Rendered | RowError]:
        """The text of each conversation and its assistant turns; a RowError where the template
        refuses it, or does not render it turn by turn. The text of one that ends with another turn
        than the assistant's is that with the generation prompt, and its turns are not located.
        """
        found: dict[int, Rendered | RowError] = {}
        groups: dict[tuple[str, bool], list[int]] = {}
        for index, (messages, options, _) in enumerate(conversations):
            try:
                self._template.check_renders(messages, options)
            except RowError as error:
                found[index] = error
                continue
            ends_with_response = messages[-1]["role"] == "assistant"
            groups.setdefault((_options_key(options), ends_with_response), []).append(index)
        for (options_key, end_with_response), group in groups.items():
            options = conversations[group[0]].options
            of_group = [conversations[index].messages for index in group]
            locate = self._locate_all if end_with_response else self._requests
            found |= zip(group, locate(of_group, options, options_key))
        return [found[index] for index in range(len(conversations))]

    def _requests(
        self, conversations: list[Messages], options: RenderOptions, options_key: str
    ) -> list[Rendered | RowError]:
        try:
            texts = self._template.render_all(conversations, options, True)
        except RowError as error:
            if len(conversations) == 1:
                return [error]
            return [self._requests([each], options, options_key)[0] for each in conversations]
        return [Rendered(text, []) for text in texts]

    def _locate_all(
        self, conversations: list[Messages], options: RenderOptions, options_key: str
    ) -> list[Rendered | RowError]:
        try:
            wholes = self._template.render_all(conversations, options, False)
            prompts = self._template.render_all(
                [each[:-1] for each in conversations], options, True
            )
        except RowError as error:
            if len(conversations) == 1:
                return [error]
            return [self._locate_all([each], options, options_key)[0] for each in conversations]
        found: list[Rendered | RowError] = []
        for messages, whole, prompt in zip(conversations, wholes, prompts):
            try:
                found.append(self._located(messages, options, options_key, whole, prompt))
            except RowError as error:
                found.append(error)
        return found

    def _located(
        self, messages: Messages, options: RenderOptions, options_key: str, whole: str, prompt: str
    ) -> Rendered:
        """whole: the text of the conversation; prompt: that of all turns but the last, with the
        generation prompt.
        """
        given = self._texts.locate(messages, options, options_key, whole, prompt)
        if given is None:
            given = self._one_by_one(messages, options, whole, prompt)
        if given.turns[-1].change != "shortened":
            after = given.text[len(prompt) :]
            if prompt.rstrip().endswith("</think>") and after.lstrip().startswith("<think>"):
                raise self._two_blocks()
            return given
        found = self._after_text(messages, options, options_key, prompt)
        text, response = found or self._own_text(messages, options, prompt)
        turns = [
            turn if text.startswith(given.text[: turn.end]) else TurnSpan(0, 0, "shortened")
            for turn in given.turns[:-1]
        ]
        return Rendered(text, [*turns, response])

    def _after_text(
        self, messages: Messages, options: RenderOptions, options_key: str, prompt: str
    ) -> tuple[str, TurnSpan] | None:
        """(text, last turn) of a conversation with media: `prompt`, and behind it the response as
        the template writes it where all turns are text. None if they are, or if the template
        refuses text.
        """
        if all(isinstance(turn["content"], str) for turn in messages):
            return None
        as_text = [_without_media(turn) for turn in messages]
        try:
            whole = self._template.render(as_text, options)
            before = self._template.render(as_text[:-1], options, add_generation_prompt=True)
            located = self._located(as_text, options, options_key, whole, before)
        except RowError:
            return None
        start, end, change = located.turns[-1]
        shift = len(prompt) - len(before)
        return prompt + located.text[len(before) :], TurnSpan(start + shift, end + shift, change)

    def _one_by_one(
        self, messages: Messages, options: RenderOptions, whole: str, prompt: str
    ) -> Rendered:
        """The turns of any template, from renderings of this conversation."""
        turns = []
        for index, turn in enumerate(messages[:-1]):
            if turn["role"] == "assistant":
                before = self._template.render(
                    messages[:index], options, add_generation_prompt=True
                )
                turns.append(self._turn(messages, index, options, whole, before))
        turns.append(self._turn(messages, len(messages) - 1, options, whole, prompt))
        return Rendered(whole[: turns[-1].end], turns)

    def _own_text(
        self, messages: Messages, options: RenderOptions, prompt: str
    ) -> tuple[str, TurnSpan]:
        """(text, last turn) of a conversation whose last response the template does not write in
        full: the row's own text behind `prompt`.
        """
        content, opened = messages[-1]["content"], _thinking_block(prompt)
        if "</think>" in opened:
            if "think>" in content or messages[-1].get("reasoning_content"):
                raise self._two_blocks()
            opened = ""
        if set(messages[-1]) != {"role", "content"} or (opened and "</think>" not in content):
            raise RowError(
                f"{self._name} leaves out a part of the response, or does "
                f"not begin it with its own generation prompt {short_repr(prompt[-30:])}"
            )
        if opened and content.lstrip().startswith("<think>"):
            content = content.lstrip().removeprefix("<think>")
            content = content.removeprefix(opened.removeprefix("<think>"))
        closing = self._around(messages, len(messages) - 1, options).closing
        text = prompt + content + closing
        return text, TurnSpan(len(prompt), len(text))

    def _two_blocks(self) -> RowError:
        return RowError(
            f"{self._name} closes an empty block of thinking before the response, which has "
            "reasoning: leave out one of them (`enable_thinking: false`, or the reasoning)"
        )

    def _turn(
        self, messages: Messages, index: int, options: RenderOptions, whole: str, prompt: str
    ) -> TurnSpan:
        """Turn `index` of the conversation `whole`. prompt: the turns before, with the generation
        prompt.
        """
        before, after, closing = self._around(messages, index, options)
        header = prompt.removesuffix(_thinking_block(prompt))
        if not (whole.startswith(header) and before.startswith(header)):
            if index < len(messages) - 1:  # later turns have changed what stands before it
                return TurnSpan(0, 0, "shortened")
            raise RowError(
                f"{self._name} does not begin assistant turn {index} with "
                f"its own generation prompt {short_repr(prompt[-30:])}: prompt and response cannot "
                "be told apart"
            )
        if not closing:
            raise RowError(
                f"{self._name} does not close assistant turns: the model could not learn to stop"
            )
        if not whole.endswith(after):
            raise RowError(
                f"{self._name} renders what follows assistant turn {index} depending on its content"
            )
        content_end = len(whole) - len(after)
        change = _change(messages[index], whole[len(header) : content_end])
        if not whole.startswith(prompt):
            change = "shortened"
        # What the template itself writes before the content (an empty thinking block) belongs to
        # the prompt.
        start = len(before) if whole.startswith(before) else len(prompt)
        if start < len(prompt) and change != "shortened":
            start = len(prompt)
        return TurnSpan(start, content_end + len(closing), change)

    def _around(self, messages: Messages, index: int, options: RenderOptions) -> _Around:
        marked = list(messages)
        marked[index] = {"role": "assistant", "content": MARKER}
        around = self._template.render(marked, options).split(MARKER)
        if len(around) != 2:
            raise RowError(
                f"{self._name} renders an assistant turn's content "
                f"{len(around) - 1} times, not once"
            )
        before, after = around
        return _Around(before, after, self._template.closing(after))


def _options_key(options: RenderOptions) -> str:
    if not options.tools and not options.variables:
        return ""
    return json.dumps([options.tools, dict(options.variables)], sort_keys=True)


def _without_media(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn whose content is a string: its text parts, or a word if there are none."""
    if isinstance(turn["content"], str):
        return turn
    texts = [part["text"] for part in turn["content"] if part["type"] == "text"]
    return {**turn, "content": "".join(texts) or "media"}


def _thinking_block(prompt: str) -> str:
    """`<think>`, or an empty block of thinking, and the white space behind it, if the generation
    prompt ends with them; else ""
    """
    found = re.search(r"<think>\s*(</think>\s*)?\Z", prompt)
    return found.group() if found else ""


def _change(turn: dict[str, Any], rendered: str) -> Change:
    """What a template did to a turn's reasoning and content. The tags of reasoning may be others in
    `rendered`; what stands between them counts.
    """
    pieces = [turn.get("reasoning_content", ""), *re.split("</?think>", turn["content"])]
    if _in_order(pieces, rendered):
        return ""
    squeezed = ["".join(piece.split()) for piece in pieces]
    return "trimmed" if _in_order(squeezed, "".join(rendered.split())) else "shortened"


def _in_order(pieces: Iterable[str], text: str) -> bool:
    """Whether all pieces stand in `text`, one behind the other."""
    at = 0
    for piece in pieces:
        found = text.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return True
