"""From `--dataset` to samples: open, check and tokenise every row (in processes), list bad rows,
split off evaluation.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

from megatron_gkd.data.encoded import decode_sample
from megatron_gkd.data.prepared_rows import PreparedRows, basis, default_folder
from megatron_gkd.data.report import longest_response, make_report, view_lengths
from megatron_gkd.data.row_encoding import (
    SCHEMA,
    RowEncoding,
    encode_source_rows,
    encoded_columns,
    row_encoding,
)
from megatron_gkd.data.sample import Sample
from megatron_gkd.data.shared_folder import alone, made_once
from megatron_gkd.data.source import Source, open_source
from megatron_gkd.data.split import separate, split, with_response
from megatron_gkd.data.stored_rows import StoredRows, write_rows
from megatron_gkd.data.teacher_template import TeacherViews
from megatron_gkd.data.text_files import close_files
from megatron_gkd.data_settings import DataConfig
from megatron_gkd.errors import BadRow, DataError, RowError, bad_rows_error
from megatron_gkd.media.medium import PromptReferences
from megatron_gkd.media.processor import MediaProcessor


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
        self._digests: dict[int, list[str]] = {}  # every checkpoint has them
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

    def digests(self, rows_of_block: int) -> list[str]:
        """Of each block of so many rows one that stands for them and their order, whatever files
        they come from.
        """
        if rows_of_block not in self._digests:
            self._digests[rows_of_block] = self._find_digests(rows_of_block)
        return self._digests[rows_of_block]

    def _find_digests(self, rows_of_block: int) -> list[str]:
        table = self._rows.columns("digest", "template_row")
        digests = table["digest"].to_pylist()
        of_template = table["template_row"].to_pylist()
        blocks = []
        for first in range(0, len(self), rows_of_block):
            block = slice(first, first + rows_of_block)
            found = hashlib.blake2b(digest_size=16)
            for digest, row in zip(digests[block], of_template[block]):
                found.update(digest + (row or "").encode())
            blocks.append(found.hexdigest())
        return blocks

    def longest_response(self) -> int:
        """Most trained tokens of any response, of several turns each for itself."""
        return longest_response(self._rows)

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


def load_datasets(
    data: DataConfig,
    model_dir: str,
    vocab_size: int,
    seed: int,
    rank: int = 0,
    world_max: Callable[[int], int] = alone,
    *,
    writes_responses: bool = True,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[SampleDataset, SampleDataset | None]:
    """Read, check and tokenise everything -> (training rows, evaluation rows or None). A pure
    function of the files and the other arguments.

    Evaluation is `val_dataset`, or a seeded share of `split_dataset_ratio` of the training rows (at
    least one). rank, world_max: if several ranks call this, the number of this one, and what gives
    the largest of their numbers: of those of a machine with the same folder for temporary files
    (TMPDIR) one does the work, and all map its result. writes_responses: whether training may write
    responses; if not, its rows must have them. log: takes a line on rows that were prepared
    earlier, or are kept for the next start.

    Raises DataError that lists bad rows with file, line and reason (unless `skip_bad_rows`), or
    says what cannot be opened. Collectives: two calls of `world_max`.
    """
    if data.val_dataset and data.split_dataset_ratio:
        raise DataError(
            f"--val_dataset is given and --split_dataset_ratio is {data.split_dataset_ratio}: "
            "evaluation comes from one of them, leave out the other"
        )
    if not data.dataset:
        raise DataError("--dataset is empty: name at least one file or data set")
    # no threads: --dataset_num_proc says how many cores the work may take, and tokenizers warns in
    # every process that is forked after it has used threads
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    encoding = row_encoding(data, model_dir, vocab_size)
    chat, processor = encoding.chat, encoding.processor

    def make(folder: str) -> dict[str, Any]:
        """For each entry of `dataset`, then of `val_dataset`, the files with its rows; and lines
        for the screen.
        """
        kept = _kept(data, encoding, model_dir)
        try:
            files = [
                _prepare(entry, os.path.join(folder, str(number)), encoding, data, seed, kept)
                for number, entry in enumerate([*data.dataset, *data.val_dataset])
            ]
        finally:
            close_files()
        return {"files": files, "notes": kept.notes if kept else []}

    def read(made: dict[str, Any]) -> tuple[list[StoredRows], list[str]]:
        return [StoredRows.open(SCHEMA, files) for files in made["files"]], made["notes"]

    parts, notes = made_once(make, read, rank, world_max)
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
    """The folder of prepared rows. None with --check_data, which is to read everything, and with a
    chat template that writes the date, which is another tomorrow.
    """
    chat = encoding.chat
    has_date = chat is not None and "strftime_now" in str(chat.tokenizer.chat_template)
    if data.prepared_rows == "none" or data.check_data or has_date:
        return None
    # these three are what the model folder, the settings and their files make them
    values = encoding._asdict() | dict.fromkeys(("chat", "processor", "template"))
    return PreparedRows(
        data.prepared_rows or default_folder(),
        int(data.prepared_rows_gib * 2**30),
        SCHEMA,
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
        return encode_source_rows(open_entry(), encoding, [index])[0]["reason"]

    def prepare() -> list[str]:
        source = open_entry()
        return write_rows(
            partial(encode_source_rows, source, encoding),
            len(source.locations),
            SCHEMA,
            path,
            data.dataset_num_proc,
            f"Rows of {source.name}",
        )

    if kept is None:
        return prepare()
    return kept.files(
        entry, path, seed=seed, open_entry=open_entry, reason_of=reason_of, prepare=prepare
    )
