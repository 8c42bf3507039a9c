"""Text files -> raw rows: an object per line, one JSON array, or a table with a header (csv, tsv);
plain or packed by gzip, in UTF-8.

A file is indexed once, and a row is read from it when it is asked for: memory holds a few numbers a
row. What gzip packed is unpacked to a file without a name in the folder of temporary files (TMPDIR)
first, and mapped.
"""

import csv
import gzip
import io
import json
import mmap
import os
import re
import shutil
import sys
import tempfile
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from megatron_gkd.data.raw_rows import RawRows, in_folder
from megatron_gkd.errors import DataError, RowError, first_line, short_repr, shortened

_GZIP = b"\x1f\x8b"
_UTF8_MARK = b"\xef\xbb\xbf"
_ARRAY = re.compile(rb"\s*\[\s*[\[{\]]")
_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
# Between the elements of an array: a string, or what gives a JSON text its structure.
_TOKEN = re.compile(_STRING + rb"|[\[\]{},\n]", re.DOTALL)
# Inside of an element: all up to the next bracket, strings skipped.
_TO_BRACKET = re.compile(rb'[^"\[\]{}]*(?:' + _STRING + rb'[^"\[\]{}]*)*[\[\]{}]', re.DOTALL)
_SPACE = re.compile(rb"\s*")

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", ".json", *_DELIMITERS)
MOST_OPEN = 8  # files that stay open between rows


def open_text(path: str, suffix: str) -> RawRows:
    """A file of one of SUFFIXES, apart from a `.gz` behind it. Locations are FILE:LINE, or
    FILE[INDEX] for an array with several elements on a line. Raises DataError.
    """
    file = _open(path)
    head = file.read(0, 4)
    if b"\0" in head or head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(
            f"{path} is UTF-16 or binary, and rows are read as UTF-8: iconv -f UTF-16 -t UTF-8 "
            "FILE > NEW_FILE"
        )
    start = len(_UTF8_MARK) if head.startswith(_UTF8_MARK) else 0
    beginning = file.read(start, start + (1 << 16))
    is_array = suffix not in _DELIMITERS and _ARRAY.match(beginning) is not None
    if not is_array and b"\r" in beginning.rstrip() and b"\n" not in beginning:
        raise DataError(
            f"{path}: its lines end in CR alone; rows end in LF or CR LF: tr '\\r' '\\n' < FILE > "
            "NEW_FILE"
        )
    if suffix in _DELIMITERS:
        return _open_table(path, file, start, _DELIMITERS[suffix])
    if is_array:
        spans = _elements(path, file, start)
    else:
        spans = _lines(file, start)
        _check_object_per_line(path, file, spans)
    if len(set(spans.lines)) == len(spans.lines):
        locations = [f"{path}:{line}" for line in spans.lines]
    else:
        locations = [f"{path}[{index}]" for index in range(len(spans.lines))]
    return in_folder(
        os.path.dirname(path), locations, lambda index: _parse(spans.text(file, index))
    )


