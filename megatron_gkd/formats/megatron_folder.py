"""A Megatron checkpoint read as if it were a Hugging Face folder: any rows and columns of a tensor,
by its name there.

The decoder is under megatron-core's keys, translated by the weight map. Tensors that are not
trained (towers, talker, code2wav) are in the same checkpoint under their own names behind
`huggingface.`, where megatron-core does not look.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_gkd.formats.config_sizes import (
    check_decoder_sizes,
    check_tower_sizes,
    checkpoint_places,
)
from megatron_gkd.formats.stored_tensor import DECODER_DTYPES, SAFETENSORS_NAMES, as_rows
from megatron_gkd.formats.torch_dist import METADATA, TorchDist
from megatron_gkd.formats.weight_map import checkpoint_slices, decoder_tensors, stored_entries
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.tensor_slice import SlicePair, TensorSlice

FROZEN = "huggingface."  # prefix of the keys of weights that are not trained
# The optimizer's state beside the model, which is not read.
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")


@dataclass(frozen=True)
class CheckpointTensor:
    """A Hugging Face tensor in the slices of a checkpoint that hold its rows: a `LazyTensor`."""

    checkpoint: TorchDist
    pairs: tuple[SlicePair, ...]
    size: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.checkpoint.dtypes[self.pairs[0].mcore.name]

    def get_shape(self) -> list[int]:
        return list(self.size)

    def get_dtype(self) -> str:
        return SAFETENSORS_NAMES[self.dtype]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        start, stop, _ = index[0].indices(self.size[0] if self.size else 1)
        parts = [pair.within(slice(start, stop)) for pair in self.pairs]
        stored = [part.mcore for part in parts if part is not None]
        if len(index) > 1:
            stored = [rows.with_columns(index[1]) for rows in stored]
        found = [self.checkpoint.read(wanted) for wanted in stored]
        matrix = found[0] if len(found) == 1 else torch.cat(found)
        return matrix if len(index) > 1 else as_rows(matrix, self.size)


class MegatronFolder:
    """The tensors of a torch_dist checkpoint under their Hugging Face names."""

    def __init__(self, checkpoint: str | Path, model_args: ModelArgs, *, compared: bool = False):
        """compared: as for `TorchDist`. Raises FileNotFoundError or ValueError naming the file or
        tensor that is missing, misshapen or damaged.
        """
        self.checkpoint = TorchDist(checkpoint, compared=compared)
        self.folder = self.checkpoint.folder
        self.prefix = self._find_prefix()
        self._check(model_args)
        self.tensors: dict[str, CheckpointTensor] = {}
        sizes = decoder_tensors(model_args)
        for name, pairs in checkpoint_slices(model_args).items():
            prefixed = tuple(
                SlicePair(pair.hf, TensorSlice(self.prefix + pair.mcore.name, pair.mcore.index))
                for pair in pairs
            )
            self.tensors[name] = CheckpointTensor(self.checkpoint, prefixed, sizes[name])
        for key, size in self.checkpoint.sizes.items():
            if key.startswith(FROZEN):
                name, rows = key[len(FROZEN) :], (slice(0, size[0] if size else 1),)
                pair = SlicePair(TensorSlice(name, rows), TensorSlice(key, rows))
                self.tensors[name] = CheckpointTensor(self.checkpoint, (pair,), size)
        frozen = {name: tensor.size for name, tensor in self.tensors.items() if name not in sizes}
        check_tower_sizes(model_args, frozen, self._file_of)

    def _file_of(self, name: str) -> Path:
        """That says what tensor `name` is."""
        return self.folder / METADATA

    def slice(self, name: str) -> CheckpointTensor:
        """Tensor `name`, not read: `[index]` reads only those bytes."""
        return self.tensors[name]

    def _find_prefix(self) -> str:
        """What the checkpoint's writer put before megatron-core's names (nothing in Megatron-LM,
        `module.` in NeMo).
        """
        last = "decoder.final_layernorm.weight"
        found = [
            key for key in self.checkpoint.sizes if key.endswith(last) and not _OPTIMIZER.match(key)
        ]
        if not found:
            raise ValueError(
                f"{self.folder / METADATA}: no tensor {last}; not a GPTModel of megatron-core"
            )
        return min(found, key=len)[: -len(last)]

    def _check(self, model_args: ModelArgs) -> None:
        sizes = {
            key: size
            for key, size in self.checkpoint.sizes.items()
            if not key.startswith(FROZEN) and not _OPTIMIZER.match(key)
        }
        places = checkpoint_places(model_args, self.prefix)
        check_decoder_sizes(model_args, sizes, self._file_of, places)
        for entry in stored_entries(model_args).values():
            key, wanted = self.prefix + entry.key, (*entry.stacked, *entry.matrix_size())
            found = sizes.pop(key, None)
            if found is None:
                raise ValueError(f"{self.folder / METADATA}: misses tensor {key}")
            padded = (
                entry.is_padded
                and len(found) == 2
                and found[0] >= wanted[0]
                and found[1:] == wanted[1:]
            )
            if found != wanted and not padded:
                sizes_differ = f"has shape {list(found)}, config.json asks for {list(wanted)}"
                raise ValueError(f"{self.folder / METADATA}: tensor {key} {sizes_differ}")
            dtype = self.checkpoint.dtypes[key]
            if dtype not in DECODER_DTYPES:
                raise ValueError(
                    f"{self.folder / METADATA}: tensor {key} is {dtype}, "
                    f"expected one of {DECODER_DTYPES}"
                )
        if sizes:
            more = f" and {len(sizes) - 1} more" if len(sizes) > 1 else ""
            raise ValueError(
                f"{self.folder / METADATA}: unexpected tensor {next(iter(sizes))}{more}"
            )
