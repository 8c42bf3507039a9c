"""Model folder -> this rank's parameters, read directly: each rank reads only the slices it holds,
or only its part of those that others hold too (peers.py).

A folder is Hugging Face's (safetensors_folder.py) or a Megatron checkpoint (megatron_folder.py),
written at any parallel layout. `parameter_slices` pairs slices of the local parameters with slices
of the Hugging Face tensors, as the weight map says.
"""

from collections.abc import Iterator
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from megatron_gkd.formats.megatron_folder import MegatronFolder
from megatron_gkd.formats.peers import read_or_end_all, read_with_peers
from megatron_gkd.formats.safetensors_folder import SafetensorsFolder, check_tensors
from megatron_gkd.formats.torch_dist import find_torch_dist
from megatron_gkd.formats.weight_map import COLUMNS, ROWS, Entry, weight_map
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.qkv_layout import fused_rows
from megatron_gkd.model.tensor_slice import ParameterSlice, block, cut_rows
from megatron_gkd.parallel import Parallel

# an entry of the weight map, the matrix in its stack, the parameter, the matrix in the parameter
Matrix = tuple[Entry, tuple[int, ...], Tensor, tuple[int, ...]]


def parameter_slices(
    model: Any, model_args: ModelArgs, parallel: Parallel
) -> Iterator[ParameterSlice]:
    """Every frozen parameter of this stage, slice by slice: this rank's rows of each Hugging Face
    tensor that a matrix is made of, or all rows and this rank's columns.
    """
    for entry, index, parameter, local in _matrices(model, model_args, parallel):
        first = 0
        for own in _own_rows(entry, model_args, parallel):
            for stored, rows in cut_rows(entry.slices(index), own):
                if entry.cut == COLUMNS and entry.columns is not None:
                    columns = block(entry.columns, parallel.tp_rank, parallel.tp_size)
                    stored = stored.with_columns(columns)
                filled = slice(first + rows.start, first + rows.stop)
                yield ParameterSlice(stored, parameter, (*local, filled))
            first += own.stop - own.start


def _matrices(model: Any, model_args: ModelArgs, parallel: Parallel) -> Iterator[Matrix]:
    """Every matrix (or vector) of this stage's frozen parameters."""
    on_this_stage = {
        "embedding": parallel.is_first_stage,
        "decoder": parallel.is_last_stage,  # outside its layers: the final norm
        "output_layer": parallel.is_last_stage,
    }
    for entry in weight_map(model_args):
        parameter = attrgetter(entry.parameter)
        if not entry.stacked:
            if on_this_stage[entry.parameter.split(".")[0]]:
                yield entry, (), parameter(model), ()
            continue
        for layer in model.decoder.layers:
            number = layer.layer_number - 1
            if len(entry.stacked) == 1:
                yield entry, (number,), parameter(layer), ()
                continue
            for slot, expert in enumerate(layer.mlp.local_expert_indices):
                yield entry, (number, expert), parameter(layer), (slot,)


def _own_rows(entry: Entry, model_args: ModelArgs, parallel: Parallel) -> list[slice]:
    """This rank's rows of a matrix, padding included, one slice below the other."""
    if entry.cut == ROWS and not entry.is_padded:
        return fused_rows(model_args, parallel.tp_rank, parallel.tp_size)
    num_rows = entry.padded_rows(model_args, parallel.tp_size)
    if entry.cut != ROWS:
        return [slice(0, num_rows)]
    return [block(num_rows, parallel.tp_rank, parallel.tp_size)]


def _zero_padding(model: Any, model_args: ModelArgs, parallel: Parallel) -> None:
    """The vocabulary's padding is zero here, and masked in the loss and the sampler."""
    for entry, _, parameter, _ in _matrices(model, model_args, parallel):
        if entry.is_padded:
            (own,) = _own_rows(entry, model_args, parallel)
            parameter.data[max(entry.num_rows - own.start, 0) :].zero_()


def open_folder(folder: str | Path, model_args: ModelArgs) -> SafetensorsFolder | MegatronFolder:
    """The tensors of a model folder of either format, checked against its config.json's sizes; what
    is read of a Megatron checkpoint is compared with its digests.
    """
    checkpoint = find_torch_dist(folder)
    if checkpoint:
        return MegatronFolder(checkpoint, model_args, compared=True)
    tensors = SafetensorsFolder(folder)
    check_tensors(tensors, model_args)
    return tensors


def check_headers(folder: str | Path, model_args: ModelArgs) -> None:
    """Raise FileNotFoundError or ValueError, before anything is allocated, where a model folder of
    either format has not the tensors of its config.json. Reads no weights.
    """
    checkpoint = find_torch_dist(folder)
    if checkpoint:
        MegatronFolder(checkpoint, model_args)
    else:
        check_tensors(SafetensorsFolder(folder), model_args, headers_only=True)


def load_weights(
    model: Any,
    model_args: ModelArgs,
    parallel: Parallel,
    folder: str | Path,
    *,
    from_peers: bool = False,
) -> int:
    """Fill this stage's parameters from the folder's tensors, cast to their dtype. Returns the
    bytes it read. from_peers: of the ranks that hold the same slices (data- and context-parallel
    ones, of an expert those that have it) each reads a part and gets the rest from the others.

    Raises ValueError, the same on every rank, naming the file or tensor that is missing,
    unexpected, misshapen or damaged. Collectives: those of `read_or_end_all`, with `from_peers`
    those of `read_with_peers`. On a terminal rank 0 shows a bar.
    """
    _zero_padding(model, model_args, parallel)
    slices = list(parameter_slices(model, model_args, parallel))
    with tqdm(
        desc="Weights of this rank",
        total=sum(part.view.numel() for part in slices),
        unit=" parameters",
        unit_scale=True,
        disable=None if parallel.rank == 0 else True,
        leave=False,
    ) as bar:
        if not from_peers:
            return read_or_end_all(
                slices, partial(open_folder, folder, model_args), parallel, bar.update
            )
        # of the experts a slice is in one of them: `where` begins with its number here
        experts = [part for part in slices if isinstance(part.where[0], int)]
        others = [part for part in slices if not isinstance(part.where[0], int)]
        groups = parallel.groups
        return read_with_peers(
            [(others, groups.dp_cp), (experts, groups.expt_dp)],
            partial(open_folder, folder, model_args),
            parallel,
            bar.update,
        )
