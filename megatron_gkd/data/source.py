"""`--dataset` entries -> raw rows with their locations: files, folders of files, folders written by
save_to_disk, and `datasets` names.

Text files are read row by row and not by arrow, so that a broken line has a number, and rows may
differ in columns and types. Of a folder each file is read as it would be by itself. `datasets` is
needed for names alone.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from megatron_gkd.data import tables, text_files
from megatron_gkd.data.order import SUBSET, permutation
from megatron_gkd.data.raw_rows import RawRows, chosen, joined
from megatron_gkd.errors import DataError, first_line

# Kinds of files that hold rows, packed or in a format that is not read here: leaving them out of a
# folder would lose rows.
_UNREAD = re.compile(
    r"\.(jsonl?|csv|tsv|parquet|arrow)\.(zst|bz2|xz|lz4|zip|br)$|\.parquet\.gz$|\.(ndjson|xlsx?)$"
)
_NO_ROWS = ("dataset_info.json", "dataset_infos.json")
# How the names of files tell a split; the words are those of `datasets`.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class Source(NamedTuple):
    """Rows that are not parsed yet: `read(i)` is raw row i, or raises RowError; `locations[i]`
    names it in messages.
    """

    name: str
    locations: list[str]
    read: Callable[[int], Any]
    folder_of: Callable[[int], str]
    """Index of a row -> the folder to which paths of its media are relative"""


def open_source(entry: str, seed: int, download: bool = False) -> Source:
    """Open `PATH`, `NAME` or either with `#N`: the first N rows after a seeded shuffle. download:
    `datasets`, which may use the network, opens names that are no file or folder. Raises DataError.
    """
    name, num_rows = split_suffix(entry)
    try:
        rows = _open(name, download)
    except OSError as error:
        raise DataError(f"{name} cannot be opened: {first_line(error)}") from error
    available = len(rows.locations)
    if not available:
        raise DataError(f"{name} has no rows")
    if num_rows is not None:
        if not 0 < num_rows <= available:
            raise DataError(
                f"{entry} asks for {num_rows} rows and {name} has {available}: choose between 1 "
                f"and {available}, or leave out the #"
            )
        rows = chosen(rows, permutation(available, seed, SUBSET)[:num_rows].tolist())
    return Source(name, *rows)


def split_suffix(entry: str) -> tuple[str, int | None]:
    """`NAME#2000` -> (NAME, 2000). An existing path is never split."""
    match = re.fullmatch(r"(.+)#(\d+)", entry)
    if match is None or os.path.exists(entry):
        return entry, None
    return match.group(1), int(match.group(2))


def _open(name: str, download: bool) -> RawRows:
    if os.path.isfile(name):
        return _open_file(name)
    if os.path.isdir(name):
        return tables.open_saved(name) if _is_saved(name, os.listdir(name)) else _open_folder(name)
    if os.path.exists(name):
        raise DataError(f"{name} is a pipe or a device: write the rows to a file")
    looks_like_a_path = _kind(name) is not None or name.startswith(("/", "./", "../", "~"))
    if looks_like_a_path or not download:
        on_the_hub = "; for a data set of that name on the hub add --download_datasets true"
        raise DataError(f"{name} does not exist{'' if looks_like_a_path else on_the_hub}")
    return _open_name(name)


# Files and folders
# --------------------------------------------------------------------------------------------------


def _kind(path: str) -> str | None:
    """The suffix of a kind of file that is read, None for others."""
    name = path.lower()
    packed = name.endswith(".gz")
    suffix = os.path.splitext(name.removesuffix(".gz"))[1]
    if suffix in text_files.SUFFIXES or (suffix in tables.SUFFIXES and not packed):
        return suffix
    return None


def _open_file(path: str) -> RawRows:
    suffix = _kind(path)
    if suffix is None:
        own = os.path.splitext(path)[1]
        unpack = "; unpack it first" if _UNREAD.search(path.lower()) else ""
        raise DataError(
            f"{path}: unknown file type {own or '(no suffix)'}{unpack}; .jsonl, .json (an object "
            "per line, or one array), .csv, .tsv, each with or without .gz, .parquet and .arrow "
            "are read"
        )
    if suffix in text_files.SUFFIXES:
        return text_files.open_text(path, suffix)
    return tables.open_parquet(path) if suffix == ".parquet" else tables.open_arrow(path)


def _is_saved(folder: str, names: list[str]) -> bool:
    """Whether save_to_disk wrote the folder, in which `names` are."""
    return any(marker in names for marker in tables.SAVED_MARKERS)


def _open_folder(folder: str) -> RawRows:
    """Every file of rows in it and its subfolders, in the order of their names; without those of
    other splits than `train`, which a line names.
    """
    found = sorted(_files_of_rows(folder))
    if not found:
        there = sorted(os.listdir(folder))
        more = ", ..." if len(there) > 8 else ""
        raise DataError(
            f"{folder} has no file of rows (.jsonl, .json, .csv, .tsv, with or without .gz, "
            f".parquet, .arrow): "
            + (f"it holds {', '.join(there[:8])}{more}" if there else "it is empty")
        )
    splits = [_split(os.path.relpath(path, folder)) for path in found]
    held_out = [path for path, split in zip(found, splits) if split in ("validation", "test")]
    if len(held_out) == len(found) and len(set(splits)) > 1:
        raise DataError(
            f"{folder} has files of the splits validation and test alone "
            f"({', '.join(os.path.relpath(path, folder) for path in found[:8])}): give the files "
            "that are to be trained"
        )
    if len(held_out) < len(found):
        found = [path for path in found if path not in held_out]
        if held_out:
            print(
                f"{folder}: files of other splits are left out (--val_dataset takes them): "
                + ", ".join(os.path.relpath(path, folder) for path in held_out[:8])
                + (f" and {len(held_out) - 8} more" if len(held_out) > 8 else ""),
                file=sys.stderr,
                flush=True,
            )
    return joined(
        [tables.open_saved(path) if os.path.isdir(path) else _open_file(path) for path in found]
    )


def _files_of_rows(folder: str) -> Iterator[str]:
    """Files that hold rows, and folders of save_to_disk; hidden ones, documents and media are no
    such files. Raises DataError for rows that cannot be read.
    """
    for path, folders, names in walk(folder):
        if _is_saved(path, names):
            folders.clear()
            yield path
            continue
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        for name in names:
            whole = os.path.join(path, name)
            if name.startswith((".", "_")) or name in _NO_ROWS:
                continue
            if _UNREAD.search(name.lower()):
                raise DataError(
                    f"{whole} is of a type that is not read: unpack or convert it to .jsonl, or "
                    "take it out of the folder"
                )
            # no pipe; opening a link to nothing says what is missing
            if _kind(name) is not None and (os.path.isfile(whole) or not os.path.exists(whole)):
                yield whole


def walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` in the order of names, through links to folders too. A folder that two names lead
    to comes once, so that a link may lead upwards.
    """
    found: set[str] = set()
    for path, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(path) in found:
            folders.clear()
            continue
        found.add(os.path.realpath(path))
        folders.sort()
        yield path, folders, sorted(names)


