"""Rows of a source -> the columns in which they are stored: what they are encoded with, as the
settings of the data say, and the schema.
"""

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow

from megatron_gkd.data.chat import VOCABULARY_FILES, ChatTokenizer, load_chat_tokenizer
from megatron_gkd.data.conversation import RenderOptions
from megatron_gkd.data.encoded import Encoded, encode_rows
from megatron_gkd.data.forms import with_columns_renamed
from megatron_gkd.data.render_options import RowDefaults, check_variables
from megatron_gkd.data.rows import COLUMNS, Row, check_row
from megatron_gkd.data.source import Source
from megatron_gkd.data.teacher_template import TeacherTemplate
from megatron_gkd.data.views import conversations_of
from megatron_gkd.data_settings import DataConfig
from megatron_gkd.errors import DataError, RowError
from megatron_gkd.media.processor import MediaProcessor

_IDS = pyarrow.list_(pyarrow.int32())
_REFERENCE = pyarrow.struct(
    {
        "kind": pyarrow.string(),
        "path": pyarrow.string(),
        "data": pyarrow.large_binary(),
        "is_track": pyarrow.bool_(),
        "num_tokens": pyarrow.int32(),
        "note": pyarrow.string(),
    }
)
SCHEMA = pyarrow.schema(
    {
        "input_ids": _IDS,
        "labels": _IDS,
        "response_start": pyarrow.int32(),
        "teacher_prompt": _IDS,  # null: no teacher view
        "teacher_labels": _IDS,  # null: nothing in teacher_prompt is trained
        "cut_tokens": pyarrow.int32(),
        "shortened_turns": pyarrow.int32(),
        "trimmed_turns": pyarrow.int32(),
        "tags_as_text": pyarrow.int32(),
        "media": pyarrow.list_(_REFERENCE),
        "kinds": pyarrow.list_(pyarrow.string()),  # those of `media`, without its bytes
        "notes": pyarrow.list_(pyarrow.string()),  # likewise
        "media_tokens": pyarrow.int32(),  # likewise, of all of them
        "student_media": _IDS,
        "teacher_media": _IDS,
        "use_audio_in_video": pyarrow.bool_(),
        "digest": pyarrow.binary(16),  # of all of the above
        "source": pyarrow.string(),
        "location": pyarrow.string(),
        "reason": pyarrow.string(),  # null: a good row
        "template_row": pyarrow.string(),  # null: no --teacher_template
    }
)
_EMPTY = Encoded([], [], 0, None, None, 0, 0, 0, 0, [], [], [], False)  # stands for a bad row


def encoded_columns(row: dict[str, Any]) -> Encoded:
    """The columns of a row that are its tokens and media."""
    return Encoded(*(row[name] for name in Encoded._fields))


class RowEncoding(NamedTuple):
    """What every row of every source is encoded with."""

    chat: ChatTokenizer | None
    chat_problem: str
    max_length: int
    vocab_size: int
    processor: MediaProcessor
    read_media: bool
    defaults: RowDefaults
    columns: dict[str, str]
    template: TeacherTemplate | None


def row_encoding(data: DataConfig, model_dir: str, vocab_size: int) -> RowEncoding:
    """The tokenizer, processor and defaults of these settings. Raises DataError for flags that
    cannot be used; a tokenizer that does not load is said by the first row of text.
    """
    chat, chat_problem = _try_tokenizer(model_dir, data.chat_template)
    try:
        defaults = RowDefaults(
            _text_or_file(data.system, "system"),
            _text_or_file(data.teacher_system, "teacher_system"),
            check_variables(data.chat_template_kwargs or "{}", "--chat_template_kwargs"),
            check_variables(
                data.teacher_chat_template_kwargs or "{}", "--teacher_chat_template_kwargs"
            ),
        )
        if chat is not None:
            variables = {**defaults.variables, **defaults.teacher_variables}
            chat.template.check_renders([], RenderOptions(None, variables))
    except RowError as error:
        raise DataError(str(error)) from None
    template = TeacherTemplate(data.teacher_template) if data.teacher_template else None
    columns = json.loads(data.columns or "{}")
    for old, new in columns.items():
        meant = difflib.get_close_matches(new, COLUMNS, n=1, cutoff=0.8)
        if meant and new not in (*COLUMNS, *(template.columns if template else ())):
            raise DataError(f"--columns names `{old}` `{new}`, which nothing reads: {meant[0]}?")
    return RowEncoding(
        chat,
        chat_problem,
        data.max_length,
        vocab_size,
        MediaProcessor(model_dir, data.media_cache, data.max_media_bytes),
        data.check_data,
        defaults,
        columns,
        template,
    )


