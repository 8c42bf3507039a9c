"""A Megatron checkpoint read as if it were a Hugging Face folder: any rows and columns of a tensor,
by its name there.

The decoder is under megatron-core's keys, translated by the table. Tensors that are not trained
(towers, talker, code2wav) travel in the same checkpoint under their own names behind
`huggingface.`, where megatron-core does not look.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_gkd.formats.safetensors_folder import DTYPE_NAMES
from megatron_gkd.formats.torch_dist import METADATA, TorchDist
from megatron_gkd.formats.weight_map import decoder_tensors, places, stored_entries
from megatron_gkd.model.args import ModelArgs

CARRIED = "huggingface."  # prefix of keys that are no part of the decoder
_OPTIMIZER = re.compile(
    r"(chained_\d+\.)?optimizer\."
)  # its state beside the model, which is passed over
DECODER_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Span:
    """Rows `start:stop` of a Hugging Face tensor are rows from `offset` on of matrix `index` of the
    stack `key`.
    """

    key: str
    index: tuple[int, ...]
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor in the places of a checkpoint that hold its rows, not read: as folder.StoredTensor.
    """

    checkpoint: TorchDist
    spans: tuple[Span, ...]
    size: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.checkpoint.dtypes[self.spans[0].key]

    def get_shape(self) -> list[int]:
        return list(self.size)

    def get_dtype(self) -> str:
        return DTYPE_NAMES[self.dtype]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        wanted, found = range(*index[0].indices(self.size[0] if self.size else 1)), []
        for span in self.spans:
            first, last = max(wanted.start, span.start), min(wanted.stop, span.stop)
            if first < last:
                rows = slice(first + span.offset - span.start, last + span.offset - span.start)
                found.append(self.checkpoint.read(span.key, span.index, rows, *index[1:]))
        block = found[0] if len(found) == 1 else torch.cat(found)
        return (
            block
            if len(index) > 1
            else block.reshape([len(wanted), *self.size[1:]] if self.size else [])
        )


class MegatronFolder:
    """The tensors of a torch_dist checkpoint under their Hugging Face names."""

    def __init__(self, checkpoint: str | Path, model_args: ModelArgs):
        """Raises FileNotFoundError or ValueError naming the file or tensor that is missing,
        misshapen or damaged.
        """
        self.checkpoint = TorchDist(checkpoint)
        self.folder = self.checkpoint.folder
        self.prefix = self._find_prefix()
        self._check(model_args)
        self.tensors: dict[str, CheckpointTensor] = {}
        sizes = decoder_tensors(model_args)
        for name, rows in places(model_args).items():
            spans = tuple(
                Span(self.prefix + p.entry.key, p.index, p.start, p.stop, p.offset) for p in rows
            )
            self.tensors[name] = CheckpointTensor(self.checkpoint, spans, sizes[name])
        for key, size in self.checkpoint.sizes.items():
            if key.startswith(CARRIED):
                span = Span(key, (), 0, size[0] if size else 1, 0)
                self.tensors[key[len(CARRIED) :]] = CheckpointTensor(self.checkpoint, (span,), size)

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
            if not key.startswith(CARRIED) and not _OPTIMIZER.match(key)
        }
        for entry in stored_entries(model_args):
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
                    f"{self.folder / METADATA}: tensor {key} is {dtype}, expected one of {DECODER_DTYPES}"
                )
        if sizes:
            more = f" and {len(sizes) - 1} more" if len(sizes) > 1 else ""
            raise ValueError(
                f"{self.folder / METADATA}: unexpected tensor {next(iter(sizes))}{more}"
            )
