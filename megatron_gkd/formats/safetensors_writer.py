"""Writing a Hugging Face folder whose files' headers are known: tensors go to their places in files
of final size.

Used by `megatron_to_hf` and `merge_lora`. Several processes write into one file; nothing is
gathered in memory.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from megatron_gkd.formats.byte_range import memory
from megatron_gkd.formats.extra_files import copy_travellers, total_bytes
from megatron_gkd.formats.job import Job, content_of, file_states, run_job
from megatron_gkd.formats.manifest import Manifest, describe_file
from megatron_gkd.formats.safetensors_folder import (
    INDEX,
    SafetensorsFolder,
    StoredTensor,
    stored_tensors,
)
from megatron_gkd.formats.shards import UNIT_BYTES, Unit, plan_units, row_blocks
from megatron_gkd.model.args import ModelArgs

Change = Callable[
    [str, slice, Tensor], Tensor
]  # (name, rows, their values) -> what is written, of the same dtype


@dataclass(frozen=True)
class HfFolderPlan:
    """A folder to be written. `tensors`: name -> where it is read; `expected`: hashes that what is
    read must have.
    """

    made_by: str
    source: Path
    model_args: ModelArgs
    headers: dict[str, bytes]  # file -> its safetensors header
    index: bytes | None
    tensors: dict[str, object]  # folder.StoredTensor or megatron_folder.CheckpointTensor
    travellers_folder: Path
    travellers: list[str]
    expected: Manifest | None
    states: dict  # sizes and times of the files read
    change: Change | None = None
    change_identity: list = field(default_factory=list)  # all that the change depends on
    change_folders: list[Path] = field(default_factory=list)  # that the change reads

    @property
    def folders_read(self) -> list[Path]:
        return [self.source, self.travellers_folder, *self.change_folders]

    def files(self, folder: Path) -> dict[str, dict[str, StoredTensor]]:
        return {
            name: stored_tensors(folder / name, header) for name, header in self.headers.items()
        }

    def check(self) -> None:
        """Raise ValueError for a tensor that the source has not, has in another dtype or shape, or
        has too many.
        """
        source = self.source
        wanted = {
            name: tensor
            for tensors in self.files(source).values()
            for name, tensor in tensors.items()
        }
        for name, tensor in wanted.items():
            if name not in self.tensors:
                raise ValueError(f"{source}: misses tensor {name}")
            found = self.tensors[name]
            if (found.get_dtype(), found.get_shape()) != (tensor.dtype_name, list(tensor.size)):
                raise ValueError(
                    f"{source}: tensor {name} is {found.get_dtype()} {found.get_shape()}, "
                    f"the Hugging Face folder has {tensor.dtype_name} {list(tensor.size)}"
                )
        extra = [name for name in self.tensors if name not in wanted]
        if extra:
            raise ValueError(
                f"{source}: tensor {extra[0]} and {len(extra) - 1} more have no place in the folder"
            )

    def identity(self, unit_bytes: int) -> dict:
        return {
            "tool": f"{self.made_by} 1",
            "source": str(self.source.absolute()),
            "files": self.states | file_states(self.travellers_folder, self.travellers),
            "change": self.change_identity,
            "unit_bytes": unit_bytes,
        }


def write_hf_folder(
    plan: HfFolderPlan, output: Path, num_workers: int, unit_bytes: int = UNIT_BYTES
) -> str:
    """Write the folder, return a line for the user. Raises ValueError as `run_job`, or naming a
    damaged tensor.
    """
    output = output.absolute()
    files = plan.files(content_of(output))
    units = plan_units(files, unit_bytes)
    job = Job(
        output,
        identity=plan.identity(unit_bytes),
        unit_bytes=[unit.num_bytes for unit in units],
        other_bytes=total_bytes(plan.travellers_folder, plan.travellers)
        + sum(map(len, plan.headers.values())),
        sources=plan.folders_read,
    )

    def prepare() -> None:
        for name, header in plan.headers.items():
            write_header(
                job.content / name, header, sum(tensor.num_bytes for tensor in files[name].values())
            )

    def work(number: int, report) -> dict:
        return write_unit(plan, units[number], files[units[number].file], report)

    def finish(results: list[dict]) -> None:
        manifest = Manifest(plan.made_by, tensors=describe_tensors(files, results))
        copy_travellers(
            plan.travellers_folder, plan.travellers, job.content, manifest, plan.expected
        )
        if plan.index is not None:
            (job.content / INDEX).write_bytes(plan.index)
            manifest.files[INDEX] = describe_file(job.content / INDEX)
        SafetensorsFolder(
            job.content
        )  # raises where a file has not the size that its header asks for
        manifest.write(job.content)

    if not run_job(job, prepare, work, finish, num_workers):
        return f"{output} was complete already"
    return f"{len(plan.tensors)} tensors in {output}"


def write_header(path: Path, header: bytes, num_bytes: int) -> None:
    """Make (or keep) a safetensors file of final size: its header, and room for `num_bytes` of
    tensors.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(descriptor, 8 + len(header) + num_bytes)
        write_all(descriptor, len(header).to_bytes(8, "little") + header, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_unit(plan: HfFolderPlan, unit: Unit, targets: dict[str, StoredTensor], report) -> dict:
    """The unit's tensors at their places, on the disk when this returns. -> their SHA-256."""
    hashes = {}
    descriptor = os.open(targets[unit.names[0]].path, os.O_WRONLY)
    try:
        for name in unit.names:
            hashes[name] = _write_tensor(plan, name, targets[name], descriptor, report)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"sha256": hashes}


def _write_tensor(
    plan: HfFolderPlan, name: str, target: StoredTensor, descriptor: int, report
) -> str:
    source, read, written, offset = (
        plan.tensors[name],
        hashlib.sha256(),
        hashlib.sha256(),
        target.start,
    )
    for rows in row_blocks(target):
        block = source[(rows,)]
        read.update(memory(block))
        if plan.change:
            block = plan.change(name, rows, block).contiguous()
            written.update(memory(block))
        write_all(descriptor, memory(block), offset)
        offset += block.nbytes
        report(block.nbytes)
    if plan.expected:
        plan.expected.check_tensor(name, read.hexdigest(), plan.travellers_folder)
    return (written if plan.change else read).hexdigest()


def write_all(descriptor: int, data, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def describe_tensors(
    files: dict[str, dict[str, StoredTensor]], results: list[dict]
) -> dict[str, dict]:
    """The manifest's part on tensors, from the units' hashes."""
    tensors = {name: tensor for found in files.values() for name, tensor in found.items()}
    hashes = {name: sha256 for result in results for name, sha256 in result["sha256"].items()}
    return {
        name: {
            "dtype": t.dtype_name,
            "shape": list(t.size),
            "bytes": t.num_bytes,
            "sha256": hashes[name],
        }
        for name, t in tensors.items()
    }
