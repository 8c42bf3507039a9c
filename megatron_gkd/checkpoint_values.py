"""Whether a run can go on from the numbers in a checkpoint: an update that went wrong may have been
saved, whole and with the right digests. All ranks look, each at an equal share, before any weights
of the model are read.
"""

import math
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_gkd.checkpoint_files import OPTIMIZER, STATE, TEACHER_FOLDER
from megatron_gkd.checkpoint_state import read_state
from megatron_gkd.formats.safetensors_folder import read_header, stored_tensors
from megatron_gkd.formats.stored_tensor import (
    DECODER_DTYPE_NAMES,
    StoredTensor,
    as_matrix,
    read_opened,
    row_blocks,
)
from megatron_gkd.lora.peft_config import TENSORS
from megatron_gkd.parallel import Parallel, agreed, first_error, from_rank_0, largest

_FILES = (TENSORS, OPTIMIZER, f"{TEACHER_FOLDER}/{TENSORS}")
_SECOND_MOMENT = ".exp_avg_sq"


def what_cannot_be(folder: Path, names: Sequence[str] | None, parallel: Parallel) -> str:
    """Why no run can go on from the numbers in `folder`, or in those of its files that `names` has,
    with file and tensor; "" where one can. The same on every rank.

    NaN or Inf; where a run wrote the folder also another type than fp32, a second moment below 0,
    and moments that are all 0 though updates have learned. Each file is read once by all ranks
    together. Host memory: BLOCK_BYTES a rank.

    Raises OSError, on every rank, where one of them cannot read. Collectives: a broadcast of three
    numbers over the world, those of `agreed` and `first_error`, with moments a maximum of one
    number; where all of them are 0 those of `agreed` and `first_error` again.
    """
    wanted = [name in (names or _FILES) and (folder / name).is_file() for name in _FILES]
    wanted_by_rank_0 = from_rank_0([int(one) for one in wanted], parallel.device)
    present = [name for name, is_there in zip(_FILES, wanted_by_rank_0) if is_there]
    is_of_a_run = names is None and (folder / STATE).is_file()
    error, moves = "", False
    where = f"rank {parallel.rank} (on {platform.node()}) cannot read {folder}: "
    with agreed(parallel.device, where):
        try:
            for name in present:
                tensors = list(stored_tensors(folder / name, read_header(folder / name)).values())
                if is_of_a_run:
                    _check_types(tensors)
                with open(folder / name, "rb") as file:
                    for tensor in _share(tensors, parallel):
                        moves |= _check(tensor, file.fileno()) and name == OPTIMIZER
        except ValueError as caught:
            error = str(caught)
    if error := first_error(error, parallel.device):
        return error
    if OPTIMIZER in present and not any(largest([moves], parallel.device)):
        with agreed(parallel.device, where):
            if parallel.rank == 0:
                error = _why_not_zero(folder)
        error = first_error(error, parallel.device)
    return error


def _why_not_zero(folder: Path) -> str:
    """Why moments that are all 0 are not the run's; "" where they may be: every gradient was 0, or
    an earlier version wrote the state, which does not say.
    """
    try:
        state = read_state(folder)
    except ValueError as error:
        return str(error)
    if not (state["num_updates"] and state.get("has_learned")):
        return ""
    return (
        f"{folder / OPTIMIZER}: all moments are 0, and {STATE} counts {state['num_updates']:,} "
        "updates: emptied, or of another checkpoint"
    )


def _check_types(tensors: Sequence[StoredTensor]) -> None:
    """Raise ValueError for one that a run did not write so."""
    for tensor in tensors:
        if tensor.dtype_name != "F32":
            raise ValueError(
                f"{tensor.path}: tensor {tensor.name} is {tensor.dtype_name}, and a run writes "
                "F32: it was converted, which changes the numbers"
            )


def _share(tensors: Sequence[StoredTensor], parallel: Parallel) -> Iterator[StoredTensor]:
    """This rank's: those that begin in its part of all bytes. Of a type without NaN none."""
    kept = [tensor for tensor in tensors if tensor.dtype_name in DECODER_DTYPE_NAMES]
    total, start = max(sum(tensor.num_bytes for tensor in kept), 1), 0  # all may be empty
    for tensor in kept:
        if start * parallel.world_size // total == parallel.rank:
            yield tensor
        start += tensor.num_bytes


def _check(tensor: StoredTensor, descriptor: int) -> bool:
    """Whether a number of it is not 0. descriptor: of its file. Raises ValueError for a number that
    no run can go on from.
    """
    is_square, moves = tensor.name.endswith(_SECOND_MOMENT), False
    _, width = as_matrix(tensor.size)
    for part in row_blocks(tensor):
        rows = range(part.start, part.stop)
        block = read_opened(
            descriptor, tensor.path, tensor.start, tensor.dtype, width, rows, range(width)
        )
        if not block.numel():
            continue
        low, high = (float(bound) for bound in block.aminmax())  # both NaN where one number is
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                f"{tensor.path}: tensor {tensor.name} holds NaN or Inf: an update had ruined it "
                "before it was saved"
            )
        if is_square and low < 0:
            raise ValueError(
                f"{tensor.path}: tensor {tensor.name} is {low:.3g} at its least, and a mean of "
                "squares is not below 0"
            )
        moves = moves or low != 0 or high != 0
    return moves
