"""Model folder -> this rank's parameters, read directly: each rank reads only the slices it owns.

A folder is Hugging Face's (folder.py) or a Megatron checkpoint (megatron_folder.py), written at any
parallel layout. `pieces` pairs views of the local parameters with slices of the Hugging Face
tensors, as the table (table.py) says.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from megatron_gkd.formats.megatron_folder import MegatronFolder
from megatron_gkd.formats.safetensors_folder import SafetensorsFolder, check_tensors
from megatron_gkd.formats.torch_dist import find_checkpoint
from megatron_gkd.formats.weight_map import COLUMNS, ROWS, Entry, table
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.qkv_layout import block


@dataclass(frozen=True)
class Piece:
    """`target` (a view of a local parameter) is `tensor name`[index]."""

    target: Tensor
    name: str
    index: tuple[slice, ...]


def pieces(model, model_args: ModelArgs, parallel) -> Iterator[Piece]:
    """Every frozen parameter of this stage, as views paired with slices of the folder's tensors."""
    on_this_stage = {
        "embedding.": parallel.is_first_stage,
        "decoder.": parallel.is_last_stage,
        "output_layer.": parallel.is_last_stage,
    }
    for entry in table(model_args):
        if entry.stacked:
            for layer in model.decoder.layers:
                yield from _layer_pieces(layer, entry, model_args, parallel)
        elif on_this_stage[entry.parameter.split(".")[0] + "."]:
            yield from _matrix_pieces(
                attrgetter(entry.parameter)(model).data, entry, (), model_args, parallel
            )


def _layer_pieces(layer, entry: Entry, model_args: ModelArgs, parallel) -> Iterator[Piece]:
    parameter, number = attrgetter(entry.parameter)(layer).data, layer.layer_number - 1
    if len(entry.stacked) == 1:
        yield from _matrix_pieces(parameter, entry, (number,), model_args, parallel)
    else:
        for slot, expert in enumerate(layer.mlp.local_expert_indices):
            yield from _matrix_pieces(
                parameter[slot], entry, (number, expert), model_args, parallel
            )


def _matrix_pieces(
    parameter: Tensor, entry: Entry, index: tuple, model_args: ModelArgs, parallel
) -> Iterator[Piece]:
    """One local matrix (or vector): this rank's rows of each part, or all rows and its columns."""
    rows = model_args.padded_vocab_size(parallel.tp_size) if entry.is_padded else entry.num_rows
    owned = block(rows, parallel.tp_rank, parallel.tp_size) if entry.cut == ROWS else slice(0, rows)
    columns = (
        block(entry.columns, parallel.tp_rank, parallel.tp_size)
        if entry.cut == COLUMNS
        else slice(None)
    )
    if entry.is_padded:
        parameter[
            max(entry.num_rows - owned.start, 0) :
        ].zero_()  # padding: zero here, masked in the loss and the sampler
    for part in entry.parts:
        first = max(part.offset, owned.start)
        last = min(part.offset + part.stop - part.start, owned.stop)
        if first < last:
            of_part = slice(part.start + first - part.offset, part.start + last - part.offset)
            target = parameter[first - owned.start : last - owned.start]
            name = part.name.format(**entry.names(index))
            yield Piece(target, name, (of_part,) if entry.columns is None else (of_part, columns))


def open_folder(folder: str | Path, model_args: ModelArgs) -> SafetensorsFolder | MegatronFolder:
    """The tensors of a model folder of either kind, checked against the sizes of its config.json.
    """
    checkpoint = find_checkpoint(folder)
    if checkpoint:
        return MegatronFolder(checkpoint, model_args)
    tensors = SafetensorsFolder(folder)
    check_tensors(tensors, model_args)
    return tensors


def load_weights(model, model_args: ModelArgs, parallel, folder: str | Path) -> int:
    """Fill this stage's parameters from the folder's tensors, cast to their dtype. Returns the
    bytes it read.

    Raises FileNotFoundError or ValueError, the same on every rank, naming the file or tensor that
    is missing, unexpected or misshapen. No collectives. On a terminal rank 0 shows a bar.
    """
    tensors = open_folder(folder, model_args)
    own, num_bytes = list(pieces(model, model_args, parallel)), 0
    total, hidden = sum(piece.target.numel() for piece in own), None if parallel.rank == 0 else True
    with tqdm(
        desc="Weights of this rank",
        total=total,
        unit=" parameters",
        unit_scale=True,
        disable=hidden,
        leave=False,
    ) as bar:
        for piece in own:
            values = tensors.slice(piece.name)[piece.index]
            num_bytes += values.nbytes
            piece.target.copy_(values)
            bar.update(piece.target.numel())
    return num_bytes
