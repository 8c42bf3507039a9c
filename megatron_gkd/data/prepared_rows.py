"""Prepared rows, kept in a folder for the next start that would make the same: named by a digest of
everything that they are made of.

A folder of kept rows (`DIGEST/`) appears by one rename and never changes. A start links or copies
its files to where it would have written them, so that it may be deleted at any time. Ranks,
machines and runs need no lock: what two of them prepare at once is the same, and the first is kept.
"""

import errno
import hashlib
import json
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from pyarrow import compute

from megatron_gkd.content_digest import code_digest
from megatron_gkd.data.source import Source, split_suffix, walk
from megatron_gkd.data.stored_rows import StoredRows
from megatron_gkd.errors import RowError

# Settings that change no row, or whose rows are told apart below; every other one is in the digest.
CHANGE_NO_ROW = {
    "dataset",  # each entry has a digest of its own
    "val_dataset",
    "split_dataset_ratio",  # of rows that are prepared
    "skip_bad_rows",
    "check_data",  # it prepares anew
    "dataset_num_proc",
    "dataloader_num_workers",
    "download_datasets",
    "media_cache",
    "prepared_rows",
    "prepared_rows_gib",
}
# What reads rows, media and templates.
LIBRARIES = (
    "av datasets jinja2 numpy pillow pyarrow sentencepiece soundfile soxr tokenizers torch "
    "transformers"
).split()
_WEIGHTS = (".bin", ".distcp", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors")
_TABLES = (".arrow", ".csv", ".gz", ".json", ".jsonl", ".parquet", ".tsv", ".txt")
_LARGE = 2**26  # bytes of a file beside rows, from which size and time stand for its content
_MANIFEST, _PART = "manifest.json", ".part-"
_ABANDONED = 86400  # seconds after which a folder that nobody finished goes
_CLOCKS = 2.0  # seconds by which the times of files may be behind


def default_folder() -> str:
    """The user's cache folder, as other programs choose it."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "megatron_gkd", "prepared_rows")


def basis(settings: Any, encoding: dict[str, Any], model_dir: str) -> str:
    """A digest of what every row is prepared with: all settings of the data but CHANGE_NO_ROW, and
    the content of files that they name; `encoding`, what else the rows are encoded with, by name;
    the model folder's files but weights; this package and LIBRARIES.

    Raises TypeError for a value that JSON does not have: it must be said what it stands for.
    """
    found = _Digest()
    values = {name: value for name, value in vars(settings).items() if name not in CHANGE_NO_ROW}
    values |= {f"encoding of {name}": value for name, value in encoding.items()}
    for name, value in sorted(values.items()):
        found.add(name, json.dumps(value, sort_keys=True))
        if isinstance(value, str) and os.path.isfile(value):
            found.add_file(value)
    found.add(sys.version)
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found.add(name, version(name))
    found.add(code_digest())
    for path in _files(model_dir):
        name = os.path.relpath(path, model_dir)
        is_own = os.sep not in name or name.endswith(".jinja")
        if is_own and not name.endswith(_WEIGHTS):
            found.add(name)
            found.add_file(path, large=_LARGE)
    return found.hex()


def _entry_digest(entry: str, basis: str, seed: int, open_entry: Callable[[], Source]) -> str:
    """A digest of the rows of an entry of --dataset, of its name and of what they are prepared
    with.

    Of a file its bytes; of a folder the bytes of its tables, of other files size and time of
    change; of a name that `datasets` finds the rows themselves.
    """
    name, num_rows = split_suffix(entry)
    found = _Digest()
    found.add(basis, entry, os.path.abspath(name), "" if num_rows is None else seed)
    if os.path.isfile(name):
        found.add_file(name)
    elif os.path.isdir(name):
        for path in _files(name):
            found.add(os.path.relpath(path, name))
            found.add_file(path, large=None if path.lower().endswith(_TABLES) else 0)
    else:
        source = open_entry()
        for index in range(len(source.locations)):
            try:
                found.add(pickle.dumps(source.read(index)))
            except RowError as error:
                found.add(error)
    return found.hex()


class _Digest:
    """Of values and files, one after the other, in 128 bits."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, *values: object) -> None:
        self._hash.update(repr(values).encode("utf-8", "backslashreplace"))

    def add_file(self, path: str, large: int | None = None) -> None:
        """The content; of a file of more than `large` bytes size and time of change. What cannot be
        read is read by nobody.
        """
        try:
            status = os.stat(path)
            if large is not None and status.st_size > large:
                self.add(status.st_size, status.st_mtime_ns)
                return
            self.add(status.st_size)
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    self._hash.update(block)
        except OSError as error:
            self.add("unreadable", error.errno)

    def hex(self) -> str:
        return self._hash.hexdigest()


def _files(folder: str) -> Iterator[str]:
    """The files under `folder` in order, without what is hidden (a repository's .git)."""
    for root, folders, files in walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (os.path.join(root, name) for name in files if name[0] != ".")
        yield from filter(os.path.isfile, paths)  # no pipe, which has no end


class _State(NamedTuple):
    """What prepared rows found outside of the digest."""

    digest: str
    """Of the media that they refer to by path, as they are now, and of which rows are bad"""
    newest: float
    """The latest time of change of a medium, in seconds; 0 where there are none"""


def _state(rows: StoredRows) -> _State:
    found, newest = _Digest(), 0.0
    media = compute.list_flatten(rows.columns("media")["media"])
    paths = compute.unique(compute.struct_field(media, "path")).drop_null().to_pylist()
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            found.add(path, error.errno)
            continue
        found.add(path, status.st_size, status.st_mtime_ns)
        newest = max(newest, status.st_mtime)
    reasons = rows.columns("reason")["reason"].to_pylist()
    found.add([(index, reason) for index, reason in enumerate(reasons) if reason is not None])
    return _State(found.hex(), newest)


class PreparedRows:
    """The rows that a folder keeps, at most `limit` bytes of them. Where the folder cannot be read
    or written nothing is reused or kept; `notes` say what was, and why not.
    """

    def __init__(self, folder: str, limit: int, schema: pyarrow.Schema, basis: str):
        """basis: see `basis`."""
        self.folder, self.limit, self.schema, self.basis = Path(folder), limit, schema, basis
        self.notes: list[str] = []

    def files(
        self,
        entry: str,
        path: str,
        *,
        seed: int,
        open_entry: Callable[[], Source],
        reason_of: Callable[[int], str | None],
        prepare: Callable[[], list[str]],
    ) -> list[str]:
        """The files with the rows of an entry of --dataset, named after `path`: those that are
        kept, else those that `prepare` writes, which are then kept.

        open_entry: the entry's raw rows. reason_of: why the row of this number is bad, found anew.
        Raises what these do.
        """
        started = time.time()
        digest = _entry_digest(entry, self.basis, seed, open_entry)
        if files := self._take(digest, entry, path, reason_of):
            return files
        files = prepare()
        state = _state(StoredRows.open(self.schema, files))
        # clocks of files are a little behind
        is_still = state.newest < started - _CLOCKS
        if is_still and _entry_digest(entry, self.basis, seed, open_entry) == digest:
            self._keep(digest, entry, files, state.digest)
        else:
            self.notes.append(f"{entry}: not kept for the next start, files have just changed")
        return files

    def _take(
        self, digest: str, entry: str, path: str, reason_of: Callable[[int], str | None]
    ) -> list[str]:
        """The files of the rows that are kept; none where there are none, or where they are no
        longer what would be prepared: media have changed, or a row that was bad is no more.
        """
        kept = self.folder / digest
        files: list[str] = []
        try:
            manifest = json.loads((kept / _MANIFEST).read_text())
            for number, size in enumerate(manifest["sizes"]):
                files.append(f"{path}.{number}")
                _link_or_copy(kept / str(number), files[-1])
                if os.path.getsize(files[-1]) != size:
                    raise ValueError(f"{kept / str(number)} is cut short")
            rows = StoredRows.open(self.schema, files)
            reasons = rows.columns("reason")["reason"].to_pylist()
            if _state(rows).digest == manifest["state"] and all(
                reason is None or reason_of(index) == reason for index, reason in enumerate(reasons)
            ):
                with suppress(OSError):  # others may only read it
                    os.utime(kept / _MANIFEST)
                self.notes.append(
                    f"{entry}: {len(rows)} prepared rows reused from {kept} "
                    f"({_gib(manifest['sizes'])})"
                )
                return files
        except (OSError, ValueError, KeyError, TypeError) as error:
            if files or not isinstance(error, FileNotFoundError):  # else there are none
                self.notes.append(f"{entry}: {kept} is not reused: {error}")
                # `_keep` would take it for whole; a full disk or the like says nothing about it
                if getattr(error, "errno", None) in (None, errno.ENOENT):
                    shutil.rmtree(kept, ignore_errors=True)
        for file in files:
            with suppress(OSError):
                os.unlink(file)
        return []

    def _keep(self, digest: str, entry: str, files: Sequence[str], state: str) -> None:
        kept, sizes = self.folder / digest, [os.path.getsize(file) for file in files]
        if sum(sizes) > self.limit:
            self.notes.append(
                f"{entry}: not kept for the next start, {_gib(sizes)} are more than "
                f"--prepared_rows_gib {self.limit / 2**30:g}"
            )
            return
        part = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = tempfile.mkdtemp(prefix=_PART, dir=self.folder)
            for number, file in enumerate(files):
                _link_or_copy(file, os.path.join(part, str(number)))
            with open(os.path.join(part, _MANIFEST), "w") as out:
                json.dump({"rows of": entry, "sizes": sizes, "state": state}, out)
            if _manifest_of(kept).get("state") != state:  # else another run was faster
                shutil.rmtree(kept, ignore_errors=True)
                with suppress(OSError):  # likewise
                    os.rename(part, kept)
            total = self._bound(kept)
        except OSError as error:
            self.notes.append(
                f"{entry}: not kept for the next start: {error} (--prepared_rows names another "
                "folder, or none)"
            )
            return
        finally:
            if part is not None:
                shutil.rmtree(part, ignore_errors=True)
        self.notes.append(
            f"{entry}: prepared rows kept in {kept} ({_gib(sizes)}; with others {_gib([total])} of "
            f"--prepared_rows_gib {self.limit / 2**30:g})"
        )

    def _bound(self, newest: Path) -> int:
        """Delete what was unused for longest until the limit holds; returns the bytes left."""
        sizes: dict[Path, int] = {}
        used: dict[Path, float] = {}
        for kept in self.folder.iterdir():
            with suppress(OSError):  # another run may delete it
                if not kept.name.startswith(_PART):
                    sizes[kept] = sum(_manifest_of(kept).get("sizes", []))
                    used[kept] = (kept / _MANIFEST).stat().st_mtime
                elif time.time() - kept.stat().st_mtime > _ABANDONED:
                    shutil.rmtree(kept, ignore_errors=True)
        for kept in sorted(used, key=used.__getitem__):
            if sum(sizes.values()) > self.limit and kept != newest:
                shutil.rmtree(kept, ignore_errors=True)
                del sizes[kept]
        return sum(sizes.values())


def _manifest_of(kept: Path) -> dict[str, Any]:
    """Empty where there is none."""
    try:
        return dict(json.loads((kept / _MANIFEST).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _link_or_copy(source: str | Path, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _gib(sizes: Iterable[int]) -> str:
    return f"{sum(sizes) / 2**30:.2f} GiB"