def _split(path: str) -> str | None:
    """The split that the name of a file tells, as `datasets` has it: between signs, spaces and
    digits.
    """
    words = set(re.split(r"[-._ 0-9/]+", path.lower()))
    return next((split for split, names in _SPLITS.items() if words & set(names)), None)


# Names
# --------------------------------------------------------------------------------------------------


def _open_name(name: str) -> RawRows:
    """What `datasets` loads, from the network where it must."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name} is read by `datasets`, which cannot be imported ({first_line(error)}): "
            "pip install 'datasets>=5.2,<5.3', or give the rows as files"
        ) from None
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # a loader's own errors are of any type
        raise DataError(
            f"`datasets` could not load {name} ({_causes(error)}); a data set that is neither here "
            "nor on the hub must be downloaded first: give its file or folder"
        ) from error
    if isinstance(loaded, dict):
        if "train" not in loaded and len(loaded) != 1:
            raise DataError(
                f"{name} has no split `train` (it has {', '.join(loaded)}): save the one you want "
                "and give its folder"
            )
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    table = loaded.with_format("arrow")[:]
    return tables.batch_rows(name, table.to_batches(), "")


def _causes(error: BaseException) -> str:
    """An error and what it says that it comes from."""
    said: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(said) < 5:
        said.append(f"{type(cause).__name__}: {first_line(cause)}")
        cause = cause.__cause__
    return ", caused by ".join(dict.fromkeys(said))
