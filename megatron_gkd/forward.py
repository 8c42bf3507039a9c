"""Teacher forward, student forward and backward: the only callers of megatron-core's pipeline
schedules.

The teacher's hidden states of the response rows (not its logits) wait between the two passes, on
the last pipeline stage. Both views are compacted to their response rows before the lm_head, which
`linear_divergence` applies. Shapes: B rows, S positions, H hidden size, N response rows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_gkd.data.batch import Batch, BatchView
from megatron_gkd.data.dataset import DataReport
from megatron_gkd.lora import lora_enabled
from megatron_gkd.lora.modules import head_lora, lm_head
from megatron_gkd.loss import Divergence, LinearJsdOutput, linear_divergence, logits_divergence
from megatron_gkd.media.features import MediaFeatures, media_arguments
from megatron_gkd.media.towers import StepMedia
from megatron_gkd.parallel import Parallel

# Per-token results that are summed over the response tokens, in this order.
SUMMED = (
    "loss",
    "jsd",
    "sft_loss",
    "kl_forward",
    "kl_reverse",
    "entropy_student",
    "entropy_teacher",
    "top1_agreement",
    "token_correct",
)
MEANS = (*SUMMED[:-1], "token_accuracy")  # what their means are called
GROUPED = (
    "jsd",
    "sft_loss",
    "top1_agreement",
    "token_accuracy",
    "num_tokens",
)  # of these, the means of each source and pair of views


@dataclass(frozen=True)
class LossSettings:
    """What the loss of a whole run is: (1 - sft_alpha) divergence + sft_alpha cross-entropy."""

    divergence: Divergence
    sft_alpha: float
    vocab_size: int  # without padding


@dataclass(frozen=True)
class Groups:
    """Parts of the data whose sums are kept apart, by names that all ranks agree on. A single name
    is the whole: none.
    """

    sources: tuple[str, ...] = ()
    media_pairs: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.sources) + len(self.media_pairs)

    @classmethod
    def of(cls, report: DataReport) -> "Groups":
        """A data set's sources, and what student and teacher perceive in it, where there are
        several.
        """
        names = (tuple(sorted(found)) for found in (report.sources, report.media))
        return cls(*(found if len(found) > 1 else () for found in names))


@dataclass
class TokenSums:
    """Sums over response tokens of one pass, float64 [1 + G, len(SUMMED) + 1]: of all and of each
    of the G groups; the number of tokens stands in the last column.
    """

    values: Tensor
    groups: Groups = Groups()

    @classmethod
    def zero(cls, device: torch.device, groups: Groups = Groups()) -> "TokenSums":
        return cls(
            torch.zeros(1 + len(groups), len(SUMMED) + 1, dtype=torch.float64, device=device),
            groups,
        )

    @classmethod
    def unknown(cls, device: torch.device) -> "TokenSums":
        """Of a step that was not taken: no tokens, and means that are NaN."""
        sums = cls.zero(device)
        sums.values[:, :-1] = math.nan
        return sums

    def add(self, output: LinearJsdOutput, batch: Batch) -> None:
        """The tokens of a micro-batch, `output` in the order of its student's response rows."""
        values = torch.stack(
            [getattr(output, name).detach().double() for name in SUMMED]
            + [torch.ones_like(output.loss).double()]
        )
        self.values[0] += values.sum(dim=1)
        if len(self.groups):
            rows = (batch.student.response_rows // batch.student.input_ids.shape[1]).tolist()
            number = {
                name: index
                for index, name in enumerate(
                    (*self.groups.sources, *self.groups.media_pairs), start=1
                )
            }
            for names in (
                batch.sources if self.groups.sources else [],
                batch.media_pairs if self.groups.media_pairs else [],
            ):
                if names:
                    self.values.index_add_(
                        0,
                        torch.tensor([number[names[row]] for row in rows], device=values.device),
                        values.T,
                    )

    def means(self, parallel: Parallel) -> dict[str, Any]:
        """Means over the global batch and `num_tokens`, of groups a few under `by_source` and
        `by_media` (those that have tokens). Collectives: a sum over data-parallel ranks, a
        broadcast from the last stage.
        """
        sums = self.values.clone()
        torch.distributed.all_reduce(sums, group=parallel.groups.dp)
        if parallel.pp_size > 1:
            torch.distributed.broadcast(sums, parallel.last_stage_rank, group=parallel.groups.pp)
        every, *parts = (
            {name: value / max(row[-1], 1) for name, value in zip(MEANS, row)}
            | {"num_tokens": int(row[-1])}
            for row in sums.tolist()
        )
        short = [{name: means[name] for name in GROUPED} for means in parts]
        split = {
            "by_source": dict(zip(self.groups.sources, short)),
            "by_media": dict(zip(self.groups.media_pairs, short[len(self.groups.sources) :])),
        }
        split = {
            key: {name: means for name, means in found.items() if means["num_tokens"]}
            for key, found in split.items()
        }
        return every | {key: found for key, found in split.items() if found}


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def response_hidden(hidden: Tensor, view: BatchView, parallel: Parallel) -> Tensor:
    """[S/TP, B, H] of the final norm -> [N, H], the rows that predict a response token, on every
    tensor-parallel rank.

    Collectives: an all-gather over the sequence shards; in backward the reduce-scatter that sums
    what each rank's part of the vocabulary contributes.
    """
    if parallel.tp_size > 1:
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=parallel.groups.tp
        )
    rows, size = view.response_rows, view.input_ids.shape[1]
    return hidden[rows % size, rows // size]


def hidden_states(
    model, view: BatchView, features: MediaFeatures | None, parallel: Parallel
) -> Tensor:
    """This stage's output [S/TP, B, H] for a view, the features of its media in their places on the
    first stage.
    """
    more = {}
    if parallel.is_first_stage and len(view.media_rows):
        assert features is not None, "the view shows media, and no features came along"
        decoder = model.module if isinstance(model, DistributedDataParallel) else model
        more = media_arguments(
            decoder,
            parallel,
            view.input_ids,
            view.position_ids,
            view.media_rows,
            view.media_tokens,
            features,
        )
    return model(view.input_ids, view.position_ids, attention_mask=None, **more)


def _run_schedule(
    model,
    views: Sequence[BatchView],
    loss: Callable[[int, Tensor], tuple],
    parallel: Parallel,
    media: StepMedia | Sequence[MediaFeatures | None] | None,
    *,
    forward_only: bool,
    collect: bool = False,
) -> list:
    """One pass of the pipeline over the micro-batches. `loss(index, hidden)` sees the last stage's
    output of each.
    """

    def step(indices, model):
        index = next(indices)
        hidden = hidden_states(
            model, views[index], media[index] if media is not None else None, parallel
        )
        return hidden, lambda output, non_loss_data=False: loss(index, output)

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(range(len(views))),
        model=[model],
        num_microbatches=len(views),
        seq_length=views[0].input_ids.shape[
            1
        ],  # each micro-batch has its own; megatron-core sends the shapes along
        micro_batch_size=views[0].input_ids.shape[0],
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )


@torch.no_grad()
def teacher_forward(
    model, batches: Sequence[Batch], parallel: Parallel, media: StepMedia | None = None
) -> list[Tensor]:
    """LoRA off. The teacher's hidden states [N, H] of each micro-batch on the last stage, an empty
    list on the others.

    media: the features of the batches' media, where they have any.
    """
    views = [batch.teacher for batch in batches]

    def keep(index: int, hidden: Tensor) -> Tensor:
        return response_hidden(hidden, views[index], parallel)

    with lora_enabled(model, False), eval_mode(model):
        return _run_schedule(model, views, keep, parallel, media, forward_only=True, collect=True)


def _loss_function(
    model: Any,
    batches: Sequence[Batch],
    teacher_hidden: list[Tensor],
    settings: LossSettings,
    parallel: Parallel,
    sums: TokenSums,
) -> Callable[[int, Tensor], tuple]:
    """What the schedule calls on the last stage: (sum of the loss, response tokens, nothing to
    report) of a micro-batch; adds to `sums`.

    The lm_head is applied chunk by chunk in `linear_divergence`; where it carries LoRA both sides'
    logits [N, V/TP] are made, in fp32.
    """

    def loss(index: int, hidden: Tensor) -> tuple[Tensor, Tensor, dict]:
        batch, decoder = batches[index], model.module
        student, teacher = response_hidden(hidden, batch.student, parallel), teacher_hidden[index]
        arguments = dict(
            labels=batch.student.targets,
            sft_alpha=0.0 if batch.on_policy else settings.sft_alpha,
            group=parallel.groups.tp if parallel.tp_size > 1 else None,
            vocab_size=settings.vocab_size,
        )
        if head_lora(decoder) is None:
            output = linear_divergence(
                student,
                teacher,
                decoder.output_layer.weight,
                settings.divergence,
                reduce_hidden_grad=False,  # response_hidden's backward sums it over the ranks
                **arguments,
            )
        else:
            with torch.no_grad(), lora_enabled(decoder, False):
                teacher_logits = lm_head(decoder, teacher)
            student_logits = lm_head(decoder, student)
            output = logits_divergence(
                student_logits, teacher_logits, settings.divergence, **arguments
            )
        num_tokens = len(output.loss)
        if num_tokens:
            sums.add(output, batch)
        return (
            output.loss.sum(),
            torch.tensor(num_tokens, dtype=torch.int, device=hidden.device),
            {},
        )

    return loss


