"""The whole way from `--dataset` to samples: open, check and tokenise every row (in processes),
list the bad ones, split off evaluation.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import datasets
from pyarrow import compute

from megatron_gkd.data.chat import VOCABULARY_FILES, ChatTokenizer, load_chat_tokenizer
from megatron_gkd.data.order import SPLIT, permutation
from megatron_gkd.data.rows import IGNORED_LABEL, check_row
from megatron_gkd.data.sample import Encoded, Sample, decode_sample, encode_row, media_pair
from megatron_gkd.data.shared_folder import alone, made_once
from megatron_gkd.data.source import FINGERPRINT, Source, open_source
from megatron_gkd.errors import BadRow, DataError, RowError, bad_rows_error
from megatron_gkd.media.medium import PromptReferences, Reference
from megatron_gkd.media.processor import MediaProcessor

_IDS = datasets.List(datasets.Value("int32"))
_REFERENCE = {
    "kind": datasets.Value("string"),
    "path": datasets.Value("string"),
    "data": datasets.Value("large_binary"),
    "is_track": datasets.Value("bool"),
    "num_tokens": datasets.Value("int32"),
}
_FEATURES = datasets.Features(
    {
        "input_ids": _IDS,
        "labels": _IDS,
        "response_start": datasets.Value("int32"),
        "teacher_prompt": _IDS,  # null: no teacher view
        "cut_tokens": datasets.Value("int32"),
        "media": datasets.List(_REFERENCE),
        "kinds": datasets.List(
            datasets.Value("string")
        ),  # of `media`, beside what may be gigabytes
        "student_media": _IDS,
        "teacher_media": _IDS,
        "use_audio_in_video": datasets.Value("bool"),
        "source": datasets.Value("string"),
        "location": datasets.Value("string"),
        "reason": datasets.Value("string"),  # null: a good row
    }
)
ROWS_AT_ONCE = 100  # in memory while they are written: a row may hold its media
_EMPTY = Encoded([], [], 0, None, 0, [], [], [], False)


class DataSettings(Protocol):
    """What `load_datasets` reads of the run's data settings."""

    dataset: list[str]
    val_dataset: list[str]
    split_dataset_ratio: float
    download_datasets: bool
    max_length: int
    dataset_num_proc: int
    skip_bad_rows: bool
    check_data: bool
    media_cache: str | None


@dataclass
class DataReport:
    """Counts of one data set, for the start of the run. Lengths and cuts are in tokens."""

    num_rows: int
    num_teacher_views: int
    num_cut_responses: int
    num_cut_tokens: int
    max_tokens: int
    num_response_tokens: int
    sources: dict[str, int]
    media: dict[str, int] = field(default_factory=dict)
    """Rows by what the two sides perceive: `audio > text` is a student that hears and a teacher
    that reads.
    """
    num_media: dict[str, int] = field(default_factory=dict)
    """Media of each kind, each counted once in a row"""
    skipped: list[BadRow] = field(default_factory=list)

    @property
    def has_teacher_view(self) -> bool:
        return self.num_teacher_views > 0

    @property
    def num_skipped(self) -> int:
        return len(self.skipped)

    def summary(self) -> str:
        """One line for the console."""
        kinds = ", ".join(
            f"{number} {kind}{'s' * (number > 1)}" for kind, number in self.num_media.items()
        )
        pairs = ", ".join(f"{pair}: {number}" for pair, number in self.media.items())
        media = f"{kinds} (rows by what student > teacher perceive: {pairs}); " if kinds else ""
        return (
            f"{self.num_rows} rows, {self.num_teacher_views} of them with a teacher view; {media}"
            f"{self.num_response_tokens} trained tokens; longest view {self.max_tokens} tokens; "
            f"{self.num_cut_responses} responses cut by {self.num_cut_tokens} tokens in all; "
            f"{self.num_skipped} bad rows skipped"
        )


class SampleDataset:
    """Tokenised rows; `dataset[i]` is a Sample. `pad_token_id` is what to pad with, `report` the
    counts. The rows are a mapped file that has no name any more: forks share it, it does not
    pickle.

    skip_bad_rows: what a loader does with a row whose media turn out to be unreadable when it is
    reached.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        pad_token_id: int,
        processor: MediaProcessor,
        skipped: list[BadRow] | None = None,
        skip_bad_rows: bool = False,
    ):
        self._rows = rows
        self._processor = processor
        self.pad_token_id = pad_token_id
        self.skip_bad_rows = skip_bad_rows
        self.report = _report(rows, skipped or [])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Reads the row's media. Raises DataError with the row's file and line where one cannot be
        read.
        """
        row = self._rows[index]
        encoded = Encoded(*(row[name] for name in Encoded._fields))
        try:
            return decode_sample(encoded, row["source"], index, self._processor)
        except RowError as error:
            raise DataError(f"{row['location']}: {error}") from error

    def media_references(
        self, index: int, view: Literal["student", "teacher"]
    ) -> PromptReferences:
        """The media that a view of row `index` shows, as the row gave them: nothing is decoded."""
        row = self._rows[index]
        media = [
            Reference(*(stored[name] for name in Reference._fields)) for stored in row["media"]
        ]
        shown = [media[number] for number in row[f"{view}_media"]]
        return PromptReferences(shown, row["use_audio_in_video"])

    def location(self, index: int) -> str:
        """Where row `index` came from: FILE:LINE, or NAME row N."""
        return self._rows[index]["location"]


