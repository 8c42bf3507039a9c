"""From `--dataset` to samples: open, check and tokenise every row (in processes), list bad rows,
split off evaluation.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow

from megatron_gkd.data.chat import VOCABULARY_FILES, ChatTokenizer, load_chat_tokenizer
from megatron_gkd.data.conversation import RenderOptions
from megatron_gkd.data.encoded import Encoded, decode_sample, encode_row
from megatron_gkd.data.forms import with_columns_renamed
from megatron_gkd.data.prepared_rows import PreparedRows, basis, default_folder
from megatron_gkd.data.render_options import RowDefaults, check_variables
from megatron_gkd.data.report import make_report, view_lengths
from megatron_gkd.data.rows import check_row
from megatron_gkd.data.sample import Sample
from megatron_gkd.data.shared_folder import alone, made_once
from megatron_gkd.data.source import Source, open_source
from megatron_gkd.data.split import separate, split, with_response
from megatron_gkd.data.stored_rows import StoredRows, write_rows
from megatron_gkd.data.teacher_template import TeacherTemplate, TeacherViews
from megatron_gkd.data_settings import DataConfig
from megatron_gkd.errors import BadRow, DataError, RowError, bad_rows_error
from megatron_gkd.media.medium import PromptReferences
from megatron_gkd.media.processor import MediaProcessor

_IDS = pyarrow.list_(pyarrow.int32())
_REFERENCE = pyarrow.struct(
    {
        "kind": pyarrow.string(),
        "path": pyarrow.string(),
        "data": pyarrow.large_binary(),
        "is_track": pyarrow.bool_(),
        "num_tokens": pyarrow.int32(),
    }
)
_SCHEMA = pyarrow.schema(
    {
        "input_ids": _IDS,
        "labels": _IDS,
        "response_start": pyarrow.int32(),
        "teacher_prompt": _IDS,  # null: no teacher view
        "cut_tokens": pyarrow.int32(),
        "media": pyarrow.list_(_REFERENCE),
        "kinds": pyarrow.list_(pyarrow.string()),  # those of `media`, without its bytes
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
_EMPTY = Encoded([], [], 0, None, 0, [], [], [], False)  # stands for a bad row


class SampleDataset:
    """Tokenised rows; `dataset[i]` is a Sample. `pad_token_id` is the id to pad with, `report` the
    counts. The rows are memory-mapped from a file that is already deleted: forked processes share
    them, but a SampleDataset cannot be pickled.

    skip_bad_rows: whether a loader leaves out a row whose media cannot be read, or raises. views:
    with --teacher_template.
    """

    def __init__(
        self,
        rows: StoredRows,
        pad_token_id: int,
        processor: MediaProcessor,
        skipped: list[BadRow] | None = None,
        skip_bad_rows: bool = False,
        views: TeacherViews | None = None,
    ):
        self._rows = rows
        self._processor = processor
        self.pad_token_id = pad_token_id
        self.skip_bad_rows = skip_bad_rows
        self.lengths = view_lengths(rows)
        self._views = views
        made = views is not None
        self.report = make_report(rows, self.lengths, skipped or [], views_are_made=made)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Reads the row's media. Raises DataError with the row's file and line if one cannot be
        read.
        """
        row = self._rows[index]
        try:
            return decode_sample(encoded_columns(row), row["source"], index, self._processor)
        except RowError as error:
            raise DataError(f"{row['location']}: {error}") from error

    def media_references(self, index: int, view: Literal["student", "teacher"]) -> PromptReferences:
        """The media that a view of row `index` shows, as the row gave them: nothing is read."""
        encoded = encoded_columns(self._rows[index])
        references = encoded.references()
        indices = encoded.student_media if view == "student" else encoded.teacher_media
        return PromptReferences(
            [references[number] for number in indices], encoded.use_audio_in_video
        )

    @cached_property
    def digest(self) -> str:
        """Stands for the rows and their order, whatever files they come from."""
        found = hashlib.blake2b(digest_size=16)
        table = self._rows.columns("digest", "template_row")
        for digest, row in zip(*(table[name].to_pylist() for name in table.column_names)):
            found.update(digest + (row or "").encode())
        return found.hexdigest()

    def with_written_view(self, sample: Sample) -> Sample:
        """With --teacher_template: `sample`, to which the student wrote a response, with the
        teacher's view that this response makes; without: the sample. Where none can be made the
        teacher reads what the student reads, and `view_problem` says why.
        """
        if self._views is None:
            return sample
        row = self._rows[sample.row]
        encoded, processor = encoded_columns(row), self._processor
        found = self._views.of_written(sample, row["template_row"], encoded, processor)
        if found.view_problem:
            return replace(found, view_problem=f"{row['location']}: {found.view_problem}")
        return found

    def location(self, index: int) -> str:
        """Where row `index` came from: FILE:LINE, or NAME row N."""
        return self._rows[index]["location"]


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
            chat.check_renders([], RenderOptions(None, variables))
    except RowError as error:
        raise DataError(str(error)) from None
    return RowEncoding(
        chat,
        chat_problem,
        data.max_length,
        vocab_size,
        MediaProcessor(model_dir, data.media_cache),
        data.check_data,
        defaults,
        json.loads(data.columns or "{}"),
        TeacherTemplate(data.teacher_template) if data.teacher_template else None,
    )