def student_forward_backward(
    model,
    batches: Sequence[Batch],
    teacher_hidden: list[Tensor],
    settings: LossSettings,
    parallel: Parallel,
    media: StepMedia | None = None,
    groups: Groups = Groups(),
) -> TokenSums:
    """LoRA on. Adds the gradient of (sum of the loss over all response tokens of the global batch)
    / (their number) to the LoRA parameters.

    `model` is wrapped in megatron-core's DistributedDataParallel, its gradient buffers zero.
    Returns this rank's sums (zero on other stages than the last). Collectives: the pipeline's, and
    those of finalize_model_grads over data- and tensor-parallel groups.
    """
    sums = TokenSums.zero(parallel.device, groups)
    loss = _loss_function(model, batches, teacher_hidden, settings, parallel, sums)
    model.module.config.finalize_model_grads_func = finalize_model_grads
    with lora_enabled(model, True):
        _run_schedule(
            model, [batch.student for batch in batches], loss, parallel, media, forward_only=False
        )
    return sums


@torch.no_grad()
def student_forward(
    model,
    batches: Sequence[Batch],
    teacher_hidden: list[Tensor],
    settings: LossSettings,
    parallel: Parallel,
    sums: TokenSums,
    media: StepMedia | None = None,
) -> None:
    """LoRA on, dropout off, no gradient: evaluation. Adds to `sums`."""
    loss = _loss_function(model, batches, teacher_hidden, settings, parallel, sums)
    with lora_enabled(model, True), eval_mode(model):
        _run_schedule(
            model, [batch.student for batch in batches], loss, parallel, media, forward_only=True
        )


@torch.no_grad()
def forward_logits(
    model, model_args, parallel: Parallel, input_ids: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """fp32 logits [B, S, V] of text, whole and on the CPU of every rank: for verification and
    tests, not for training.

    input_ids [B, S] int64, position_ids [3, B, S] (text's by default), the same on all ranks.
    Collectives: the pipeline's, an all-gather of the vocabulary slices, a broadcast from the last
    stage.
    """
    num_rows, length = input_ids.shape
    padded = torch.nn.functional.pad(input_ids, (0, -length % parallel.tp_size))
    positions = torch.arange(padded.shape[1], device=padded.device).expand(3, num_rows, -1)
    if position_ids is not None:
        positions = torch.nn.functional.pad(position_ids, (0, -length % parallel.tp_size))
    rows = torch.arange(num_rows, device=padded.device)
    view = BatchView(
        padded, torch.zeros_like(padded), rows, rows, positions.float(), rows[:0], rows[:0]
    )
    return view_logits(model, model_args, parallel, view)[:, :length]


@torch.no_grad()
def view_logits(
    model, model_args, parallel: Parallel, view: BatchView, features: MediaFeatures | None = None
) -> Tensor:
    """As `forward_logits`, of a view with its media: B rows of S positions, a multiple of the
    tensor-parallel size.

    features: of the batch that the view belongs to (`Towers.encode`), on the first stage.
    """

    def slice_of_logits(index: int, hidden: Tensor) -> Tensor:
        if parallel.tp_size > 1:
            hidden = gather_from_sequence_parallel_region(hidden, group=parallel.groups.tp)
        return lm_head(model, hidden.transpose(0, 1))

    slices = _run_schedule(
        model, [view], slice_of_logits, parallel, [features], forward_only=True, collect=True
    )
    logits = torch.empty(
        *view.input_ids.shape,
        model_args.padded_vocab_size(parallel.tp_size),
        device=view.input_ids.device,
    )
    if parallel.is_last_stage:
        parts = [torch.empty_like(slices[0]) for _ in range(parallel.tp_size)]
        torch.distributed.all_gather(parts, slices[0].contiguous(), group=parallel.groups.tp)
        logits = torch.cat(parts, dim=-1)
    if parallel.pp_size > 1:
        torch.distributed.broadcast(logits, parallel.last_stage_rank, group=parallel.groups.pp)
    return logits[..., : model_args.vocab_size].cpu()