def _report(rows: datasets.Dataset, skipped: list[BadRow]) -> DataReport:
    columns = ["cut_tokens", "input_ids", "labels", "teacher_prompt", "response_start", "source"]
    table = rows.select_columns(columns).with_format("arrow")[:]
    cuts = table["cut_tokens"].to_numpy()
    student = compute.list_value_length(table["input_ids"]).to_numpy()
    prompt = compute.list_value_length(table["teacher_prompt"])  # null without a teacher view
    teacher = student - table["response_start"].to_numpy() + prompt.fill_null(0).to_numpy()
    trained = compute.not_equal(compute.list_flatten(table["labels"]), IGNORED_LABEL)
    return DataReport(
        num_rows=len(rows),
        num_teacher_views=len(rows) - prompt.null_count,
        num_cut_responses=int((cuts > 0).sum()),
        num_cut_tokens=int(cuts.sum()),
        max_tokens=int(max(student.max(), teacher.max())),
        num_response_tokens=compute.sum(trained).as_py(),
        sources=dict(Counter(table["source"].to_pylist())),
        **_media_report(rows),
        skipped=skipped,
    )


def _media_report(rows: datasets.Dataset) -> dict[str, dict[str, int]]:
    """DataReport's `media` and `num_media`; both empty for a data set of text. The media themselves
    are not touched.
    """
    table = rows.select_columns(["kinds", "student_media", "teacher_media"]).with_format("arrow")[:]
    if not compute.sum(compute.list_value_length(table["kinds"])).as_py():
        return {}
    kinds = table["kinds"].to_pylist()
    seen = zip(kinds, table["student_media"].to_pylist(), table["teacher_media"].to_pylist())
    pairs = Counter(
        media_pair([of[i] for i in mine], [of[i] for i in others]) for of, mine, others in seen
    )
    return {"media": dict(pairs), "num_media": dict(Counter(kind for of in kinds for kind in of))}


class _Encoder:
    """Raw rows of one source -> columns of `_FEATURES`; runs in `--dataset_num_proc` processes."""

    def __init__(
        self,
        source: Source,
        chat: ChatTokenizer | None,
        chat_problem: str,
        max_length: int,
        vocab_size: int,
        processor: MediaProcessor,
        read_media: bool,
    ):
        self.source = source._replace(rows=None)  # the rows come with each call
        self.chat, self.chat_problem = chat, chat_problem
        self.max_length, self.vocab_size = max_length, vocab_size
        self.processor, self.read_media = processor, read_media

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        location, source, reason, encoded = self.source.locations[index], None, None, _EMPTY

        def get_chat() -> ChatTokenizer:
            if self.chat is None:
                raise DataError(f"{location} is text: {self.chat_problem}")
            return self.chat

        try:
            checked = check_row(self.source.parse(row), self.vocab_size, self.source.folder)
            encoded = encode_row(
                checked,
                get_chat,
                self.max_length,
                self.vocab_size,
                self.processor,
                read_media=self.read_media,
            )
            source = self.source.name if checked.source is None else checked.source
        except RowError as error:
            reason = (
                str(error).encode("utf-8", "backslashreplace").decode("utf-8")
            )  # it may quote lone surrogates
        kinds = [reference["kind"] for reference in encoded.media]
        return {
            **encoded._asdict(),
            "kinds": kinds,
            "source": source,
            "location": location,
            "reason": reason,
        }


