"""Logits of texts through the pipeline, for tests that compare models."""

import torch
from torch import Tensor, nn

from megatron_gkd.data.batch import BatchView
from megatron_gkd.forward import view_logits
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.parallel import Parallel


@torch.no_grad()
def forward_logits(
    model: nn.Module,
    model_args: ModelArgs,
    parallel: Parallel,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
) -> Tensor:
    """fp32 logits [B, S, V] of text, whole and on the CPU of every rank.

    input_ids [B, S] int64, position_ids [3, B, S] (text's by default), the same on all ranks.
    Collectives: the pipeline's, an all-gather of the vocabulary slices, a broadcast from the last
    stage.
    """
    num_rows, length = input_ids.shape
    padding = (0, -length % parallel.sequence_multiple)
    padded = torch.nn.functional.pad(input_ids, padding)
    positions = torch.arange(padded.shape[1], device=padded.device).expand(3, num_rows, -1)
    if position_ids is not None:
        positions = torch.nn.functional.pad(position_ids, padding)
    rows = torch.arange(num_rows, device=padded.device)
    view = BatchView(
        padded, torch.zeros_like(padded), rows, rows, positions.float(), rows[:0], rows[:0]
    )
    return view_logits(model, model_args, parallel, view)[:, :length]
