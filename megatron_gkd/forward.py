"""Teacher forward, student forward and backward: the only callers of megatron-core's pipeline
schedules.

The teacher's hidden states of the response rows (not its logits) wait between the two passes, on
the last pipeline stage. Both views are compacted to their response rows before the lm_head, which
token_loss.py applies. Shapes: B rows, T positions of the packed sequence, H hidden size, N
response rows, C context-parallel ranks.

With C > 1 each of these ranks reads its part of every row, and each takes N / C of the response
rows through the head and the loss: the views have other lengths, so a response's rows lie on other
ranks in each.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_gkd.data.batch import Batch, BatchView
from megatron_gkd.lora import as_student, as_teacher
from megatron_gkd.lora.modules import lm_head
from megatron_gkd.media.features import MediaFeatures, media_arguments
from megatron_gkd.media.towers import StepMedia
from megatron_gkd.metrics import NO_GROUPS, Groups, TokenSums
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.packed_rows import PackedRows
from megatron_gkd.parallel import Parallel
from megatron_gkd.token_loss import LossSettings, micro_batch_loss, response_share


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def packed_rows(view: BatchView, parallel: Parallel, *, cut: bool = True) -> PackedRows:
    """Where the view's rows lie, and with `cut` this context-parallel rank's part of them."""
    is_cut = cut and parallel.cp_size > 1
    return PackedRows(
        starts=view.starts,
        num_parts=parallel.cp_size if is_cut else 1,
        part=parallel.cp_rank if is_cut else 0,
        device=view.input_ids.device,
    )


def response_hidden(
    hidden: Tensor, view: BatchView, rows: PackedRows, parallel: Parallel
) -> Tensor:
    """[T/C/TP, 1, H] of the final norm -> [N/C, H], this rank's share of the rows that predict a
    response token, on every tensor-parallel rank. rows: of the view.

    Collectives: an all-gather of the sequence shards; in backward the reduce-scatter that sums what
    each rank's slice of the vocabulary contributes. With C > 1 an all-gather of the response rows
    and in backward their reduce-scatter.
    """
    hidden = parallel.gather_sequence(hidden)[:, 0]
    if rows.num_parts == 1:
        return hidden.index_select(0, view.response_rows)
    if not len(view.targets):
        return hidden[:0].clone()  # a view would keep the memory of the whole
    # of each response row the rank that has it, and its index there
    place = rows.order[view.response_rows]
    part, index = place // len(hidden), place % len(hidden)
    is_of_part = part == torch.arange(parallel.cp_size, device=part.device)[:, None]
    counts = is_of_part.sum(dim=1).tolist()
    own = hidden.index_select(0, index[is_of_part[parallel.cp_rank]])
    padded = torch.nn.functional.pad(own, (0, 0, 0, max(counts) - len(own)))
    gathered = gather_from_sequence_parallel_region(padded, group=parallel.groups.cp)
    number_in_part = is_of_part.cumsum(dim=1).gather(0, part[None])[0] - 1
    in_gathered = part * max(counts) + number_in_part
    return gathered.index_select(0, in_gathered[response_share(view, parallel)])


def hidden_states(
    model: nn.Module,
    view: BatchView,
    rows: PackedRows,
    features: MediaFeatures | None,
    parallel: Parallel,
) -> Tensor:
    """This stage's output [T/C/TP, 1, H] for this rank's part of a view. On the first stage the
    features of its media replace the embeddings of their placeholder tokens.
    """
    input_ids, position_ids = view.input_ids, view.position_ids
    media_rows, media_tokens = view.media_rows, view.media_tokens
    if rows.num_parts > 1:
        input_ids = input_ids[:, rows.own_positions]
        position_ids = position_ids[:, :, rows.own_positions]
        media_rows = rows.own_index[media_rows]
        media_rows, media_tokens = media_rows[media_rows >= 0], media_tokens[media_rows >= 0]
    media_inputs = {}
    if parallel.is_first_stage and len(view.media_rows):
        assert features is not None, "the view shows media, and no features came along"
        decoder = model.module if isinstance(model, DistributedDataParallel) else model
        media_inputs = media_arguments(
            decoder, parallel, input_ids, position_ids, media_rows, media_tokens, features
        )
    return model(
        input_ids, position_ids, attention_mask=None, packed_seq_params=rows, **media_inputs
    )


def _run_schedule(
    model: nn.Module,
    views: Sequence[BatchView],
    on_output: Callable[[int, Tensor, PackedRows], Tensor | tuple],
    parallel: Parallel,
    media: StepMedia | Sequence[MediaFeatures | None] | None,
    *,
    forward_only: bool,
    collect: bool = False,
    cut: bool = True,
) -> list:
    """One pass of the pipeline over the micro-batches. `on_output(index, hidden, rows)` is called
    on the last stage with each micro-batch's output: it returns the loss, or with `collect`
    (forward only) what this function returns in a list. cut: over the context-parallel ranks, not
    views of their own.
    """

    def step(indices: Iterator[int], model: nn.Module) -> tuple[Tensor, Callable]:
        index = next(indices)
        view, features = views[index], media[index] if media is not None else None
        rows = packed_rows(view, parallel, cut=cut)
        hidden = hidden_states(model, view, rows, features, parallel)
        return hidden, lambda output, non_loss_data=False: on_output(index, output, rows)

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(range(len(views))),
        model=[model],
        num_microbatches=len(views),
        # each micro-batch has its own length; megatron-core sends the shapes along
        seq_length=views[0].size,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )


@torch.no_grad()
def teacher_forward(
    model: nn.Module, batches: Sequence[Batch], parallel: Parallel, media: StepMedia | None = None
) -> list[Tensor]:
    """The teacher's hidden states [N/C, H] of each micro-batch on the last stage, an empty list on
    the others.

    media: the features of the batches' media, where they have any.
    """
    views = [batch.teacher for batch in batches]

    def keep(index: int, hidden: Tensor, rows: PackedRows) -> Tensor:
        return response_hidden(hidden, views[index], rows, parallel)

    with as_teacher(model), eval_mode(model):
        return _run_schedule(model, views, keep, parallel, media, forward_only=True, collect=True)


@torch.no_grad()
def last_hidden_states(
    model: nn.Module,
    views: Sequence[BatchView],
    parallel: Parallel,
    media: Sequence[MediaFeatures | None],
) -> list[Tensor]:
    """The hidden states of each view's last tokens, [B, H], on the last stage, an empty list on the
    others: what the first token after a prompt is drawn from. No dropout; the active adapter.
    Context-parallel ranks may have different views, of which each reads its own whole.

    media: the features of each view, None where it shows none and on later stages. Collectives: the
    pipeline's, and of each view an all-gather of the sequence shards.
    """

    def last(index: int, hidden: Tensor, rows: PackedRows) -> Tensor:
        view = views[index]
        ends = [start + length - 1 for start, length in zip(view.starts, view.lengths)]
        return parallel.gather_sequence(hidden)[torch.tensor(ends, device=hidden.device), 0]

    with eval_mode(model):
        return _run_schedule(
            model, views, last, parallel, media, forward_only=True, collect=True, cut=False
        )


def _loss_function(
    model: DistributedDataParallel,
    batches: Sequence[Batch],
    teacher_hidden: list[Tensor],
    settings: LossSettings,
    parallel: Parallel,
    sums: TokenSums,
) -> Callable[[int, Tensor, PackedRows], tuple]:
    """What the schedule calls on the last stage: (sum of the loss, response tokens, nothing to
    report) of a micro-batch; adds to `sums`.
    """

    def loss(index: int, hidden: Tensor, rows: PackedRows) -> tuple[Tensor, Tensor, dict]:
        batch = batches[index]
        student = response_hidden(hidden, batch.student, rows, parallel)
        teacher = teacher_hidden[index]
        found = micro_batch_loss(model.module, batch, student, teacher, settings, parallel, sums)
        return *found, {}

    return loss


def student_forward_backward(
    model: DistributedDataParallel,
    batches: Sequence[Batch],
    teacher_hidden: list[Tensor],
    settings: LossSettings,
    parallel: Parallel,
    media: StepMedia | None = None,
    groups: Groups = NO_GROUPS,
) -> TokenSums:
    """Adds the gradient of the loss's mean over all response tokens of the global batch, weighted
    by --token_weight, to the LoRA parameters.

    `model` is wrapped in megatron-core's DistributedDataParallel, its gradient buffers zero.
    Returns this rank's sums (zero on other stages than the last). Collectives: the pipeline's, and
    those of finalize_model_grads over data-, context- and tensor-parallel groups.
    """
    sums = TokenSums.zero(parallel.device, groups)
    loss = _loss_function(model, batches, teacher_hidden, settings, parallel, sums)

    def finalize(models: list, num_tokens: Tensor | None, **options: Any) -> None:
        """megatron-core divides by what it is given, summed over the data-parallel ranks."""
        divisor = num_tokens if settings.token_weight == "none" else sums.weight.clone()
        finalize_model_grads(models, divisor, **options)

    model.module.config.finalize_model_grads_func = finalize
    with as_student(model):
        _run_schedule(
            model, [batch.student for batch in batches], loss, parallel, media, forward_only=False
        )
    return sums


@torch.no_grad()
def student_forward(
    model: DistributedDataParallel,
    batches: Sequence[Batch],
    teacher_hidden: list[Tensor],
    settings: LossSettings,
    parallel: Parallel,
    sums: TokenSums,
    media: StepMedia | None = None,
) -> None:
    """The student with dropout off and no gradient: evaluation. Adds to `sums`."""
    loss = _loss_function(model, batches, teacher_hidden, settings, parallel, sums)
    with as_student(model), eval_mode(model):
        _run_schedule(
            model, [batch.student for batch in batches], loss, parallel, media, forward_only=True
        )


@torch.no_grad()
def view_logits(
    model: nn.Module,
    model_args: ModelArgs,
    parallel: Parallel,
    view: BatchView,
    features: MediaFeatures | None = None,
) -> Tensor:
    """fp32 logits [T, V] of a view with its media, whole and on the CPU of every rank: for
    verification, not for training.

    features: of the batch that the view belongs to (`Towers.encode`), on the first stage.
    Collectives: the pipeline's, with C > 1 an all-gather of the hidden states, an all-gather of the
    vocabulary slices, a broadcast from the last stage.
    """

    def slice_of_logits(index: int, hidden: Tensor, rows: PackedRows) -> Tensor:
        hidden = parallel.gather_sequence(hidden)[:, 0]
        if rows.num_parts > 1:
            hidden = gather_from_sequence_parallel_region(hidden, group=parallel.groups.cp)
            hidden = hidden[rows.order]
        return lm_head(model, hidden)

    slices = _run_schedule(
        model, [view], slice_of_logits, parallel, [features], forward_only=True, collect=True
    )
    logits = torch.empty(
        view.size, model_args.padded_vocab_size(parallel.tp_size), device=view.input_ids.device
    )
    if parallel.is_last_stage:
        parts = [torch.empty_like(slices[0]) for _ in range(parallel.tp_size)]
        torch.distributed.all_gather(parts, slices[0].contiguous(), group=parallel.groups.tp)
        logits = torch.cat(parts, dim=-1)
    if parallel.pp_size > 1:
        torch.distributed.broadcast(logits, parallel.last_stage_rank, group=parallel.groups.pp)
    return logits[..., : model_args.vocab_size].cpu()