class _File(NamedTuple):
    """A file by its name, so that a folder of thousands does not need as many open ones; or what
    gzip packed in it. Forked processes may read either.
    """

    path: str
    state: tuple[int, ...]
    """By which a file is told that has changed"""
    unpacked: mmap.mmap | bytes | None

    def read(self, start: int, end: int) -> bytes:
        if self.unpacked is not None:
            return self.unpacked[start:end]
        try:
            file = _held_open(self.path, self.state)
            if _state(file) != self.state:
                raise RowError("its file has changed since its rows were counted")
            return os.pread(file.fileno(), end - start, start)
        except OSError as error:
            raise RowError(f"its file cannot be read any more: {first_line(error)}") from None

    def lines(self, start: int) -> Iterator[bytes]:
        """From `start` to the end."""
        if self.unpacked is None:
            with open(self.path, "rb") as file:
                file.seek(start)
                yield from file
        elif isinstance(self.unpacked, mmap.mmap):
            self.unpacked.seek(start)
            yield from iter(self.unpacked.readline, b"")

    @contextmanager
    def mapped(self) -> Iterator[mmap.mmap | bytes]:
        if self.unpacked is not None:
            yield self.unpacked
            return
        with (
            open(self.path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            yield data


def _state(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


_held: dict[tuple[str, tuple[int, ...]], BinaryIO] = {}  # the files that were read last


def _held_open(path: str, state: tuple[int, ...]) -> BinaryIO:
    """The file, open for the next rows too: on network file systems opening takes long. `state`
    keeps a file apart from another that took its name.
    """
    file = _held.pop((path, state), None) or open(path, "rb")
    _held[path, state] = file
    if len(_held) > MOST_OPEN:
        _held.pop(next(iter(_held))).close()
    return file


def close_files() -> None:
    """Close the files that are held open. Rows that are read later open them again."""
    while _held:
        _held.popitem()[1].close()


def _open(path: str) -> _File:
    """The file, or what gzip packed in it."""
    with open(path, "rb") as file:
        if file.read(2) != _GZIP:
            return _File(path, _state(file), None)
        file.seek(0)
        with tempfile.TemporaryFile() as whole:
            try:
                with gzip.open(file) as packed:
                    shutil.copyfileobj(packed, whole, 1 << 20)
                whole.flush()
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{path} is not a whole gzip file: {first_line(error)}") from None
            except OSError as error:
                raise DataError(
                    f"{path} cannot be unpacked to {tempfile.gettempdir()} (TMPDIR): "
                    f"{first_line(error)}"
                ) from None
            if not whole.tell():
                return _File(path, (), b"")  # nothing cannot be mapped
            return _File(path, (), mmap.mmap(whole.fileno(), 0, access=mmap.ACCESS_READ))


class _Spans:
    """The bytes of each row in a file, and the line in which it begins, counted from 1."""

    def __init__(self, unit: str = "line"):
        self.unit = unit
        self.starts, self.ends, self.lines = array("q"), array("q"), array("q")

    def add(self, start: int, end: int, line: int) -> None:
        self.starts.append(start)
        self.ends.append(end)
        self.lines.append(line)

    def text(self, file: _File, index: int) -> str:
        """Raises RowError for what is not UTF-8."""
        data = file.read(self.starts[index], self.ends[index])
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError(
                f"not UTF-8: byte {error.start + 1} of the {self.unit} is "
                f"0x{data[error.start]:02x} (iconv -f ENCODING -t UTF-8 FILE > NEW_FILE)"
            ) from None


# JSON
# --------------------------------------------------------------------------------------------------


def _lines(file: _File, start: int) -> _Spans:
    """The lines that are not blank."""
    spans = _Spans()
    for number, line in enumerate(file.lines(start), start=1):
        if not line.isspace():
            spans.add(start, start + len(line.rstrip()), number)
        start += len(line)
    return spans


def _check_object_per_line(path: str, file: _File, spans: _Spans) -> None:
    """One object that is written over several lines would make each of them a bad row."""
    if len(spans.lines) < 2:
        return
    first, second = (file.read(spans.starts[index], spans.ends[index]) for index in (0, 1))
    if first.rstrip().endswith((b"{", b"[", b",")) and not second.lstrip().startswith(b"{"):
        raise DataError(
            f"{path}:{spans.lines[0]} begins an object that goes on in the next line: a file holds "
            "an object per line, or one array of objects (jq -c . FILE > NEW_FILE.jsonl; where the "
            "rows are a list in one object, jq -c '.data[]', with the name of the list)"
        )


def _elements(path: str, file: _File, start: int) -> _Spans:
    """The elements of the array that the file is. What is broken inside of one is found when it is
    read; brackets that do not match are an error of the file.
    """
    spans = _Spans("row")
    with file.mapped() as data:
        depth, line, place = 0, 1, start
        begin, begin_line = start, 0  # of the element; line 0: nothing of it was found yet
        while token := (_TO_BRACKET.match if depth > 1 else _TOKEN.search)(data, place):
            before, place = place, token.end()
            byte = data[place - 1 : place]
            if depth > 1:
                line += data[before:place].count(b"\n")
            elif byte == b"\n":
                line += 1
                continue
            elif depth and byte in b",]":
                first = _SPACE.match(data, begin)
                if first is not None and first.end() < place - 1:
                    spans.add(first.end(), place - 1, begin_line or line)
                begin, begin_line = place, 0
            elif depth:
                begin_line = begin_line or line
            if byte in b"[{":
                depth += 1
                begin = begin if depth > 1 else place
            elif byte in b"]}":
                depth -= 1
                if not depth:
                    break
        if depth:
            last = f"element {len(spans.lines)} begins in line {begin_line or line}"
            raise DataError(
                f"{path}: its array is not closed, {last}: is it cut short, or a bracket missing?"
            )
        rest = _SPACE.match(data, place)
        if rest is not None and rest.end() < len(data):
            raise DataError(
                f"{path}: its array ends in line {line}, and more follows: a file holds one array, "
                "or an object per line"
            )
    return spans


def _parse(text: str) -> Any:
    try:
        return json.loads(text.removeprefix("\ufeff"))  # of files put one behind the other
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} of the row, " if error.lineno > 1 else ""
        raise RowError(f"not JSON: {error.msg} at {line}column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON that can be read: {first_line(error)}") from None


# Tables
# --------------------------------------------------------------------------------------------------


def _open_table(path: str, file: _File, start: int, delimiter: str) -> RawRows:
    spans = _records(path, file, start, delimiter)
    if not spans.lines:
        raise DataError(f"{path} has no rows")
    try:
        header = _cells(spans.text(file, 0), delimiter)
    except RowError as error:
        raise DataError(f"{path}:{spans.lines[0]}, its header: {error}") from None
    names = [name.strip() for name in header]
    if len(names) == 1 and re.search(r"[;\t,|]", names[0]):
        raise DataError(
            f"{path}:{spans.lines[0]}: the header is one cell, {short_repr(names[0])}: cells are "
            "separated by commas in a .csv file and by tabs in a .tsv file"
        )
    if quoted := [name for name in names if name.startswith('"')]:
        raise DataError(
            f"{path}:{spans.lines[0]}: the header names {short_repr(quoted[0])}: a quote stands "
            "right behind the separator, without a space"
        )
    twice = {name for name in names if name and names.count(name) > 1}
    if twice:
        raise DataError(
            f"{path}:{spans.lines[0]}: the header names {short_repr(min(twice))} more than once"
        )

    def read(index: int) -> dict[str, Any]:
        cells = _cells(spans.text(file, index + 1), delimiter)
        if len(cells) != len(names):
            raise RowError(f"{len(cells)} cells, the header has {len(names)}")
        # a column without a name is the index that pandas writes
        return {name: cell if cell.strip() else None for name, cell in zip(names, cells) if name}

    locations = [f"{path}:{line}" for line in spans.lines[1:]]
    return in_folder(os.path.dirname(path), locations, read)


def _records(path: str, file: _File, start: int, delimiter: str) -> _Spans:
    """The records that are not blank, the header among them; a quoted cell may have line ends."""
    spans = _Spans("row")
    end = begin = start

    def lines() -> Iterator[str]:
        nonlocal end
        for line in file.lines(start):
            end += len(line)
            yield line.decode("latin-1")  # any byte; what matters here is ASCII

    line = 1
    with _long_cells():
        reader = csv.reader(lines(), delimiter=delimiter)
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    spans.add(begin, end, line)
                begin, line = end, reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{line}: {first_line(error)}") from None
    return spans


def _cells(text: str, delimiter: str) -> list[str]:
    """The cells of a record."""
    with _long_cells():
        try:
            (cells,) = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        except csv.Error as error:
            raise RowError(
                f"not {'csv' if delimiter == ',' else 'tsv'}: {first_line(error)} "
                f"({shortened(text.strip(), 60)!r})"
            ) from None
    return cells


@contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module refuses cells of more than 128 KiB, such as a picture in base64."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
