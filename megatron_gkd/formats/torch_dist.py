"""Reading megatron-core's distributed checkpoints (torch_dist): any rows and columns of any tensor.

The format is torch.distributed.checkpoint's: `.metadata` lists the chunks of every tensor, a chunk
is one `torch.save` stream inside a .distcp file. `.metadata` is a pickle by definition: it is read
with an unpickler that knows only the classes which describe tensors, so a file that names any other
code is refused before that code is even looked up. Of a chunk only the bytes asked for are read.
"""

import io
import math
import os
import pickle
import struct
import zipfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from megatron_gkd.errors import short_repr
from megatron_gkd.formats.block_digests import DIGESTS, BlockDigests
from megatron_gkd.formats.stored_tensor import as_matrix, read_block
from megatron_gkd.json_fields import read_object
from megatron_gkd.links import check_link
from megatron_gkd.model.tensor_slice import TensorSlice

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG = "metadata.json"
METADATA = ".metadata"
# Whose objects describe tensors. Each gets a stand-in, see `_DescriptionUnpickler`.
_RECORDS = {
    *(
        (metadata.__name__, name)
        for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")
    ),
    *(
        (metadata.__name__, f"{kind}Metadata")
        for kind in ("TensorStorage", "BytesStorage", "ChunkStorage")
    ),
    (filesystem.__name__, "_StorageInfo"),
}
# What nothing here needs: memory formats and layouts, and the save plans that Megatron-LM may keep
# in the metadata.
_IGNORED = {(metadata.__name__, "_MEM_FORMAT_ENCODING"), ("torch.serialization", "_get_layout")}
_IGNORED_MODULES = (
    "torch.distributed.checkpoint.planner",
    "megatron.core.dist_checkpointing.strategies.torch",
)


class _Record:
    """Stands for an object that describes a tensor: has the attributes that were saved."""

    offset = transform_descriptors = None  # these are not saved where they are None

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple):  # of TensorProperties
            state = {"dtype": state[0]}
        vars(self).update(state)


class _Ignored:
    """Stands for an object of no interest: takes any arguments and state."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _DescriptionUnpickler(pickle.Unpickler):
    """Knows the names that describe a checkpoint's tensors and nothing else. Each gives a stand-in
    that is made for this file alone: whatever the file does to it ends with it.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        ignored = type("_Ignored", (_Ignored,), {})

        def member(owner: Any, name: str) -> Any:
            if owner is not ignored:
                raise pickle.UnpicklingError(
                    f"it asks for {name} of {owner}, which is no enumeration"
                )
            return ignored()

        self.ignored = ignored
        self.known = {
            **{(module, name): type(name, (_Record,), {}) for module, name in _RECORDS},
            **dict.fromkeys(_IGNORED, ignored),
            # early Python 3.11 (Debian 12's 3.11.2) pickles enumerations by it
            ("builtins", "getattr"): member,
            ("torch", "Size"): torch.Size,
            ("collections", "OrderedDict"): dict,
            ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        if module in _IGNORED_MODULES:
            return self.ignored
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")


class _TensorUnpickler(pickle.Unpickler):
    """data.pkl of a saved tensor -> (its first element in the storage, its size, its stride)."""

    def find_class(self, module: str, name: str) -> Any:
        # the third version: 8-bit floats
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return lambda storage, offset, size, stride, *rest: (offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return str
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return name
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which is no part of a plain tensor"
        )

    def persistent_load(self, pid: Any) -> Any:
        return pid


class _FileRange(io.RawIOBase):
    """Bytes `start:start + length` of an open file, as a file."""

    def __init__(self, descriptor: int, start: int, length: int):
        self.descriptor, self.start, self.length, self.position = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        )
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = os.pread(
            self.descriptor,
            min(len(buffer), self.length - self.position),
            self.start + self.position,
        )
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


