"""What a chat template itself writes between the contents of a conversation, found once for all
conversations of the same roles.

Most templates write contents as they are. Where the template's own texts and the contents make up
the text of a conversation, to the character, the spans of its assistant turns are known without
further renderings.
"""

import re
from typing import Any, NamedTuple

from megatron_gkd.data.chat_template import ChatTemplate
from megatron_gkd.data.conversation import Messages, RenderOptions
from megatron_gkd.data.turn_span import MARKER, Rendered, TurnSpan
from megatron_gkd.errors import RowError

MOST_FORMS = 1000  # kept in memory; a form is a sequence of roles


class _Form(NamedTuple):
    """The template's own texts in conversations of some sequence of roles."""

    around: list[str]
    """Before, between and behind the contents of all turns"""
    responses: list[int]
    """Indices of the contents that are assistant turns'"""
    closings: list[str]
    """Of each of those"""


class TemplateTexts:
    """Those of a template, as they are found."""

    def __init__(self, template: ChatTemplate):
        self._template = template
        self._forms: dict[Any, _Form | None] = {}

    def locate(
        self, messages: Messages, options: RenderOptions, options_key: str, whole: str, prompt: str
    ) -> Rendered | None:
        """The turns, if `whole` is the contents of all turns between the texts of their form, and
        `prompt` its beginning.
        """
        contents = _contents(messages)
        if contents is None:
            return None
        key = (options_key, *((turn["role"], _kinds(turn["content"])) for turn in messages))
        if key not in self._forms:
            if len(self._forms) >= MOST_FORMS:
                self._forms.clear()
            self._forms[key] = self._form(messages, options)
        form = self._forms[key]
        if form is None:
            return None
        texts, starts, size = [form.around[0]], [], len(form.around[0])
        for content, text in zip(contents, form.around[1:]):
            starts.append(size)
            texts += content, text
            size += len(content) + len(text)
        if "".join(texts) != whole:
            return None
        turns = [
            TurnSpan(starts[slot], starts[slot] + len(contents[slot]) + len(closing))
            for slot, closing in zip(form.responses, form.closings)
        ]
        if len(prompt) > turns[-1].start or not whole.startswith(prompt):
            return None
        return Rendered(whole[: turns[-1].end], turns)

    def _form(self, messages: Messages, options: RenderOptions) -> _Form | None:
        """From a conversation of markers; None if the template does not write each once and in
        order, or does not begin assistant turns with its generation prompt and close them.
        """
        marked, number = [], 0
        responses, places = [], []
        for index, turn in enumerate(messages):
            if turn["role"] == "assistant":
                responses.append(number)
                places.append(index)
            content, number = _mark(turn["content"], number)
            marked.append({**turn, "content": content})
        try:
            whole = self._template.render(marked, options)
            around = re.split(f"{MARKER}[0-9]+;", whole)
            if whole != "".join(
                part for at, text in enumerate(around) for part in (text, _marker(at))
            ).removesuffix(_marker(number)):
                return None
            closings = [self._template.closing(around[slot + 1]) for slot in responses]
            for slot, index in zip(responses, places):
                before = whole[: whole.index(_marker(slot))]
                prompt = self._template.render(marked[:index], options, add_generation_prompt=True)
                if not before.startswith(prompt):
                    return None
        except RowError:
            return None
        return _Form(around, responses, closings) if all(closings) else None


def _kinds(content: Any) -> tuple[str, ...] | None:
    """The types of a content's parts; None for a string."""
    return None if isinstance(content, str) else tuple(part["type"] for part in content)


def _contents(messages: Messages) -> list[str] | None:
    """The strings of all turns in order, a text part each; None if turns hold more than a role and
    a content.
    """
    found: list[str] = []
    for turn in messages:
        if len(turn) > 2:
            return None
        content = turn["content"]
        if isinstance(content, str):
            found.append(content)
        else:
            found += (part["text"] for part in content if part["type"] == "text")
    return found


def _marker(number: int) -> str:
    return f"{MARKER}{number};"


def _mark(content: Any, number: int) -> tuple[Any, int]:
    """(the content with markers for its strings, numbered from `number`; the next number)."""
    if isinstance(content, str):
        return _marker(number), number + 1
    parts = []
    for part in content:
        if part["type"] == "text":
            part, number = {**part, "text": _marker(number)}, number + 1
        parts.append(part)
    return parts, number
