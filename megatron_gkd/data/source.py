"""`--dataset` entries -> raw rows with their locations: jsonl and parquet files, folders written by
save_to_disk, and `datasets` names.

jsonl is read line by line and not by arrow, so that a broken line has a number, and rows may differ
in columns and types. Everything else is read by `datasets`, which jsonl does not need.
"""

import copy
import json
import os
import re
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow

from megatron_gkd.data.order import SUBSET, permutation
from megatron_gkd.data.rows import MEDIA_COLUMNS
from megatron_gkd.errors import DataError, RowError, first_line

if TYPE_CHECKING:
    import datasets

# Nothing is cached under it; without one `datasets` would hash the whole table.
_FINGERPRINT = "megatron-gkd"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Source(NamedTuple):
    """Rows that are not parsed yet: `read(i)` is raw row i, or raises RowError; `locations[i]`
    names it in messages.
    """

    name: str
    locations: list[str]
    read: Callable[[int], Any]
    folder: str = ""
    """Paths of media are relative to it"""


def open_source(entry: str, seed: int, download: bool = False) -> Source:
    """Open `PATH`, `NAME` or either with `#N`: the first N rows after a seeded shuffle. download:
    `datasets`, which may use the network, opens names that are no file or folder. Raises DataError.
    """
    name, num_rows = split_suffix(entry)
    source = _open(name, download)
    available = len(source.locations)
    if not available:
        raise DataError(f"{name} has no rows")
    if num_rows is None:
        return source
    if not 0 < num_rows <= available:
        raise DataError(
            f"{entry} asks for {num_rows} rows and {name} has {available}: choose between 1 and "
            f"{available}, or leave out the #"
        )
    chosen = permutation(available, seed, SUBSET)[:num_rows].tolist()
    return source._replace(
        locations=[source.locations[index] for index in chosen],
        read=lambda index: source.read(chosen[index]),
    )


def split_suffix(entry: str) -> tuple[str, int | None]:
    """`NAME#2000` -> (NAME, 2000). An existing path is never split."""
    match = re.fullmatch(r"(.+)#(\d+)", entry)
    if match is None or os.path.exists(entry):
        return entry, None
    return match.group(1), int(match.group(2))


def _open(name: str, download: bool) -> Source:
    suffix = os.path.splitext(name)[1].lower()
    if os.path.isfile(name):
        if suffix in (".jsonl", ".json"):
            return _open_jsonl(name)
        if suffix == ".parquet":
            datasets = _import_datasets(name)
            import pyarrow.parquet

            try:
                table = pyarrow.parquet.read_table(name)
                return _table_source(name, datasets.Dataset(table, fingerprint=_FINGERPRINT))
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise DataError(
                    f"{name} is not a readable parquet file: {first_line(error)}"
                ) from None
        raise DataError(
            f"{name}: unknown file type {suffix or '(no suffix)'}; .jsonl, .json (one object per "
            "line) and .parquet are read"
        )
    looks_like_a_path = suffix in (".jsonl", ".json", ".parquet") or name.startswith(
        ("/", "./", "../", "~")
    )
    if not os.path.isdir(name) and (looks_like_a_path or not download):
        on_the_hub = "; for a data set of that name on the hub add --download_datasets true"
        raise DataError(f"{name} does not exist{'' if looks_like_a_path else on_the_hub}")
    datasets = _import_datasets(name)
    try:
        if os.path.isdir(name) and any(
            os.path.isfile(os.path.join(name, marker))
            for marker in ("state.json", "dataset_dict.json")
        ):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name)
    except Exception as error:  # a loader's own errors are of any type
        raise DataError(
            f"`datasets` could not load {name} ({type(error).__name__}: {first_line(error)}); "
            "a data set that is neither here nor on the hub must be downloaded first: give its "
            "file or folder"
        ) from error
    if isinstance(loaded, dict):
        if "train" not in loaded and len(loaded) != 1:
            raise DataError(
                f"{name} has no split `train` (it has {', '.join(loaded)}): save the one you want "
                "and give its folder"
            )
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    return _table_source(name, loaded)


def _import_datasets(name: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name} is read by `datasets`, which cannot be imported ({first_line(error)}): "
            "pip install 'datasets>=5.2,<5.3', or give the rows as .jsonl, which does not need it"
        ) from None
    return datasets


def _open_jsonl(path: str) -> Source:
    with open(path, "rb") as file:
        lines = file.read().removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
    if (
        numbers
        and lines[numbers[0] - 1].lstrip().startswith(b"[")
        and path.lower().endswith(".json")
    ):
        raise DataError(
            f"{path}:{numbers[0]} begins a JSON array: write one object per line (jsonl)"
        )
    # one block of memory that forked processes share, since nobody counts references in it
    rows = pyarrow.array([lines[number - 1] for number in numbers], type=pyarrow.large_binary())
    return Source(
        path,
        [f"{path}:{number}" for number in numbers],
        lambda index: _parse_line(rows[index].as_py()),
        os.path.dirname(path),
    )


def _parse_line(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(
            f"not UTF-8: byte {error.start + 1} of the line is 0x{error.object[error.start]:02x}"
        ) from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON that can be read: {first_line(error)}") from None


def _table_source(name: str, rows: "datasets.Dataset") -> Source:
    rows = rows.with_format(None)
    for column in set(MEDIA_COLUMNS) & set(rows.column_names):
        rows = _undecoded(rows, column)
    folder = name if os.path.isdir(name) else os.path.dirname(name)
    locations = [f"{name} row {index}" for index in range(len(rows))]
    return Source(name, locations, lambda index: dict(rows[index]), folder)


def _undecoded(rows: "datasets.Dataset", column: str) -> "datasets.Dataset":
    """Media as they are stored, bytes and path; `datasets` would decode them otherwise."""
    import datasets

    feature = rows.features[column]
    inner = feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else feature
    if not hasattr(inner, "decode"):
        return rows  # paths, or plain structures
    raw = copy.copy(inner)
    raw.decode = False
    return rows.cast_column(column, raw if inner is feature else type(feature)(raw))