def _text_or_file(value: str | None, flag: str) -> str | None:
    """The text, or that of the .txt file that the value names."""
    if value is None or not value.endswith(".txt") or "\n" in value:
        return value
    try:
        if os.path.exists(value) and not os.path.isfile(value):  # a pipe may never end, or begin
            raise DataError(
                f"--{flag} {value}: a folder, pipe, socket or device, where a file is read"
            )
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--{flag} {value}: {error}") from None


def encode_source_rows(
    source: Source, encoding: RowEncoding, indices: Sequence[int]
) -> list[dict[str, Any]]:
    """Rows of a source -> columns of `SCHEMA`. A row that cannot be used has a reason."""
    rows: list[Row | RowError] = []
    of_template: dict[int, str] = {}
    for index in indices:
        try:
            row, stored = _checked(source, encoding, index)
            rows.append(row)
            of_template |= {index: stored} if stored else {}
        except RowError as error:
            rows.append(error)
    good = [(index, row) for index, row in zip(indices, rows) if isinstance(row, Row)]

    def get_chat() -> ChatTokenizer:
        if encoding.chat is None:
            first = next(index for index, row in good if conversations_of(row))
            raise DataError(f"{source.locations[first]} is text: {encoding.chat_problem}")
        return encoding.chat

    encoded = iter(
        encode_rows(
            [row for _, row in good],
            get_chat,
            encoding.max_length,
            encoding.vocab_size,
            encoding.processor,
            read_media=encoding.read_media,
        )
    )
    return [
        _columns(source, index, row, row if isinstance(row, RowError) else next(encoded))
        | {"template_row": of_template.get(index)}
        for index, row in zip(indices, rows)
    ]


def _checked(source: Source, encoding: RowEncoding, index: int) -> tuple[Row, str | None]:
    """Row `index` of a source and, with --teacher_template, what later views are made of."""
    raw = with_columns_renamed(source.read(index), encoding.columns)
    template, vocab_size, folder = encoding.template, encoding.vocab_size, source.folder_of(index)
    if template is None:
        return check_row(raw, vocab_size, folder, encoding.defaults), None
    checked = check_row(template.without_view(raw), vocab_size, folder, encoding.defaults)
    return template.with_view(checked, raw)


def _columns(
    source: Source, index: int, row: Row | RowError, encoded: Encoded | RowError
) -> dict[str, Any]:
    """Of row `index`, a RowError of which becomes its reason."""
    name = reason = None
    if isinstance(encoded, RowError):
        # the message may quote lone surrogates
        reason = str(encoded).encode("utf-8", "backslashreplace").decode("utf-8")
        encoded = _EMPTY
    elif isinstance(row, Row):
        name = source.name if row.source is None else row.source
    kinds = [reference["kind"] for reference in encoded.media]
    location = source.locations[index]
    notes = [reference["note"] for reference in encoded.media]
    columns = {
        "kinds": kinds,
        "notes": notes,
        "media_tokens": sum(reference["num_tokens"] for reference in encoded.media),
        "source": name,
        "location": location,
        "reason": reason,
    }
    return encoded._asdict() | columns | {"digest": encoded.digest()}


def _try_tokenizer(model_dir: str, template_file: str | None) -> tuple[ChatTokenizer | None, str]:
    """The tokenizer or None, and the reason that there is none: rows of ids do not need it, the
    first row of text raises the reason.
    """
    try:
        chat = load_chat_tokenizer(model_dir, template_file)
    except DataError as error:
        return None, str(error)
    except Exception as error:  # the files are anyone's, and so are the errors
        return None, f"the tokenizer of {model_dir} does not load: {type(error).__name__}: {error}"
    names = ", ".join(VOCABULARY_FILES)
    return (
        chat,
        f"{model_dir} has no tokenizer files ({names}); add them, or give rows with input_ids and "
        "labels",
    )
