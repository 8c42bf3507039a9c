"""The characters of a conversation's text that an assistant turn is."""

from typing import Literal, NamedTuple

MARKER = "\ue000response\ue001"
"""Stands for a content where the text around it is wanted"""

Change = Literal["", "trimmed", "shortened"]


class TurnSpan(NamedTuple):
    """[start, end), in characters or in tokens: an assistant turn's content and its close."""

    start: int
    end: int
    change: Change = ""
    """trimmed: the template left out white space; shortened: it left out more, and the span is not
    what the model writes
    """


class Rendered(NamedTuple):
    """A conversation up to the end of its last turn."""

    text: str
    turns: list[TurnSpan]
