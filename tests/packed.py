"""Rows as tensors [B, S] -> what the decoder reads, one row behind the other; and back."""

from torch import Tensor

from megatron_gkd.data import Packing, View
from megatron_gkd.data.batch import BatchView, pack_views
from megatron_gkd.parallel import Parallel


def pack(
    input_ids: Tensor, lengths: Tensor, position_ids: Tensor, parallel: Parallel | None = None
) -> BatchView:
    """input_ids [B, S], lengths [B], position_ids [3, B, S]; without `parallel`: for one rank."""
    views = [
        View(
            input_ids[row, :length].tolist(),
            [-100] * length,
            length,
            position_ids[:, row, :length].float(),
        )
        for row, length in enumerate(lengths.tolist())
    ]
    multiples = (parallel.sequence_multiple, parallel.row_multiple) if parallel else (1, 1)
    return pack_views(views, Packing(0, *multiples))


def rows_of(x: Tensor, view: BatchView) -> list[Tensor]:
    """Of the packed sequence [T, ...] -> [S, ...] of each row."""
    return [x[start : start + length] for start, length in zip(view.starts, view.lengths)]


def padded(x: Tensor, view: BatchView, size: int) -> Tensor:
    """Of the packed sequence [T, ...] -> [B, size, ...], zero where a row has ended."""
    rows = x.new_zeros(len(view.lengths), size, *x.shape[1:])
    for row, of_row in enumerate(rows_of(x, view)):
        rows[row, : len(of_row)] = of_row
    return rows
