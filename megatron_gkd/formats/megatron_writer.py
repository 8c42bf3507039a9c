"""Writing a Megatron checkpoint from a Hugging Face folder, as a stream of shards.

OUTPUT/release is megatron-core's distributed checkpoint (torch_dist), loadable at any parallel
layout; around it stands every other file of the folder, so that training reads OUTPUT as it would
read the folder, and `megatron_to_hf` gives the folder back byte for byte. docs/formats.md describes
both sides.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_gkd.formats.job import Job, file_states, run_job, sync
from megatron_gkd.formats.manifest import (
    Manifest,
    copy_extra_files,
    describe_file,
    describe_tensors,
    list_extra_files,
    read_manifest,
    total_bytes,
)
from megatron_gkd.formats.megatron_folder import FROZEN
from megatron_gkd.formats.safetensors_folder import INDEX, SafetensorsFolder, stored_tensors
from megatron_gkd.formats.sources import open_hf_folder
from megatron_gkd.formats.stored_tensor import SHARD_BYTES, Shard, memory, plan_shards, row_blocks
from megatron_gkd.formats.torch_dist import TRACKER, TorchDist
from megatron_gkd.formats.torch_dist_writer import HEADERS, RELEASE, write_chunk, write_description
from megatron_gkd.formats.weight_map import (
    COLUMNS,
    ROWS,
    checkpoint_slices,
    checkpoint_tensors,
    stored_entries,
)
from megatron_gkd.formats.workers import Report
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.tensor_slice import SlicePair, TensorSlice, block

_RESERVED = (RELEASE, HEADERS, TRACKER)
_PADDING = "__padding_0.distcp"


@dataclass(frozen=True)
class CheckpointSource:
    """An opened, checked Hugging Face folder, and how it is cut into the chunks of a checkpoint."""

    folder: SafetensorsFolder
    model_args: ModelArgs
    tp_size: int
    manifest: Manifest | None

    def slices(self, name: str) -> Iterator[SlicePair]:
        """One tensor in the order of its rows, in blocks that become a chunk each, or one for each
        of `columns_of_ranks`.
        """
        tensor = self.folder.slice(name)
        pairs = checkpoint_slices(self.model_args).get(name)
        if pairs is None:
            for rows in row_blocks(tensor):
                yield SlicePair(TensorSlice(name, (rows,)), TensorSlice(FROZEN + name, (rows,)))
            return
        edges = {edge for pair in pairs for edge in self._row_edges(pair)}
        for rows in row_blocks(tensor, tuple(edges)):
            yield next(part for pair in pairs if (part := pair.within(rows)) is not None)

    def _row_edges(self, pair: SlicePair) -> set[int]:
        """Rows of the Hugging Face tensor where another pair, or another rank's share, begins."""
        start, stop = pair.hf.rows.start, pair.hf.rows.stop
        entry, edges = stored_entries(self.model_args)[pair.mcore.name], {start, stop}
        if entry.cut == ROWS:
            num_rows = entry.padded_rows(self.model_args, self.tp_size)
            for edge in range(0, num_rows, num_rows // self.tp_size):
                edges.add(min(max(edge - pair.mcore.rows.start + start, start), stop))
        return edges

    def columns_of_ranks(self, key: str) -> list[slice]:
        """Each rank's columns of a matrix whose columns tensor parallelism cuts; else none."""
        entry = stored_entries(self.model_args).get(key)
        if entry is None or entry.cut != COLUMNS or entry.columns is None or self.tp_size == 1:
            return []
        return [block(entry.columns, rank, self.tp_size) for rank in range(self.tp_size)]

    def padding(self) -> Iterator[TensorSlice]:
        """The rows that the vocabulary is padded with."""
        for key, entry in stored_entries(self.model_args).items():
            num_rows = entry.padded_rows(self.model_args, self.tp_size)
            if num_rows > entry.num_rows:
                yield TensorSlice(key, (slice(entry.num_rows, num_rows),))

    def checkpoint_sizes(self) -> dict[str, tuple[int, ...]]:
        decoder = checkpoint_slices(self.model_args)
        return checkpoint_tensors(self.model_args, self.tp_size) | {
            FROZEN + name: tensor.size
            for name, tensor in self.folder.tensors.items()
            if name not in decoder
        }

    def checkpoint_dtypes(self) -> dict[str, torch.dtype]:
        """Key -> dtype. Raises ValueError where tensors that are stacked under one key are of
        several.
        """
        decoder = checkpoint_slices(self.model_args)
        dtypes = {
            FROZEN + name: tensor.dtype
            for name, tensor in self.folder.tensors.items()
            if name not in decoder
        }
        first: dict[str, str] = {}
        for name, pairs in decoder.items():
            key, tensor = pairs[0].mcore.name, self.folder.slice(name)
            other = first.setdefault(key, name)
            if dtypes.setdefault(key, tensor.dtype) != tensor.dtype:
                raise ValueError(
                    f"{tensor.path}: tensor {name} is {tensor.dtype_name} and {other} is "
                    f"{self.folder.slice(other).dtype_name}; a checkpoint stacks them, so they "
                    "must be of one type"
                )
        return dtypes


def open_checkpoint_source(hf_model: Path, tp_size: int) -> CheckpointSource:
    """Raises FileNotFoundError or ValueError: the folder and the tensor or file that cannot be
    converted.
    """
    model_args, folder = open_hf_folder(hf_model)
    manifest = read_manifest(hf_model)
    if manifest:
        manifest.check(hf_model, folder.tensors)
    return CheckpointSource(folder, model_args, tp_size, manifest)


def write_megatron_folder(
    source: CheckpointSource, output: str, num_workers: int, shard_bytes: int = SHARD_BYTES
) -> str:
    """Write the checkpoint, return a line for the user. Raises ValueError as `run_job`, or naming a
    tensor or file that a checkpoint cannot hold or that is damaged.
    """
    folder, hf_model = source.folder, source.folder.folder
    dtypes = source.checkpoint_dtypes()
    extra_files = list_extra_files(hf_model, besides=folder.headers)
    taken = sorted({name.split("/")[0] for name in extra_files} & set(_RESERVED))
    if taken:
        raise ValueError(
            f"{hf_model / taken[0]}: a checkpoint needs this name for itself; rename the file"
        )
    files = {
        name: stored_tensors(hf_model / name, header) for name, header in folder.headers.items()
    }
    shards = plan_shards(files, shard_bytes)
    identity = {
        "tool": "hf_to_megatron 2",
        "source": str(hf_model.absolute()),
        "files": file_states(hf_model, [*folder.headers, *extra_files]),
        "tp_size": source.tp_size,
        "unit_bytes": shard_bytes,
    }
    job = Job(
        Path(output).absolute(),
        identity=identity,
        shard_bytes=[shard.num_bytes for shard in shards],
        other_bytes=total_bytes(hf_model, extra_files),
        sources=[hf_model],
    )
    release, headers = job.content / RELEASE, job.content / HEADERS

    def prepare() -> None:
        release.mkdir(exist_ok=True)
        headers.mkdir(exist_ok=True)

    def work(number: int, report: Report) -> dict:
        return write_shard(source, shards[number], release / _chunk_file(number), report)

    def finish(results: list[dict]) -> None:
        hashes = {name: sha256 for result in results for name, sha256 in result["sha256"].items()}
        manifest = Manifest("hf_to_megatron", tensors=describe_tensors(folder.tensors, hashes))
        copy_extra_files(hf_model, extra_files, job.content, manifest, source.manifest)
        for name, header in folder.headers.items():
            (headers / f"{name}.header").write_bytes(header)
        if (hf_model / INDEX).is_file():
            shutil.copyfile(hf_model / INDEX, headers / INDEX)
        for path in sorted(headers.iterdir()):
            manifest.files[f"{HEADERS}/{path.name}"] = describe_file(path)
        records = {_chunk_file(n): result["chunks"] for n, result in enumerate(results)}
        records[_PADDING] = _write_padding(source, dtypes, release / _PADDING)
        write_description(release, source.checkpoint_sizes(), dtypes, records, source.model_args)
        TorchDist(release)  # raises where a file is shorter than what was written into it
        manifest.write(job.content)

    if not run_job(job, prepare, work, finish, num_workers):
        return f"{job.output} was complete already"
    return f"{len(folder.tensors)} tensors in {job.output}; training reads it as --model {output}"


def _chunk_file(shard_number: int) -> str:
    return f"__{shard_number}_0.distcp"


def write_shard(source: CheckpointSource, shard: Shard, path: Path, report: Report) -> dict:
    """Write the shard's tensors into a .distcp file; it is on the disk when this returns. Returns
    their SHA-256 and the chunks' records.
    """
    # SHA-256 is what guards the bytes; the archive's CRC costs as much.
    torch.serialization.set_crc32_options(False)
    hashes: dict[str, str] = {}
    chunks: list[list] = []
    with open(path, "wb") as file:
        for name in shard.names:
            digest, tensor = hashlib.sha256(), source.folder.slice(name)
            for pair in source.slices(name):
                values = tensor[pair.hf.slices]
                digest.update(memory(values))
                columns_of_ranks = source.columns_of_ranks(pair.mcore.name)
                for columns in columns_of_ranks:
                    place = pair.mcore.with_columns(columns)
                    chunks.append(write_chunk(file, place, values[:, columns].clone()))
                if not columns_of_ranks:
                    chunks.append(write_chunk(file, pair.mcore, values))
                report(values.nbytes)
            hashes[name] = digest.hexdigest()
            if source.manifest:
                source.manifest.check_tensor(name, hashes[name], tensor.path)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)  # the file's name
    return {"sha256": hashes, "chunks": chunks}


def _write_padding(
    source: CheckpointSource, dtypes: dict[str, torch.dtype], path: Path
) -> list[list]:
    hidden_size = source.model_args.hidden_size
    with open(path, "wb") as file:
        return [
            write_chunk(
                file, rows, torch.zeros(rows.num_rows, hidden_size, dtype=dtypes[rows.name])
            )
            for rows in source.padding()
        ]
