"""`python -m checkpoint_tools.hf_to_megatron --hf_model DIR --output DIR`: Hugging Face folder ->
Megatron checkpoint.

OUTPUT/release is megatron-core's distributed checkpoint (torch_dist), loadable at any parallel
layout; around it stands every other file of the folder, so that training reads OUTPUT as it would
read the folder, and `megatron_to_hf` gives the folder back byte for byte. docs/formats.md describes
both sides.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from checkpoint_tools.command import check_num_workers, num_workers_setting, run_command
from megatron_gkd.config import ParallelConfig, check_layout
from megatron_gkd.flags import setting
from megatron_gkd.formats.byte_range import memory
from megatron_gkd.formats.extra_files import copy_travellers, list_travellers, total_bytes
from megatron_gkd.formats.frozen_weights import check_frozen_weights
from megatron_gkd.formats.job import Job, file_states, run_job, sync
from megatron_gkd.formats.manifest import Manifest, describe_file, read_manifest
from megatron_gkd.formats.megatron_folder import CARRIED
from megatron_gkd.formats.safetensors_folder import (
    INDEX,
    SafetensorsFolder,
    check_tensors,
    stored_tensors,
)
from megatron_gkd.formats.shards import UNIT_BYTES, Unit, plan_units, row_blocks
from megatron_gkd.formats.torch_dist import TRACKER, TorchDist
from megatron_gkd.formats.torch_dist_writer import HEADERS, RELEASE, write_chunk, write_description
from megatron_gkd.formats.weight_map import (
    COLUMNS,
    ROWS,
    Place,
    checkpoint_tensors,
    places,
    stored_entries,
)
from megatron_gkd.model.args import ModelArgs, read_model_args

_RESERVED = (RELEASE, HEADERS, TRACKER)


@dataclass
class HfToMegatronConfig:
    hf_model: str = field(
        metadata={"help": "Hugging Face model folder."}
    )
    output: str = field(metadata={"help": "Folder to write; must not exist or be empty."})
    tensor_model_parallel_size: int = setting(
        1, "Layout of the training to come: pads the vocabulary, cuts the pieces."
    )
    pipeline_model_parallel_size: int = setting(
        1, "Checked against the model; the checkpoint loads at any layout."
    )
    expert_model_parallel_size: int = setting(
        1, "Checked against the model; the checkpoint loads at any layout."
    )
    num_workers: int = num_workers_setting()

    def __post_init__(self):
        check_num_workers(self.num_workers)


@dataclass(frozen=True)
class Box:
    """Rows of a Hugging Face tensor that become one chunk, or one a rank where tensor parallelism
    cuts columns.
    """

    rows: slice
    key: str
    index: tuple[int, ...]
    first_row: int  # in the matrix of the checkpoint
    num_column_cuts: int = 1


@dataclass(frozen=True)
class Source:
    """An opened, checked folder and how it is to be cut."""

    folder: SafetensorsFolder
    model_args: ModelArgs
    tp_size: int
    manifest: Manifest | None

    def boxes(self, name: str) -> Iterator[Box]:
        """The chunks of one tensor, in the order of its rows."""
        tensor, decoder_places = self.folder.slice(name), places(self.model_args).get(name)
        if decoder_places is None:
            for rows in row_blocks(tensor):
                yield Box(rows, CARRIED + name, (), rows.start)
            return
        cuts = {edge: place for place in decoder_places for edge in self._row_cuts(place)}
        for rows in row_blocks(tensor, tuple(cuts)):
            place = next(
                place for place in decoder_places if place.start <= rows.start < place.stop
            )
            first_row = rows.start - place.start + place.offset
            column_cuts = self.tp_size if place.entry.cut == COLUMNS else 1
            yield Box(rows, place.entry.key, place.index, first_row, column_cuts)

    def _row_cuts(self, place: Place) -> set[int]:
        """Rows of the tensor where another place, or another rank's share, begins."""
        edges = {place.start, place.stop}
        if place.entry.cut == ROWS:
            num_rows = self.num_rows(place.entry)
            for edge in range(0, num_rows, num_rows // self.tp_size):
                edges.add(min(max(edge - place.offset + place.start, place.start), place.stop))
        return edges

    def num_rows(self, entry) -> int:
        return (
            self.model_args.padded_vocab_size(self.tp_size) if entry.is_padded else entry.num_rows
        )

    def padding(self) -> Iterator[tuple[str, int, int]]:
        """(key, first row, number of rows) that the vocabulary is padded with."""
        for entry in stored_entries(self.model_args):
            if self.num_rows(entry) > entry.num_rows:
                yield entry.key, entry.num_rows, self.num_rows(entry) - entry.num_rows

    def checkpoint_sizes(self) -> dict[str, tuple[int, ...]]:
        carried = {
            CARRIED + n: t.size
            for n, t in self.folder.tensors.items()
            if n not in places(self.model_args)
        }
        return checkpoint_tensors(self.model_args, self.tp_size) | carried

    def checkpoint_dtypes(self) -> dict[str, torch.dtype]:
        """Key -> dtype. Raises ValueError where tensors that are stacked under one key are of
        several.
        """
        dtypes = {
            CARRIED + n: t.dtype
            for n, t in self.folder.tensors.items()
            if n not in places(self.model_args)
        }
        first: dict[str, str] = {}
        for name, rows in places(self.model_args).items():
            key, tensor = rows[0].entry.key, self.folder.slice(name)
            other = first.setdefault(key, name)
            if dtypes.setdefault(key, tensor.dtype) != tensor.dtype:
                raise ValueError(
                    f"{tensor.path}: tensor {name} is {tensor.dtype_name} and {other} is "
                    f"{self.folder.slice(other).dtype_name}; a checkpoint stacks them, so they must be of one type"
                )
        return dtypes


def open_source(hf_model: Path, tp_size: int) -> Source:
    """Raises FileNotFoundError or ValueError: the folder and the tensor or file that cannot be
    converted.
    """
    model_args = read_model_args(hf_model)
    folder = SafetensorsFolder(hf_model)
    check_tensors(folder, model_args)
    check_frozen_weights(folder, model_args)
    manifest = read_manifest(hf_model)
    if manifest:
        manifest.check(hf_model, folder.tensors)
    return Source(folder, model_args, tp_size, manifest)


def write_unit(source: Source, unit: Unit, path: Path, report) -> dict:
    """The unit's tensors as a .distcp file, on the disk when this returns. -> their SHA-256 and the
    chunks' records.
    """
    torch.serialization.set_crc32_options(
        False
    )  # SHA-256 is what guards the bytes; the archive's CRC costs as much
    hashes, chunks = {}, []
    with open(path, "wb") as file:
        for name in unit.names:
            digest, tensor = hashlib.sha256(), source.folder.slice(name)
            for box in source.boxes(name):
                block = tensor[(box.rows,)]
                digest.update(memory(block))
                chunks += _write_box(file, box, block)
                report(block.nbytes)
            hashes[name] = digest.hexdigest()
            if source.manifest:
                source.manifest.check_tensor(name, hashes[name], tensor.path)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)  # the file's name
    return {"sha256": hashes, "chunks": chunks}


