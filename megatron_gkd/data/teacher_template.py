"""--teacher_template: the teacher's last user turn, made of a row's columns and of the response
that is scored, by a Jinja template.

At preparation the response is the row's own; after a rollout of the student the turn is made anew
of what it wrote. The template runs in Jinja's sandbox and gives the same text on every rank: it has
nothing random, and prints values alone, no objects with an address.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import StrictUndefined, TemplateError, Undefined, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_gkd.data.chat import ChatTokenizer
from megatron_gkd.data.chat_template import Conversation
from megatron_gkd.data.conversation import InlineMedia, Messages, RenderOptions, check_content
from megatron_gkd.data.encoded import Encoded, written_teacher_view
from megatron_gkd.data.rows import TEACHER_COLUMNS, Row
from megatron_gkd.data.sample import Sample
from megatron_gkd.errors import DataError, RowError, first_line, type_name
from megatron_gkd.media.medium import KINDS
from megatron_gkd.media.processor import MediaProcessor

GIVEN = ("response", "prompt")  # beside the row's columns, of which they win


class TemplateRow(NamedTuple):
    """What of a row its teacher's views are made of; stored as JSON."""

    messages: Messages
    """Of which the last user turn is replaced"""
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]
    """These two: the teacher's `RenderOptions`"""
    columns: dict[str, Any]
    """Those that the template names"""
    kinds: list[str]
    """Of the media in the teacher's view"""

    @property
    def options(self) -> RenderOptions:
        return RenderOptions(self.tools, self.variables)

    def to_json(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> "TemplateRow":
        return cls(**json.loads(text))


class TeacherTemplate:
    """The file, compiled. Raises DataError where it cannot be read or is no template."""

    def __init__(self, path: str):
        self.flag = f"--teacher_template {path}"
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
        )
        del environment.filters["random"], environment.globals["lipsum"]
        try:
            text = Path(path).read_text(encoding="utf-8")
            named = meta.find_undeclared_variables(environment.parse(text))
            self._template = environment.from_string(text)
        except TemplateError as error:
            line = f", line {error.lineno}" if hasattr(error, "lineno") else ""
            raise DataError(f"{self.flag}{line}: {first_line(error)}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.flag}: {first_line(error)}") from error
        self.reads_response = "response" in named
        self.columns = sorted(named - {*GIVEN, *environment.globals})

    def without_view(self, raw: Any) -> Any:
        """The raw row without the columns of a teacher's view that the template reads. Raises
        RowError for one that it does not read: two views.
        """
        if not isinstance(raw, dict):
            return raw
        for column in TEACHER_COLUMNS:
            if raw.get(column) is not None and column not in self.columns:
                raise RowError(
                    f"has {column}, and {self.flag} makes the teacher's view: leave the column "
                    "out, or name it in the template"
                )
        return {name: value for name, value in raw.items() if name not in TEACHER_COLUMNS}

    def row(self, checked: Row, raw: dict[str, Any]) -> TemplateRow:
        """What the views of a checked row are made of. Raises RowError for a row without a user
        turn.
        """
        turns = checked.teacher_messages or checked.messages
        if turns is None or not any(turn["role"] == "user" for turn in turns):
            raise RowError(f"{self.flag} replaces the last user turn, and the row has none")
        media = checked.media if checked.teacher_media is None else checked.teacher_media
        options = checked.teacher_options
        return TemplateRow(
            turns,
            options.tools,
            dict(options.variables),
            {name: _plain(raw[name], name) for name in self.columns if raw.get(name) is not None},
            [kind for kind in KINDS if media[kind]],
        )

    def with_view(self, checked: Row, raw: dict[str, Any]) -> tuple[Row, str]:
        """(a checked row with the view that its own response makes, what is stored of it to make
        others). Raises RowError.
        """
        row = self.row(checked, raw)
        last = row.messages[-1]
        response = last["content"] if last["role"] == "assistant" else ""
        view = self.view(row, response)
        if view is not row.messages:
            checked = replace(checked, teacher_messages=view)
        return checked, row.to_json()

    def view(self, row: TemplateRow, response: str) -> Messages:
        """The teacher's turns for a response; `row.messages` where the template gives no text.
        Media of the replaced turn that the teacher has stay, in front of the text, but for kinds
        whose tag is in the text. Raises RowError, with the names of the row's values, where the
        template fails.
        """
        index = max(i for i, turn in enumerate(row.messages) if turn["role"] == "user")
        content = row.messages[index]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        prompt = "".join(part["text"] for part in parts if part["type"] == "text")
        values = row.columns | dict(response=response, prompt=prompt)
        try:
            text = self._template.render(values).strip()
        except Exception as error:  # a template is a program and may raise any error
            missing = ", ".join(name for name in self.columns if name not in values)
            raise RowError(
                f"{self.flag}: {first_line(error)}; the row has {', '.join(sorted(values))}"
                + (f" and not {missing}" if missing else "")
            ) from error
        if not text:
            return row.messages
        new = check_content(text, self.flag, InlineMedia(set(row.kinds)))
        kept = [part for part in parts if part["type"] in row.kinds]
        if kept:
            written = [{"type": "text", "text": new}] if isinstance(new, str) else new
            tagged = {part["type"] for part in written}
            new = [part for part in kept if part["type"] not in tagged] + written
        view = list(row.messages)
        view[index] = {**view[index], "content": new}
        return view


class TeacherViews:
    """What makes the teacher's view of a response that was written."""

    def __init__(
        self, template: TeacherTemplate, chat: ChatTokenizer, max_length: int, vocab_size: int
    ):
        self.template, self.chat = template, chat
        self.max_length, self.vocab_size = max_length, vocab_size
        self._closing_id = chat.closing_id()

    def of_written(
        self, sample: Sample, stored: str, encoded: Encoded, processor: MediaProcessor
    ) -> Sample:
        """`sample`, to which the student wrote a response, with the teacher's view that this makes.
        Where none can be made the teacher reads what the student reads, and `view_problem` says
        why. stored, encoded: of the row, the first a `TemplateRow`.
        """
        student = sample.student
        response = student.input_ids[student.response_start :]
        try:
            prompt = self._prompt(TemplateRow.from_json(stored), response)
            if prompt == student.input_ids[: student.response_start] and not sample.media:
                return replace(sample, teacher=student)
            view = written_teacher_view(prompt, encoded, sample, self.max_length, processor)
        except RowError as error:
            return replace(sample, teacher=student, view_problem=str(error))
        return replace(sample, teacher=view)

    def _prompt(self, row: TemplateRow, response: list[int]) -> list[int]:
        """The teacher's prompt, one placeholder token a medium."""
        if response[-1] == self._closing_id:
            response = response[:-1]
        text = self.chat.tokenizer.decode(response, skip_special_tokens=True)
        view = self.template.view(row, text)
        (found,) = self.chat.encode([Conversation(view, row.options, prompt_only=True)])
        if isinstance(found, RowError):
            raise found
        if max(found.ids, default=0) >= self.vocab_size:
            raise RowError(f"the teacher's prompt has id {max(found.ids)} of {self.vocab_size}")
        return found.ids


def _printable(value: Any) -> Any:
    """What `{{ value }}` prints. Raises TypeError for what has no text of its own."""
    if isinstance(value, (str, int, float, list, dict, tuple, Undefined)) or value is None:
        return value
    raise TypeError(f"{type_name(value)} cannot be printed (is a call without its brackets?)")


def _plain(value: Any, name: str) -> Any:
    """A column's value as JSON has it. Raises RowError for bytes and the like."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise RowError(f"--teacher_template reads `{name}`, which is no JSON: {error}") from error
