"""Arrow tables -> raw rows: parquet files, folders of save_to_disk, what `datasets` loads by name.

Columns are read as they are stored: an Audio, Image or Video feature of `datasets`, at any depth,
stays bytes and path, and nothing of it is decoded.
"""

import json
import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from megatron_gkd.data.raw_rows import RawRows, in_folder, joined
from megatron_gkd.data.stored_rows import ROWS_AT_ONCE
from megatron_gkd.errors import BrokenCell, DataError, first_line

SUFFIXES = (".parquet", ".arrow")
SAVED_MARKERS = ("state.json", "dataset_dict.json")
"""Files that tell a folder of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`"""


def open_parquet(path: str) -> RawRows:
    """The rows are unpacked to a file without a name in the folder of temporary files (TMPDIR), and
    mapped from there: any row can be read, and memory holds a few. Raises DataError.
    """
    try:
        with (
            tempfile.TemporaryFile() as file,
            pyarrow.parquet.ParquetFile(path, pre_buffer=False) as table,
        ):
            with pyarrow.ipc.new_stream(file, table.schema_arrow) as writer:
                for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, use_threads=False):
                    writer.write_batch(batch)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with pyarrow.ipc.open_stream(pyarrow.py_buffer(mapped)) as reader:
            batches = list(reader)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable parquet file: {first_line(error)}") from None
    return batch_rows(path, batches, os.path.dirname(path))


def open_arrow(path: str) -> RawRows:
    """A file of arrow's stream or file format, mapped. Raises DataError."""
    return batch_rows(path, _batches(path), os.path.dirname(path))


def open_saved(folder: str) -> RawRows:
    """A folder of save_to_disk; of several splits `train`, or the only one. Raises DataError."""
    splits = os.path.join(folder, "dataset_dict.json")
    if os.path.isfile(splits):
        names = _read_json(splits).get("splits") or []
        if "train" not in names and len(names) != 1:
            raise DataError(
                f"{folder} has no split `train` (it has {', '.join(names)}): give the folder of "
                f"the one you want, such as {os.path.join(folder, names[0]) if names else 'DIR'}"
            )
        rows = _saved(os.path.join(folder, "train" if "train" in names else names[0]))
    else:
        rows = _saved(folder)
    locations = [f"{folder} row {index}" for index in range(len(rows.locations))]
    return in_folder(folder, locations, rows.read)


def _saved(folder: str) -> RawRows:
    state = _read_json(os.path.join(folder, "state.json"))
    if state.get("_indices_data_files"):
        raise DataError(f"{folder} was written by `datasets` before 2.0: save it again")
    files = [os.path.join(folder, entry["filename"]) for entry in state.get("_data_files") or []]
    if not files:
        raise DataError(f"{folder} has no rows")
    return joined([open_arrow(file) for file in files])


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is not an object")
    return found


def _batches(path: str) -> list[pyarrow.RecordBatch]:
    try:
        mapped = pyarrow.memory_map(path)
        try:
            with pyarrow.ipc.open_stream(mapped) as reader:
                return list(reader)
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            whole = pyarrow.ipc.open_file(mapped)
            return [whole.get_batch(number) for number in range(whole.num_record_batches)]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable arrow file: {first_line(error)}") from None


def batch_rows(name: str, batches: Sequence[pyarrow.RecordBatch], folder: str) -> RawRows:
    """The rows of `batches`, which have one schema, as objects of Python; `name` is that of their
    file or data set.
    """
    starts = np.cumsum([0, *(batch.num_rows for batch in batches)])

    def read(index: int) -> dict[str, Any]:
        number = int(np.searchsorted(starts, index, side="right")) - 1
        batch, row = batches[number], index - int(starts[number])
        return {
            field.name: _value(column, row) for field, column in zip(batch.schema, batch.columns)
        }

    return in_folder(folder, [f"{name} row {index}" for index in range(int(starts[-1]))], read)


def _value(column: pyarrow.Array, row: int) -> Any:
    try:
        return _unpacked(column[row].as_py(), column.type)
    except Exception as error:  # dates out of range, text that is not UTF-8, broken JSON
        return BrokenCell(first_line(error))


def _unpacked(value: Any, kind: pyarrow.DataType) -> Any:
    """The value of an arrow type; what is stored as JSON (in columns of mixed types) is parsed. An
    object's nulls are left out: arrow fills with them what one row lacks and another has.
    """
    if value is None:
        return None
    if isinstance(kind, pyarrow.JsonType):
        return json.loads(value)
    if pyarrow.types.is_struct(kind):
        return {
            field.name: _unpacked(value[field.name], field.type)
            for field in kind
            if value[field.name] is not None
        }
    if _is_list(kind):
        if not pyarrow.types.is_nested(kind.value_type) and not _is_json(kind.value_type):
            return value
        return [_unpacked(item, kind.value_type) for item in value]
    return value


def _is_json(kind: pyarrow.DataType) -> bool:
    return isinstance(kind, pyarrow.JsonType)


def _is_list(kind: pyarrow.DataType) -> bool:
    return (
        pyarrow.types.is_list(kind)
        or pyarrow.types.is_large_list(kind)
        or pyarrow.types.is_fixed_size_list(kind)
    )