def _text_or_file(value: str | None, flag: str) -> str | None:
    """The text, or that of the .txt file that the value names."""
    if value is None or not value.endswith(".txt") or "\n" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--{flag} {value}: {error}") from None


def encode_source_row(source: Source, encoding: RowEncoding, index: int) -> dict[str, Any]:
    """Row `index` of a source -> columns of `_SCHEMA`."""
    location, name, reason, encoded = source.locations[index], None, None, _EMPTY
    template_row = None

    def get_chat() -> ChatTokenizer:
        if encoding.chat is None:
            raise DataError(f"{location} is text: {encoding.chat_problem}")
        return encoding.chat

    try:
        raw, template = (
            with_columns_renamed(source.read(index), encoding.columns),
            encoding.template,
        )
        own = template.without_view(raw) if template else raw
        checked = check_row(own, encoding.vocab_size, source.folder, encoding.defaults)
        if template:
            checked, template_row = template.with_view(checked, raw)
        encoded = encode_row(
            checked,
            get_chat,
            encoding.max_length,
            encoding.vocab_size,
            encoding.processor,
            read_media=encoding.read_media,
        )
        name = source.name if checked.source is None else checked.source
    except RowError as error:
        # the message may quote lone surrogates
        reason = str(error).encode("utf-8", "backslashreplace").decode("utf-8")
    kinds = [reference["kind"] for reference in encoded.media]
    columns = {"kinds": kinds, "source": name, "location": location, "reason": reason}
    more = {"template_row": template_row, "digest": encoded.digest()}
    return encoded._asdict() | columns | more


