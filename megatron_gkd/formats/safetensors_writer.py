"""Writing a Hugging Face folder whose files' headers are known: every tensor goes to its bytes in a
file that has its final size from the start.

Used by `megatron_to_hf` and `merge_lora`. Several processes write into one file; nothing is
gathered in memory.
"""

import hashlib
import os
from pathlib import Path

from megatron_gkd.formats.job import Job, content_of, run_job
from megatron_gkd.formats.manifest import (
    Manifest,
    copy_extra_files,
    describe_file,
    describe_tensors,
    total_bytes,
)
from megatron_gkd.formats.safetensors_file import write_all, write_header
from megatron_gkd.formats.safetensors_folder import INDEX, SafetensorsFolder
from megatron_gkd.formats.sources import FolderSource
from megatron_gkd.formats.stored_tensor import (
    SHARD_BYTES,
    Shard,
    StoredTensor,
    memory,
    plan_shards,
    row_blocks,
)
from megatron_gkd.formats.workers import Report


def write_hf_folder(
    source: FolderSource, output: Path, num_workers: int, shard_bytes: int = SHARD_BYTES
) -> str:
    """Write the folder, return a line for the user. Raises ValueError as `run_job`, or naming a
    damaged tensor.
    """
    output = output.absolute()
    files = source.files(content_of(output))
    shards = plan_shards(files, shard_bytes)
    job = Job(
        output,
        identity=source.identity(shard_bytes),
        shard_bytes=[shard.num_bytes for shard in shards],
        other_bytes=total_bytes(source.extra_files_folder, source.extra_files)
        + sum(map(len, source.headers.values())),
        sources=source.folders_read,
    )

    def prepare() -> None:
        for name, header in source.headers.items():
            write_header(
                job.content / name, header, sum(tensor.num_bytes for tensor in files[name].values())
            )

    def work(number: int, report: Report) -> dict:
        return write_shard(source, shards[number], files[shards[number].file], report)

    def finish(results: list[dict]) -> None:
        tensors = {name: tensor for found in files.values() for name, tensor in found.items()}
        hashes = {name: sha256 for result in results for name, sha256 in result["sha256"].items()}
        manifest = Manifest(source.made_by, tensors=describe_tensors(tensors, hashes))
        copy_extra_files(
            source.extra_files_folder, source.extra_files, job.content, manifest, source.expected
        )
        if source.index is not None:
            (job.content / INDEX).write_bytes(source.index)
            manifest.files[INDEX] = describe_file(job.content / INDEX)
        # Raises where a file has not the size that its header asks for.
        SafetensorsFolder(job.content)
        manifest.write(job.content)

    if not run_job(job, prepare, work, finish, num_workers):
        return f"{output} was complete already"
    return f"{len(source.tensors)} tensors in {output}"


def write_shard(
    source: FolderSource, shard: Shard, targets: dict[str, StoredTensor], report: Report
) -> dict:
    """Write the shard's tensors into their file; they are on the disk when this returns. Returns
    their SHA-256.
    """
    hashes = {}
    descriptor = os.open(targets[shard.names[0]].path, os.O_WRONLY)
    try:
        for name in shard.names:
            hashes[name] = _write_tensor(source, name, targets[name], descriptor, report)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"sha256": hashes}


def _write_tensor(
    source: FolderSource, name: str, target: StoredTensor, descriptor: int, report: Report
) -> str:
    read, written, offset = hashlib.sha256(), hashlib.sha256(), target.start
    for rows in row_blocks(target):
        block = source.tensors[name][(rows,)]
        read.update(memory(block))
        if source.change:
            block = source.change(name, rows, block).contiguous()
            written.update(memory(block))
        write_all(descriptor, memory(block), offset)
        offset += block.nbytes
        report(block.nbytes)
    if source.expected:
        source.expected.check_tensor(name, read.hexdigest(), source.extra_files_folder)
    return (written if source.change else read).hexdigest()
