"""What `linear.py` and `logits.py` share: the passes in their order with the two collectives
between them, over the tensor-parallel ranks.

An all-gather of both sides' statistics (12 numbers a row and rank) and one sum of the divergence's
parts (4 numbers a row). Neither needs a counterpart in backward: each rank's gradient of its own
columns follows from the row's scalars. With a top K the first carries K numbers more, and a third
one, between them, gathers the statistics of the rest.
"""

from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_gkd.kernels import runs_triton
from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.loss.rows import (
    RowScalars,
    RowWeights,
    SideStatistics,
    Sums,
    gradient_factors,
    merge,
    row_scalars,
)
from megatron_gkd.loss.top_k import best_logits, chosen_columns, with_rest


class VocabularySlice(NamedTuple):
    """The columns that this rank owns, first_column .. first_column + num_columns - 1; what it
    holds beyond is padding.
    """

    first_column: int
    num_columns: int


class LossCall(NamedTuple):
    """What holds for all rows of one call of the loss."""

    divergence: Divergence
    columns: VocabularySlice
    sft_alpha: float  # weight of the cross-entropy
    group: dist.ProcessGroup | None  # the tensor-parallel ranks; None is one rank alone
    metrics: bool  # False: only the loss is needed
    gradient: bool  # False in forward-only mode


class Comparison(NamedTuple):
    """What both sides' logits of some rows give, over the whole vocabulary."""

    student: SideStatistics
    teacher: SideStatistics
    scalars: RowScalars
    sums: Sums