def load_datasets(
    data: DataConfig,
    model_dir: str,
    vocab_size: int,
    seed: int,
    gather: Callable[[Any], list] = alone,
    *,
    writes_responses: bool = True,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[SampleDataset, SampleDataset | None]:
    """Read, check and tokenise everything -> (training rows, evaluation rows or None). A pure
    function of the files and the other arguments.

    Evaluation is `val_dataset`, or a seeded share of `split_dataset_ratio` of the training rows (at
    least one). gather: one value per rank -> the list of all, if several ranks call this: of those
    that see the same folder of temporary files (TMPDIR) one does the work, and all map its result.
    writes_responses: whether training may write responses; if not, its rows must have them. log:
    takes a line on rows that were prepared earlier, or are kept for the next start.

    Raises DataError that lists bad rows with file, line and reason (unless `skip_bad_rows`), or
    says what cannot be opened. Collectives: two calls of `gather`.
    """
    if data.val_dataset and data.split_dataset_ratio:
        raise DataError(
            f"--val_dataset is given and --split_dataset_ratio is {data.split_dataset_ratio}: "
            "evaluation comes from one of them, leave out the other"
        )
    if not data.dataset:
        raise DataError("--dataset is empty: name at least one file or data set")
    encoding = row_encoding(data, model_dir, vocab_size)
    chat, processor = encoding.chat, encoding.processor

    def make(folder: str) -> dict[str, Any]:
        """For each entry of `dataset`, then of `val_dataset`, the files with its rows; and lines
        for the screen.
        """
        kept = _kept(data, encoding, model_dir)
        files = [
            _prepare(entry, os.path.join(folder, str(number)), encoding, data, seed, kept)
            for number, entry in enumerate([*data.dataset, *data.val_dataset])
        ]
        return {"files": files, "notes": kept.notes if kept else []}

    def read(made: dict[str, Any]) -> tuple[list[StoredRows], list[str]]:
        return [StoredRows.open(_SCHEMA, files) for files in made["files"]], made["notes"]

    parts, notes = made_once(make, read, gather)
    for note in notes:
        log(note)
    train_rows, train_bad = separate(parts[: len(data.dataset)])
    if not writes_responses:
        train_rows, without = with_response(train_rows)
        train_bad += without
    eval_rows, eval_bad = separate(parts[len(data.dataset) :]) if data.val_dataset else (None, [])
    if (train_bad or eval_bad) and not data.skip_bad_rows:
        num_rows = len(train_rows) + len(train_bad) + len(eval_rows or []) + len(eval_bad)
        raise bad_rows_error(train_bad + eval_bad, num_rows)
    for flag, rows, bad in (
        ("--dataset", train_rows, train_bad),
        ("--val_dataset", eval_rows, eval_bad),
    ):
        if rows is not None and not len(rows):
            raise DataError(
                f"{flag}: all {len(bad)} rows are bad, the first is {bad[0].location}: "
                f"{bad[0].reason}"
            )
    if data.split_dataset_ratio:
        train_rows, eval_rows = split(train_rows, data.split_dataset_ratio, seed)
    pad_token_id = chat.pad_token_id if chat is not None else 0
    views = None
    if encoding.template and chat:
        views = TeacherViews(encoding.template, chat, data.max_length, vocab_size)

    def dataset(rows: StoredRows, bad: list[BadRow]) -> SampleDataset:
        return SampleDataset(rows, pad_token_id, processor, bad, data.skip_bad_rows, views)

    train = dataset(train_rows, train_bad)
    return train, None if eval_rows is None else dataset(eval_rows, eval_bad)


def _kept(data: DataConfig, encoding: RowEncoding, model_dir: str) -> PreparedRows | None:
    """The folder of prepared rows. None with --check_data, which is to read everything."""
    if data.prepared_rows == "none" or data.check_data:
        return None
    # these three are what the model folder, the settings and their files make them
    values = encoding._asdict() | dict.fromkeys(("chat", "processor", "template"))
    return PreparedRows(
        data.prepared_rows or default_folder(),
        int(data.prepared_rows_gib * 2**30),
        _SCHEMA,
        basis(data, values, model_dir),
    )


def _prepare(
    entry: str,
    path: str,
    encoding: RowEncoding,
    data: DataConfig,
    seed: int,
    kept: PreparedRows | None,
) -> list[str]:
    """The files, named after `path`, with the rows of an entry of --dataset."""

    @cache
    def open_entry() -> Source:
        return open_source(entry, seed, data.download_datasets)

    def reason_of(index: int) -> str | None:
        return encode_source_row(open_entry(), encoding, index)["reason"]

    def prepare() -> list[str]:
        source = open_entry()
        return write_rows(
            partial(encode_source_row, source, encoding),
            len(source.locations),
            _SCHEMA,
            path,
            data.dataset_num_proc,
            f"Rows of {source.name}",
        )

    if kept is None:
        return prepare()
    return kept.files(
        entry, path, seed=seed, open_entry=open_entry, reason_of=reason_of, prepare=prepare
    )


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