def _write_box(file, box: Box, block: torch.Tensor) -> Iterator[list]:
    width = block.shape[1] // box.num_column_cuts if box.num_column_cuts > 1 else 0
    for cut in range(box.num_column_cuts):
        values = block[:, cut * width : (cut + 1) * width].clone() if width else block
        offsets = (*box.index, *([box.first_row, cut * width] + [0] * block.dim())[: block.dim()])
        yield write_chunk(
            file, box.key, offsets, values.reshape([1] * len(box.index) + list(values.shape))
        )


def convert(config: HfToMegatronConfig, unit_bytes: int = UNIT_BYTES) -> str:
    """The whole conversion. Returns a line for the user; raises as the functions above and
    `run_job`.
    """
    hf_model, output = Path(config.hf_model), Path(config.output).absolute()
    source = open_source(hf_model, config.tensor_model_parallel_size)
    check_layout_of(config, source.model_args)
    dtypes = source.checkpoint_dtypes()
    travellers = list_travellers(hf_model, besides=source.folder.headers)
    taken = sorted({name.split("/")[0] for name in travellers} & set(_RESERVED))
    if taken:
        raise ValueError(
            f"{hf_model / taken[0]}: a checkpoint needs this name for itself; rename the file"
        )
    files = {
        name: stored_tensors(hf_model / name, header)
        for name, header in source.folder.headers.items()
    }
    units = plan_units(files, unit_bytes)
    job = Job(
        output,
        identity=_identity(config, source, travellers, unit_bytes),
        unit_bytes=[unit.num_bytes for unit in units],
        other_bytes=total_bytes(hf_model, travellers),
        sources=[hf_model],
    )

    def prepare() -> None:
        (job.content / RELEASE).mkdir(exist_ok=True)
        (job.content / HEADERS).mkdir(exist_ok=True)

    def work(number: int, report) -> dict:
        return write_unit(
            source, units[number], job.content / RELEASE / f"__{number}_0.distcp", report
        )

    def finish(results: list[dict]) -> None:
        manifest = Manifest(
            made_by="hf_to_megatron", tensors=describe_tensors(source.folder, results)
        )
        copy_travellers(hf_model, travellers, job.content, manifest, source.manifest)
        for name, header in source.folder.headers.items():
            (job.content / HEADERS / f"{name}.header").write_bytes(header)
        if (hf_model / INDEX).is_file():
            shutil.copyfile(hf_model / INDEX, job.content / HEADERS / INDEX)
        for path in sorted((job.content / HEADERS).iterdir()):
            manifest.files[f"{HEADERS}/{path.name}"] = describe_file(path)
        records = {
            f"__{number}_0.distcp": result["chunks"] for number, result in enumerate(results)
        }
        records["__padding_0.distcp"] = _write_padding(
            source, dtypes, job.content / RELEASE / "__padding_0.distcp"
        )
        write_description(
            job.content / RELEASE, source.checkpoint_sizes(), dtypes, records, source.model_args
        )
        TorchDist(
            job.content / RELEASE
        )  # raises where a file is shorter than what was written into it
        manifest.write(job.content)

    if not run_job(job, prepare, work, finish, config.num_workers):
        return f"{output} was complete already"
    return f"{len(source.folder.tensors)} tensors in {output}; training reads it as --model {config.output}"