def select_kernels(device: torch.device) -> ModuleType:
    """The module with the three passes for `device`: triton_kernels on CUDA where Triton is
    installed, otherwise torch_kernels.
    """
    if runs_triton(device):
        from megatron_gkd.loss import triton_kernels

        return triton_kernels
    from megatron_gkd.loss import torch_kernels

    return torch_kernels


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks of the group; None is one rank alone."""
    return 1 if group is None else dist.get_world_size(group)


def vocabulary_slice(
    num_local_columns: int, vocab_size: int | None, group: dist.ProcessGroup | None
) -> VocabularySlice:
    """This rank's slice of `vocab_size` columns (None: no padding), of which each rank holds
    `num_local_columns`. Raises ValueError if they do not hold so many.
    """
    total = num_local_columns * group_size(group)
    if vocab_size is None:
        vocab_size = total
    if not 0 < vocab_size <= total:
        raise ValueError(
            f"vocab_size must lie in 1 .. {total} ({num_local_columns} columns a rank x "
            f"{group_size(group)} ranks), got {vocab_size}"
        )
    first_column = 0 if group is None else dist.get_rank(group) * num_local_columns
    num_columns = min(max(vocab_size - first_column, 0), num_local_columns)
    return VocabularySlice(first_column, num_columns)


def gather_statistics(
    student: SideStatistics,
    teacher: SideStatistics,
    temperature: float,
    group: dist.ProcessGroup | None,
    more: torch.Tensor | None = None,
) -> tuple[SideStatistics, SideStatistics, torch.Tensor]:
    """Both sides' statistics over the whole vocabulary from this rank's, and all ranks' `more` [K,
    N], [G, K, N] in rank order. Collectives: one all-gather (none without a group).
    """
    packed = torch.stack([*student, *teacher])
    if more is not None:
        packed = torch.cat([packed, more])
    parts = packed.unsqueeze(0)
    if group_size(group) > 1:
        parts = packed.new_empty(group_size(group), *packed.shape)
        dist.all_gather(list(parts), packed, group=group)
    fields = parts.unbind(1)
    num_fields = len(SideStatistics._fields)
    return (
        merge(SideStatistics(*fields[:num_fields]), temperature),
        merge(SideStatistics(*fields[num_fields : 2 * num_fields]), temperature),
        parts[:, 2 * num_fields :],
    )


def reduce_sums(sums: Sums, group: dist.ProcessGroup | None) -> Sums:
    """Sums over the whole vocabulary from this rank's. Collectives: one all-reduce (none without a
    group).
    """
    if group_size(group) == 1:
        return sums
    packed = torch.stack(sums)
    dist.all_reduce(packed, group=group)
    return Sums(*packed.unbind(0))


def keeps_a(logits: torch.Tensor, call: LossCall) -> bool:
    """Whether `compare` is to write A for the gradient of these logits: where that is cheaper than
    to compute it again.
    """
    return call.gradient and logits.dtype in select_kernels(logits.device).DTYPES_THAT_KEEP_A


def _with_top_k(
    scalars: RowScalars,
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_statistics: SideStatistics,
    own_best: torch.Tensor,
    every_best: torch.Tensor,
    call: LossCall,
) -> RowScalars:
    """`scalars` with what they say of a top K, from this rank's logits [N, W] of both sides.

    own_best: this rank's `best_logits`; every_best: those of all ranks, [G, K, N].
    Collectives: one all-gather. Waits for the device.
    """
    (first_column, num_columns), temperature = call.columns, call.divergence.temperature
    rank = 0 if call.group is None else dist.get_rank(call.group)
    lowest, last = chosen_columns(teacher, num_columns, own_best, every_best, rank)
    scalars = scalars._replace(lowest=lowest, last_column=last)
    own_student, own_teacher = (
        select_kernels(logits.device).statistics(
            *(logits, num_columns, temperature, first_column),
            labels=None,
            metrics=False,
            rest_of=(teacher, scalars),
        )
        for logits in (student, teacher)
    )
    student_rest, teacher_rest, _ = gather_statistics(
        own_student, own_teacher, temperature, call.group
    )
    return with_rest(scalars, student_statistics, student_rest, teacher_rest, temperature)


def compare_sides(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor | None,
    call: LossCall,
    a_out: torch.Tensor | None,
) -> Comparison:
    """The first two passes over this rank's logits [N, W] of both sides.

    a_out: float32 [N, W] for A, which may be one of the logits, or None.
    Collectives: one all-gather and one all-reduce; with a top K two all-gathers.
    """
    kernels = select_kernels(student.device)
    (first_column, num_columns), divergence = call.columns, call.divergence
    own_student, own_teacher = (
        kernels.statistics(
            logits, num_columns, divergence.temperature, first_column, labels, call.metrics
        )
        for logits in (student, teacher)
    )
    top_k, own_best = divergence.top_k, None
    if top_k is not None:
        own_best = best_logits(teacher, num_columns, top_k + 1)
    student_statistics, teacher_statistics, every_best = gather_statistics(
        own_student,
        own_teacher,
        divergence.temperature,
        call.group,
        None if own_best is None else own_best[:top_k],
    )
    scalars = row_scalars(student_statistics, teacher_statistics, divergence.temperature)
    if own_best is not None:
        scalars = _with_top_k(
            scalars, student, teacher, student_statistics, own_best, every_best, call
        )
    sums = kernels.compare(
        student, teacher, num_columns, scalars, divergence, call.metrics, a_out=a_out
    )
    return Comparison(
        student_statistics, teacher_statistics, scalars, reduce_sums(sums, call.group)
    )


def write_gradient(
    out: torch.Tensor,
    student: torch.Tensor,
    teacher_or_a: torch.Tensor,
    scalars: RowScalars,
    gradient_sum: torch.Tensor,
    labels: torch.Tensor | None,
    weights: RowWeights,
    call: LossCall,
) -> None:
    """The third pass: out [N, W] = the gradient of the rows' losses times their weights, with
    respect to the student's logits. No collectives.

    teacher_or_a: A where `keeps_a`, otherwise the teacher's logits. out may be one of
    the inputs. gradient_sum [N]: Sums.gradient_sum over the whole vocabulary.
    """
    (first_column, num_columns), divergence = call.columns, call.divergence
    factors = gradient_factors(
        weights, gradient_sum, divergence.temperature, call.sft_alpha, labels, first_column
    )
    select_kernels(out.device).write_gradient(
        out, student, teacher_or_a, num_columns, scalars, divergence, factors
    )