@dataclass(frozen=True)
class StoredChunk:
    """What one `torch.save` stream, bytes `start:start + length` of `file`, holds of a tensor.

    No TensorSlice: it has an offset and a size on every axis, as torch.distributed.checkpoint
    counts them, and may span several matrices of a stack.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


def find_torch_dist(folder: str | Path) -> Path | None:
    """The torch_dist folder that `folder` is, or points to with a tracker file; None where there is
    none.
    """
    folder = Path(folder)
    tracker = folder / TRACKER
    check_link(tracker)
    if tracker.is_file():
        text = tracker.read_text(errors="replace").strip()
        folder = folder / (f"iter_{int(text):07d}" if text.isdigit() else text)
    check_link(folder / CONFIG)
    return folder if (folder / CONFIG).is_file() else None


class TorchDist:
    """An opened checkpoint: `sizes` and `dtypes` by key; `read` gives rows and columns of one
    matrix.
    """

    def __init__(self, folder: str | Path, *, compared: bool = False):
        """compared: what is read with the converter's digests, where it has written them.

        Raises FileNotFoundError or ValueError naming what is missing, damaged, or of another
        format.
        """
        self.folder = Path(folder)
        self.digests = None
        if compared and (self.folder / DIGESTS).is_file() and (self.folder / METADATA).is_file():
            self.digests = BlockDigests(self.folder, METADATA)
        described, storage_data = self._read_metadata()
        tensors = {
            key: t
            for key, t in described.items()
            if type(t).__name__ == metadata.TensorStorageMetadata.__name__
        }
        self.sizes = {key: tuple(t.size) for key, t in tensors.items()}
        self.dtypes = {key: t.properties.dtype for key, t in tensors.items()}
        self._chunks: dict[str, list[StoredChunk]] = {key: [] for key in tensors}
        self._stacks: dict[tuple[str, int], dict[tuple[int, ...], list[StoredChunk]]] = {}
        self._payloads: dict[tuple[str, int], int] = {}
        storage = {
            (index.fqn, tuple(index.offset or ())): info for index, info in storage_data.items()
        }
        for key, tensor in tensors.items():
            for box in tensor.chunks:
                self._add_chunk(
                    key,
                    tuple(box.offsets),
                    tuple(box.sizes),
                    storage.get((key, tuple(box.offsets))),
                )
        self._check_files()

    def _read_metadata(self) -> tuple[dict[str, Any], dict[Any, Any]]:
        path = self.folder / CONFIG
        backend = read_object(path, "metadata of a checkpoint").get("sharded_backend")
        if backend != "torch_dist":
            raise ValueError(
                f"{path}: sharded_backend is {short_repr(backend)}; only torch_dist checkpoints "
                "are read"
            )
        path = self.folder / METADATA
        check_link(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the checkpoint is not complete")
        try:
            with open(path, "rb") as file:
                described = _DescriptionUnpickler(file).load()
            return described.state_dict_metadata, described.storage_data
        except Exception as error:  # whatever a damaged pickle may raise
            raise ValueError(
                f"{path}: not the metadata of a torch_dist checkpoint ({error})"
            ) from error

    def _add_chunk(self, key: str, offsets: tuple, sizes: tuple, info: Any) -> None:
        if info is None:
            raise ValueError(
                f"{self.folder / METADATA}: tensor {key} has no file for its chunk at "
                f"{list(offsets)}"
            )
        if getattr(info, "transform_descriptors", None):
            raise ValueError(
                f"{self.folder / info.relative_path}: tensor {key} is stored transformed, "
                "which is not read"
            )
        self._chunks[key].append(
            StoredChunk(offsets, sizes, info.relative_path, info.offset, info.length)
        )

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for chunks in self._chunks.values():
            for chunk in chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
        for name, end in ends.items():
            path = self.folder / name
            check_link(path)
            if path.parent != self.folder or not path.is_file():
                raise FileNotFoundError(f"{path} is missing: {METADATA} lists it")
            if path.stat().st_size < end:
                raise ValueError(
                    f"{path}: truncated, {path.stat().st_size} bytes where {METADATA} asks for "
                    f"{end}"
                )

    def read(self, wanted: TensorSlice) -> Tensor:
        """The rows, and columns, that are wanted of one matrix of a stack, [rows, columns] in the
        stored dtype.

        A vector has one column, a tensor of more axes as many as its axes after the first hold
        together. Raises ValueError where chunks do not cover them, or a file is damaged or not what
        its digests say.
        """
        key, index = wanted.name, wanted.matrix
        size = as_matrix(self.sizes[key][len(index) :])
        asked = [range(*part.indices(n)) for part, n in zip((*wanted.slices, slice(None)), size)]
        found = torch.empty(*map(len, asked), dtype=self.dtypes[key])
        missing = found.numel()
        for chunk in self._chunks_at(key, index):
            first, size = chunk.offsets[len(index) :], as_matrix(chunk.sizes[len(index) :])
            held = [range(o, o + n) for o, n in zip((*first, 0, 0), size)]
            both = [range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(asked, held)]
            if all(map(len, both)):
                rows, columns = (
                    range(b.start - h.start, b.stop - h.start) for h, b in zip(held, both)
                )
                values = self._read_chunk(key, chunk, index, rows, columns)
                if values.shape == found.shape:
                    return values
                found[
                    tuple(slice(b.start - a.start, b.stop - a.start) for a, b in zip(asked, both))
                ] = values
                missing -= values.numel()
        if missing:
            raise ValueError(
                f"{self.folder / METADATA}: no chunk holds {missing} elements of {key}{list(index)}"
            )
        return found

    def _chunks_at(self, key: str, index: tuple[int, ...]) -> list[StoredChunk]:
        if (key, len(index)) not in self._stacks:
            stack = self._stacks[key, len(index)] = {}
            for chunk in self._chunks[key]:
                for inside in product(
                    *(range(o, o + n) for o, n in zip(chunk.offsets[: len(index)], chunk.sizes))
                ):
                    stack.setdefault(inside, []).append(chunk)
        return self._stacks[key, len(index)].get(index, [])

    def _read_chunk(
        self, key: str, chunk: StoredChunk, index: tuple[int, ...], rows: range, columns: range
    ) -> Tensor:
        """Rows and columns, by their numbers in the chunk, of its matrix at `index`."""
        number, size = 0, as_matrix(chunk.sizes[len(index) :])
        for position, first, width in zip(index, chunk.offsets, chunk.sizes):
            number = number * width + position - first
        start = self._payload(key, chunk) + number * math.prod(size) * self.dtypes[key].itemsize
        path, dtype = self.folder / chunk.file, self.dtypes[key]
        if self.digests:
            return self.digests.read_block(path, chunk.start, start, dtype, size, rows, columns)
        return read_block(path, start, dtype, size[1], rows, columns)

    def _payload(self, key: str, chunk: StoredChunk) -> int:
        """First byte of the chunk's elements in its file. A chunk is a zip archive with the
        elements in one entry.
        """
        if (chunk.file, chunk.start) not in self._payloads:
            path = self.folder / chunk.file
            descriptor = os.open(path, os.O_RDONLY)
            try:
                file = _FileRange(descriptor, chunk.start, chunk.length)
                offset = _elements(file, chunk.sizes, self.dtypes[key])
            except Exception as error:  # whatever a damaged archive may raise
                raise ValueError(
                    f"{path}: damaged at the chunk {list(chunk.offsets)} of {key} ({error})"
                ) from error
            finally:
                os.close(descriptor)
            self._payloads[chunk.file, chunk.start] = chunk.start + offset
        return self._payloads[chunk.file, chunk.start]


def _elements(file: io.RawIOBase, sizes: tuple[int, ...], dtype: torch.dtype) -> int:
    """Offset of the elements in a `torch.save` stream of one contiguous tensor. Raises ValueError
    for anything else.
    """
    archive = zipfile.ZipFile(file)
    root = archive.namelist()[0].split("/")[0]
    described = archive.getinfo(f"{root}/data.pkl")
    file.seek(_entry_start(file, described))
    first, size, stride = _TensorUnpickler(io.BytesIO(file.read(described.file_size))).load()
    if tuple(size) != sizes or tuple(stride) != torch.empty(sizes, device="meta").stride():
        raise ValueError(
            f"size {tuple(size)} and stride {tuple(stride)} where a contiguous {sizes} is expected"
        )
    entry = archive.getinfo(f"{root}/data/0")
    first *= dtype.itemsize
    if (
        entry.compress_type != zipfile.ZIP_STORED
        or entry.file_size < first + math.prod(sizes) * dtype.itemsize
    ):
        raise ValueError(
            f"{entry.file_size} bytes, compression {entry.compress_type}, for {sizes} of {dtype}"
        )
    return _entry_start(file, entry) + first


def _entry_start(file: io.RawIOBase, entry: zipfile.ZipInfo) -> int:
    """First byte of an entry's data. Read past the archive's checksums: torch may be told to leave
    them out.
    """
    file.seek(entry.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    return entry.header_offset + 30 + name_length + extra_length