def check_layout_of(config, model_args: ModelArgs) -> None:
    """Raise ValueError with both numbers when the model does not divide into the layout of these
    flags.
    """
    parallel = ParallelConfig(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
    )
    smallest_stage = math.lcm(config.tensor_model_parallel_size, config.expert_model_parallel_size)
    check_layout(
        smallest_stage * config.pipeline_model_parallel_size,
        parallel,
        num_attention_heads=model_args.num_attention_heads,
        num_key_value_heads=model_args.num_key_value_heads,
        num_experts=model_args.num_experts,
        num_layers=model_args.num_layers,
    )


def describe_tensors(folder: SafetensorsFolder, results: list[dict]) -> dict[str, dict]:
    """The manifest's part on tensors, from the units' hashes."""
    return {
        name: {"dtype": t.dtype_name, "shape": list(t.size), "bytes": t.num_bytes, "sha256": sha256}
        for result in results
        for name, sha256 in result["sha256"].items()
        for t in [folder.slice(name)]
    }


def _identity(
    config: HfToMegatronConfig, source: Source, travellers: list[str], unit_bytes: int
) -> dict:
    hf_model = source.folder.folder
    return {
        "tool": "hf_to_megatron 1",
        "source": str(hf_model.absolute()),
        "files": file_states(hf_model, [*source.folder.headers, *travellers]),
        "tp_size": config.tensor_model_parallel_size,
        "unit_bytes": unit_bytes,
    }


def _write_padding(source: Source, dtypes: dict[str, torch.dtype], path: Path) -> list[list]:
    with open(path, "wb") as file:
        return [
            write_chunk(
                file,
                key,
                (first, 0),
                torch.zeros(num_rows, source.model_args.hidden_size, dtype=dtypes[key]),
            )
            for key, first, num_rows in source.padding()
        ]


if __name__ == "__main__":
    run_command(HfToMegatronConfig, convert, __doc__)
