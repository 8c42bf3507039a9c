"""The divergence from logits: each rank holds [N, V/TP] of both sides. `linear_jsd` is cheaper if
the head is frozen.

N response rows, V vocabulary columns of one rank. Nothing of size [N, V] is made but the gradient.
It is finished in backward from a few scalars a row, the student's logits, and either A
(divergence.py), kept since forward in the memory that the gradient then takes, or the teacher's
logits.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.loss.passes import (
    LossCall,
    compare_sides,
    group_size,
    keeps_a,
    vocabulary_slice,
    write_gradient,
)
from megatron_gkd.loss.rows import (
    LinearJsdOutput,
    RowScalars,
    RowWeights,
    check_labels,
    empty_results,
    row_results,
    row_weights,
    zero_masked_rows,
)


class _LogitsDivergence(torch.autograd.Function):
    """Both sides' logits [N, V] -> (loss [N], metrics [K, N]).

    loss = w_divergence D + w_cross_entropy CE with D and its gradient as in divergence.py. Forward:
    statistics of both sides, one all-gather, the divergence's sums, one all-reduce. Backward: no
    collectives. Where A is kept it is overwritten, and a second backward through the same graph is
    torch's error about a saved tensor that was modified.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        labels: torch.Tensor | None,
        weights: RowWeights,
        call: LossCall,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        a = torch.empty_like(student_logits) if keeps_a(student_logits, call) else None
        found = compare_sides(student_logits, teacher_logits, labels, call, a)
        results = row_results(found.student, found.teacher, found.sums, labels, weights)
        ctx.save_for_backward(
            student_logits,
            teacher_logits if a is None else a,
            labels,
            *found.scalars,
            found.sums.gradient_sum,
            *weights,
        )
        ctx.call, ctx.kept_a = call, a is not None
        loss, metrics = results[0], results[1:].clone()
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        student_logits, teacher_or_a, labels, *scalars, gradient_sum, first, second = (
            ctx.saved_tensors
        )
        weights = RowWeights(first * upstream, second * upstream)
        gradient = teacher_or_a if ctx.kept_a else torch.empty_like(student_logits)
        write_gradient(
            gradient,
            student_logits,
            teacher_or_a,
            RowScalars(*scalars),
            gradient_sum,
            labels,
            weights,
            ctx.call,
        )
        zero_masked_rows(gradient, labels)
        return gradient, None, None, None, None


def _apply(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    divergence: Divergence,
    labels: torch.Tensor | None,
    sft_alpha: float,
    group: dist.ProcessGroup | None,
    vocab_size: int | None,
    metrics: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss [N], and the other fields of LinearJsdOutput [K, N] (without `metrics` some are not
    computed).
    """
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
    call = LossCall(divergence, columns, sft_alpha, group, metrics, gradient)
    if num_rows == 0:  # the same on all ranks of the group: no rank calls a collective
        loss = student_logits.float().sum(-1)
        return loss, empty_results(labels, loss)
    return _LogitsDivergence.apply(student_logits, teacher_logits.detach(), labels, weights, call)


def logits_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    divergence: Divergence,
    *,
    labels: torch.Tensor | None = None,
    sft_alpha: float = 0.0,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> LinearJsdOutput:
    """What `linear_divergence` returns, from logits.

    Args:
        student_logits: [N, V/TP] float32, bfloat16 or float16, finite, this rank's slice of the
            vocabulary; gets the gradient. A banned token is a large negative number (-1e4), not
            -inf: that makes the row NaN.
        teacher_logits: [N, V/TP], finite, no gradient.
        divergence: which one, the student's weight in its mixture, temperature, clip, top K.
        labels: int64 [N] global ids, -100 masks the row (whose logits may be anything).
        sft_alpha: weight of the cross-entropy on unscaled logits, in [0, 1].
        group: the tensor-parallel group; rank r of it owns columns r V/TP .. (r + 1) V/TP - 1.
            None: no tensor parallelism.
        vocab_size: columns from this one on are padding, without probability mass and with zero
            gradient.
    Raises ValueError for shapes, labels or sizes that do not fit each other.
    Collectives: one all-gather [12, N] and one all-reduce [4, N] of float64 in forward, with a top
    K two all-gathers, [12 + K, N] and [12, N] (none if N = 0); none in backward.
    """
    loss, metrics = _apply(
        student_logits, teacher_logits, divergence, labels, sft_alpha, group, vocab_size, True
    )
    return LinearJsdOutput(loss, *metrics)


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
    top_k: int | None = None,
) -> LinearJsdOutput:
    """`logits_divergence`, its divergence given by the settings: beta, temperature, divergence,
    clip and top_k as in `vocab_parallel_jsd`.
    """
    return logits_divergence(
        student_logits,
        teacher_logits,
        Divergence(divergence, beta, temperature, clip, top_k),
        labels=labels,
        sft_alpha=sft_alpha,
        group=group,
        vocab_size=vocab_size,
    )


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
    top_k: int | None = None,
) -> torch.Tensor:
    """Per-token divergence of student and teacher in nats, float32 [N], the same on all ranks of
    `group`; no metrics.

    Args:
        beta: the student's weight in the mixture, inside (0, 1); not used by the KLs.
        temperature: both sides' logits are divided by it.
        divergence: "jsd", "forward_kl" (teacher || student) or "reverse_kl".
        clip: entries of the divergence's sum over the vocabulary above it count as `clip` and give
            no gradient.
        top_k: both sides are the teacher's top_k best entries and one for all others; see
            divergence.py.
    The other arguments and the collectives are those of `logits_divergence`.
    """
    settings = Divergence(divergence, beta, temperature, clip, top_k)
    return _apply(
        student_logits, teacher_logits, settings, None, 0.0, group, vocab_size, metrics=False
    )[0]
