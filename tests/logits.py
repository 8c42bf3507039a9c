"""Logits of texts through the pipeline, for tests that compare models."""

import torch
from torch import Tensor, nn

from megatron_gkd.data import Packing, View
from megatron_gkd.data.batch import pack_views
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
    length = input_ids.shape[1]
    views = [
        View(
            ids,
            [-100] * length,
            length,
            None if position_ids is None else position_ids[:, row].float(),
        )
        for row, ids in enumerate(input_ids.tolist())
    ]
    packing = Packing(0, parallel.sequence_multiple, parallel.row_multiple)
    view = pack_views(views, packing).to(parallel.device)
    logits = view_logits(model, model_args, parallel, view)
    return torch.stack([logits[start : start + length] for start in view.starts[:-1]])
