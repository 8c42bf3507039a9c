"""The divergence from logits: each rank holds [N, V/TP] of both sides. `linear_jsd` is cheaper if
the head is frozen.

N response rows, V vocabulary columns of one rank. Nothing of size [N, V] is made but the gradient.
It is finished in backward from a few scalars a row, the student's logits, and either A
(divergence.py), kept since forward in the memory that the gradient then takes, or the teacher's
logits.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_gkd.loss.divergence import Divergence, RowScalars, passes_for, row_scalars
from megatron_gkd.loss.output import LinearJsdOutput
from megatron_gkd.loss.rows import (
    Slice,
    Weights,
    check_labels,
    gather_statistics,
    gradient_factors,
    group_size,
    reduce_sums,
    row_results,
    row_weights,
    vocabulary_slice,
    zero_masked_rows,
)


class _Task(NamedTuple):
    """What does not vary over the rows of one call."""

    divergence: Divergence
    columns: Slice
    sft_alpha: float
    metrics: bool
    gradient: bool  # False in forward-only mode
    group: dist.ProcessGroup | None


class _VocabParallelJsd(torch.autograd.Function):
    """Both sides' logits [N, V] -> (loss [N], metrics [K, N]).

    loss = w_jsd D + w_sft CE with D and its gradient as in divergence.py. Forward: statistics of
    both sides, one all-gather, the divergence's sums, one all-reduce. Backward: no collectives.
    Where A is kept it is overwritten, and a second backward through the same graph is torch's error
    about a saved tensor that was modified.
    """

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, labels, weights: Weights, task: _Task):
        passes = passes_for(student_logits.device)
        (first_column, num_columns), temperature = task.columns, task.divergence.temperature
        student, teacher = gather_statistics(
            *(
                passes.statistics(
                    logits, num_columns, temperature, first_column, labels, task.metrics
                )
                for logits in (student_logits, teacher_logits)
            ),
            temperature,
            task.group,
        )
        rows = row_scalars(student, teacher, temperature)
        second = teacher_logits
        if keep := task.gradient and student_logits.dtype in passes.KEEPS_ENTRIES_OF:
            second = torch.empty_like(student_logits)
        sums = passes.compare(
            student_logits,
            teacher_logits,
            num_columns,
            rows,
            task.divergence,
            task.metrics,
            entries_out=second if keep else None,
        )
        sums = reduce_sums(sums, task.group)
        results = row_results(student, teacher, sums, labels, weights)
        ctx.save_for_backward(student_logits, second, labels, *rows, sums.gradient_sum, *weights)
        ctx.task, ctx.keep = task, keep
        loss, metrics = results[0], results[1:].clone()
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        student_logits, second, labels, *rows, gradient_sum, jsd_weight, sft_weight = (
            ctx.saved_tensors
        )
        (first_column, num_columns), divergence = ctx.task.columns, ctx.task.divergence
        weights = Weights(jsd_weight * upstream, sft_weight * upstream)
        factors = gradient_factors(
            weights, gradient_sum, divergence.temperature, ctx.task.sft_alpha, labels, first_column
        )
        gradient = second if ctx.keep else torch.empty_like(student_logits)
        passes_for(gradient.device).write_gradient(
            gradient, student_logits, second, num_columns, RowScalars(*rows), divergence, factors
        )
        zero_masked_rows(gradient, labels)
        return gradient, None, None, None, None


def _apply(
    student_logits, teacher_logits, labels, sft_alpha, divergence, group, vocab_size, metrics
):
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must both be [N, V/TP] of one shape, "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    num_rows, num_local_columns = student_logits.shape
    columns = vocabulary_slice(num_local_columns, vocab_size, group)
    check_labels(labels, num_rows, vocab_size or num_local_columns * group_size(group), sft_alpha)
    weights = row_weights(labels, num_rows, sft_alpha, student_logits.device)
    gradient = torch.is_grad_enabled() and student_logits.requires_grad
    task = _Task(divergence, columns, sft_alpha, metrics, gradient, group)
    if num_rows == 0:  # the same on all ranks of the group: no rank calls a collective
        loss = student_logits.float().sum(-1)
        return loss, loss.new_empty(6 if labels is None else 10, 0)
    return _VocabParallelJsd.apply(student_logits, teacher_logits.detach(), labels, weights, task)


def vocab_parallel_jsd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    divergence: str = "jsd",
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    clip: float | None = None,
) -> torch.Tensor:
    """Per-token divergence of student and teacher in nats, float32 [N], the same on all ranks of
    `group`.

    Args:
        student_logits: [N, V/TP] float32, bfloat16 or float16, finite, this rank's slice of the
            vocabulary; gets the gradient. A banned token is a large negative number (-1e4), not
            -inf: that makes the row NaN.
        teacher_logits: [N, V/TP], finite, no gradient. beta: the student's weight in the mixture,
        inside (0, 1); not used by the KLs. temperature: both sides' logits are divided by it.
        divergence: "jsd", "forward_kl" (teacher || student) or "reverse_kl". group: the
        tensor-parallel group; rank r of it owns columns r V/TP .. (r + 1) V/TP - 1. None: no tensor
            parallelism.
        vocab_size: columns from this one on are padding, without probability mass and with zero
        gradient. clip: entries of the divergence's sum over the vocabulary above it count as `clip`
        and give no gradient.
    Collectives: one all-gather [12, N] and one all-reduce [4, N] of float64 in forward (none if N =
    0), none in backward.
    """
    chosen = Divergence(divergence, beta, temperature, clip)
    return _apply(
        student_logits, teacher_logits, None, 0.0, chosen, group, vocab_size, metrics=False
    )[0]


def logits_jsd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    labels: torch.Tensor | None = None,
    sft_alpha: float = 0.0,
    beta: float = 0.5,
    temperature: float = 1.0,
    divergence: str = "jsd",
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    clip: float | None = None,
) -> LinearJsdOutput:
    """`vocab_parallel_jsd` with the SFT term and the metrics: what `linear_jsd` returns, from
    logits.

    labels: int64 [N] global ids, -100 masks the row (whose logits may be anything); sft_alpha:
    weight of the cross-entropy on unscaled logits, in [0, 1]. The other arguments and the
    collectives are those of `vocab_parallel_jsd`.
    """
    chosen = Divergence(divergence, beta, temperature, clip)
    loss, metrics = _apply(
        student_logits, teacher_logits, labels, sft_alpha, chosen, group, vocab_size, metrics=True
    )
    return LinearJsdOutput(loss, *metrics)
