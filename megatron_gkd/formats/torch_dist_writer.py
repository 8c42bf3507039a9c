"""Writing megatron-core's distributed checkpoints (torch_dist): chunks into .distcp files, then
what describes them.

As torch.distributed.checkpoint writes it: a chunk is a `torch.save` stream. Beside the tensors
stand the `_extra_state` objects that a model built with Transformer Engine asks for; without fp8
they are empty and all share one stream.
"""

import io
import json
import pickle
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_gkd.formats.block_digests import block_digests, write_digests
from megatron_gkd.formats.torch_dist import CONFIG, METADATA, TRACKER
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.tensor_slice import TensorSlice

RELEASE = "release"  # Megatron-LM's name for the iteration folder of a converted model
HEADERS = "huggingface"  # beside it: the index and the headers of the folder's safetensors files
EXTRA_STATE_FILE = "__extra_state_0.distcp"


def write_chunk(file: BinaryIO, place: TensorSlice, values: Tensor) -> list:
    """Append `values`, rows (and columns) of one matrix, as the chunk at `place` in the checkpoint.
    Returns its record [key, offsets, sizes, first byte, length, digests] for `write_description`.
    """
    offsets = [part if isinstance(part, int) else part.start for part in place.index]
    sizes = [1] * len(place.matrix) + list(values.shape)
    start = file.tell()
    torch.save(values.reshape(sizes), file)
    offsets = (offsets + [0] * len(sizes))[: len(sizes)]  # on every axis; a scalar has none
    digests = block_digests(values)
    return [place.name, offsets, sizes, start, file.tell() - start, digests]


def write_description(
    folder: Path,
    sizes: dict[str, tuple[int, ...]],
    dtypes: dict[str, torch.dtype],
    records: dict[str, list[list]],
    model_args: ModelArgs,
) -> None:
    """The files that make a folder of chunks a checkpoint. `records`: .distcp file -> what
    `write_chunk` returned.
    """
    tensors = {
        key: TensorStorageMetadata(TensorProperties(dtype=dtypes[key]), torch.Size(size), [])
        for key, size in sizes.items()
    }
    # pickle abbreviates what is the same object: with one text a name the file does not depend on
    # whether the records come from this process or from the journal of an earlier one
    names = {key: key for key in tensors}
    storage = {}
    digests: dict[str, dict[int, str]] = {file: {} for file in records}
    for file, chunks in records.items():
        for key, offsets, chunk_sizes, start, length, of_chunk in chunks:
            number = len(tensors[key].chunks)
            tensors[key].chunks.append(
                ChunkStorageMetadata(torch.Size(offsets), torch.Size(chunk_sizes))
            )
            storage[MetadataIndex(names[key], offsets, number)] = _StorageInfo(file, start, length)
            digests[file][start] = of_chunk
    described = tensors | _write_extra_states(folder, model_args, storage)
    with open(folder / METADATA, "wb") as stream:
        pickle.dump(Metadata(described, planner_data=None, storage_data=storage), stream)
    write_digests(folder, METADATA, digests)
    content = {"singleton_local_shards": False, "non_homogeneous_layers": False}
    torch.save(
        {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": content},
        folder / "common.pt",
    )
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / CONFIG).write_text(
        json.dumps(config | {"common_backend": "torch", "common_backend_version": 1})
    )
    (folder.parent / TRACKER).write_text(folder.name)


def _write_extra_states(
    folder: Path, model_args: ModelArgs, storage: dict
) -> dict[str, BytesStorageMetadata]:
    stream = io.BytesIO()
    torch.save([None], stream)
    (folder / EXTRA_STATE_FILE).write_bytes(stream.getvalue())
    keys = list(_extra_state_keys(model_args))
    for key in keys:
        storage[MetadataIndex(key)] = _StorageInfo(EXTRA_STATE_FILE, 0, len(stream.getvalue()))
    return {key: BytesStorageMetadata() for key in keys}


def _extra_state_keys(model_args: ModelArgs) -> Iterable[str]:
    """megatron-core names an object after its place in the stack: KEY/shard_PLACE_SIZE."""
    yield "decoder.final_layernorm._extra_state/shard_0_1"
    attention = ("linear_qkv", "linear_proj", "q_layernorm", "k_layernorm")
    modules: dict[str, tuple[int, ...]] = {
        f"self_attention.{name}": (model_args.num_layers,) for name in attention
    }
    modules["pre_mlp_layernorm"] = (model_args.num_layers,)
    modules |= {
        f"mlp.experts.experts.linear_fc{n}": (model_args.num_layers, model_args.num_experts)
        for n in (1, 2)
    }
    for module, stacked in modules.items():
        for place in product(*map(range, stacked)):
            where = f"{'.'.join(map(str, place))}_{'.'.join(map(str, stacked))}"
            yield f"decoder.layers.{module}._extra_state/shard_{where}"