def _encode(source: Source, num_proc: int, encoder: _Encoder, path: str) -> list[str]:
    """Every row through `encoder`, into arrow files called like `path`; their names. On a terminal
    rank 0 shows a bar.
    """
    shows = os.environ.get("RANK", "0") == "0" and sys.stderr.isatty()
    had_bars = not datasets.are_progress_bars_disabled()
    if had_bars and not shows:
        datasets.disable_progress_bars()
    try:
        encoded = source.rows.map(
            encoder,
            with_indices=True,
            remove_columns=source.rows.column_names,
            features=_FEATURES,
            num_proc=min(num_proc, len(source.rows)) if num_proc > 1 else None,
            keep_in_memory=False,
            load_from_cache_file=False,
            cache_file_name=path,
            writer_batch_size=ROWS_AT_ONCE,
            new_fingerprint=FINGERPRINT,
            desc=f"Rows of {source.name}",
        )
        return [file["filename"] for file in encoded.cache_files]
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def load_datasets(
    data: DataSettings,
    model_dir: str,
    vocab_size: int,
    seed: int,
    gather: Callable[[Any], list] = alone,
) -> tuple[SampleDataset, SampleDataset | None]:
    """Read, check and tokenise everything; (train, evaluation or None). A pure function of the
    files and the other arguments. gather: a value of each rank -> all of them, where several ranks
    call it: those that see the same folder of temporary files (TMPDIR) leave the work to one of
    them, and map its result.

    Evaluation is `val_dataset`, or a seeded `split_dataset_ratio` of the training rows (at least
    one). Raises DataError, before anything else has started, that lists bad rows with file, line
    and reason (unless `skip_bad_rows`), or says what cannot be opened. Collectives: two of
    `gather`.
    """
    if data.val_dataset and data.split_dataset_ratio:
        raise DataError(
            f"--val_dataset is given and --split_dataset_ratio is {data.split_dataset_ratio}: evaluation comes from "
            "one of them, leave out the other"
        )
    if not data.dataset:
        raise DataError("--dataset is empty: name at least one file or data set")
    chat, chat_problem = _try_tokenizer(model_dir)
    processor = MediaProcessor(model_dir, data.media_cache)

    def make(folder: str) -> list[list[str]]:
        """For each entry of `dataset`, then of `val_dataset`, the files with its rows."""
        sources = [
            open_source(entry, seed, data.download_datasets)
            for entry in [*data.dataset, *data.val_dataset]
        ]
        settings = (chat, chat_problem, data.max_length, vocab_size, processor, data.check_data)
        return [
            _encode(
                source,
                data.dataset_num_proc,
                _Encoder(source, *settings),
                os.path.join(folder, f"{number}.arrow"),
            )
            for number, source in enumerate(sources)
        ]

    def read(made: list[list[str]]) -> list[datasets.Dataset]:
        return [
            datasets.concatenate_datasets(list(map(datasets.Dataset.from_file, files)))
            for files in made
        ]

    parts = made_once(make, read, gather)
    train_rows, train_bad = _separate(parts[: len(data.dataset)])
    eval_rows, eval_bad = _separate(parts[len(data.dataset) :]) if data.val_dataset else (None, [])
    if (train_bad or eval_bad) and not data.skip_bad_rows:
        num_rows = len(train_rows) + len(train_bad) + len(eval_rows or []) + len(eval_bad)
        raise bad_rows_error(train_bad + eval_bad, num_rows)
    for flag, rows, bad in (
        ("--dataset", train_rows, train_bad),
        ("--val_dataset", eval_rows, eval_bad),
    ):
        if rows is not None and not len(rows):
            raise DataError(
                f"{flag}: all {len(bad)} rows are bad, the first is {bad[0].location}: {bad[0].reason}"
            )
    if data.split_dataset_ratio:
        train_rows, eval_rows = _split(train_rows, data.split_dataset_ratio, seed)
    pad_token_id = chat.pad_token_id if chat is not None else 0
    train = SampleDataset(train_rows, pad_token_id, processor, train_bad, data.skip_bad_rows)
    if eval_rows is None:
        return train, None
    return train, SampleDataset(eval_rows, pad_token_id, processor, eval_bad, data.skip_bad_rows)


def _try_tokenizer(model_dir: str) -> tuple[ChatTokenizer | None, str]:
    """The tokenizer, or None and why there is none: rows of ids do not need it, the first row of
    text raises the reason.
    """
    try:
        chat = load_chat_tokenizer(model_dir)
    except DataError as error:
        return None, str(error)
    except Exception as error:  # the files are anyone's, and so are the errors
        return None, f"the tokenizer of {model_dir} does not load: {type(error).__name__}: {error}"
    names = ", ".join(VOCABULARY_FILES)
    return (
        chat,
        f"{model_dir} has no tokenizer files ({names}); add them, or give rows with input_ids and labels",
    )


def _separate(parts: list[datasets.Dataset]) -> tuple[datasets.Dataset, list[BadRow]]:
    """Good rows in the order of files and lines, and the bad ones."""
    rows = datasets.concatenate_datasets(parts)
    reasons = rows["reason"]
    bad = [index for index, reason in enumerate(reasons) if reason is not None]
    if not bad:
        return rows, []
    bad_rows = [
        BadRow(row["location"], row["reason"])
        for row in rows.select(bad).select_columns(["location", "reason"])
    ]
    return rows.select([index for index, reason in enumerate(reasons) if reason is None]), bad_rows


def _split(
    rows: datasets.Dataset, ratio: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(train, evaluation): a seeded share of the rows, at least one on each side, both in their old
    order.
    """
    num_eval = max(1, int(len(rows) * ratio))
    if num_eval >= len(rows):
        raise DataError(
            f"--split_dataset_ratio {ratio} of {len(rows)} rows leaves no row to train on"
        )
    chosen = permutation(len(rows), seed, SPLIT)
    return rows.select(sorted(chosen[num_eval:].tolist())), rows.select(
        sorted(chosen[:num_eval].tolist())
    )
