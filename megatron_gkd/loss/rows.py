"""The row-wise half of the loss: the two collectives over the tensor-parallel ranks, and what rows
become of them.

Per row only scalars are global: an all-gather of both sides' statistics (N x 12 numbers a rank),
and one sum of the divergence's parts (N x 4). Neither needs a counterpart in backward: each rank's
gradient of its own columns follows from the scalars.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_gkd.loss.divergence import GradientFactors, SideStatistics, Sums, merge

IGNORED_LABEL = -100


class Slice(NamedTuple):
    """The columns that this rank owns, first_column .. first_column + num_columns - 1; it holds
    padding beyond.
    """

    first_column: int
    num_columns: int


class Weights(NamedTuple):
    """Per row, float64 [N]: the factors of the divergence and of the cross-entropy in the loss; 0
    in masked rows.
    """

    jsd: torch.Tensor
    sft: torch.Tensor


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks of the group; None is one rank alone."""
    return 1 if group is None else dist.get_world_size(group)


def vocabulary_slice(
    num_local_columns: int, vocab_size: int | None, group: dist.ProcessGroup | None
) -> Slice:
    """This rank's slice, if each rank holds `num_local_columns` and the model has `vocab_size` of
    them (None: all).
    """
    total = num_local_columns * group_size(group)
    if vocab_size is None:
        vocab_size = total
    if not 0 < vocab_size <= total:
        raise ValueError(
            f"vocab_size must lie in 1 .. {total} ({num_local_columns} columns a rank x {group_size(group)} ranks), "
            f"got {vocab_size}"
        )
    first_column = 0 if group is None else dist.get_rank(group) * num_local_columns
    return Slice(first_column, min(max(vocab_size - first_column, 0), num_local_columns))


def check_labels(
    labels: torch.Tensor | None, num_rows: int, vocab_size: int, sft_alpha: float
) -> None:
    """Raise ValueError unless labels are [num_rows] ids of the vocabulary or -100, and given if the
    SFT term is.
    """
    if not 0.0 <= sft_alpha <= 1.0:
        raise ValueError(f"sft_alpha must lie in [0, 1], got {sft_alpha}")
    if labels is None:
        if sft_alpha > 0.0:
            raise ValueError(
                f"sft_alpha is {sft_alpha} but there are no labels: pass labels [N], or sft_alpha=0"
            )
        return
    if labels.shape != (num_rows,):
        raise ValueError(
            f"labels must have one id for each of the {num_rows} rows, got shape {tuple(labels.shape)}"
        )
    wrong = (labels != IGNORED_LABEL) & ((labels < 0) | (labels >= vocab_size))
    if wrong.any():
        raise ValueError(
            f"label {labels[wrong][0].item()} is not {IGNORED_LABEL} and not below the vocabulary size {vocab_size}"
        )


def row_weights(
    labels: torch.Tensor | None, num_rows: int, sft_alpha: float, device: torch.device
) -> Weights:
    """What each of the rows counts: labels [N] of -100 count nothing, without labels all count the
    same.
    """
    active = torch.ones(num_rows, dtype=torch.float64, device=device)
    if labels is not None:
        active = (labels != IGNORED_LABEL).double()
    return Weights(active * (1.0 - sft_alpha), active * sft_alpha)


def zero_masked_rows(gradient: torch.Tensor, labels: torch.Tensor | None) -> None:
    """0 in the rows [N, ...] of `gradient` whose label masks them: a weight of 0 leaves NaN where
    the row holds any.
    """
    if labels is not None:
        gradient.index_fill_(0, (labels == IGNORED_LABEL).nonzero().squeeze(1), 0)


def gather_statistics(
    student: SideStatistics,
    teacher: SideStatistics,
    temperature: float,
    group: dist.ProcessGroup | None,
) -> tuple[SideStatistics, SideStatistics]:
    """Both sides' statistics over the whole vocabulary from this rank's. Collectives: one
    all-gather (none without a group).
    """
    packed = torch.stack([*student, *teacher])
    parts = packed.unsqueeze(0)
    if group_size(group) > 1:
        parts = packed.new_empty(group_size(group), *packed.shape)
        dist.all_gather(list(parts), packed, group=group)
    fields = parts.unbind(1)
    num_fields = len(SideStatistics._fields)
    return merge(SideStatistics(*fields[:num_fields]), temperature), merge(
        SideStatistics(*fields[num_fields:]), temperature
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


def row_results(
    student: SideStatistics,
    teacher: SideStatistics,
    sums: Sums,
    labels: torch.Tensor | None,
    weights: Weights,
) -> torch.Tensor:
    """The fields of LinearJsdOutput in their order, float32 [7, N], or [11, N] with labels."""
    results = [
        weights.jsd * sums.divergence,
        sums.divergence,
        sums.kl_forward,
        sums.kl_reverse,
        student.mass.log() - student.moment / student.mass,
        teacher.mass.log() - teacher.moment / teacher.mass,
        (student.top_column == teacher.top_column).double(),
    ]
    if labels is not None:
        student_logprob = student.label_logit - student.top - student.unit_mass.log()
        teacher_logprob = teacher.label_logit - teacher.top - teacher.unit_mass.log()
        results[0] = results[0] - weights.sft * student_logprob
        results += [
            -student_logprob,
            (student.top_column == labels).double(),
            student_logprob,
            teacher_logprob,
        ]
        return torch.stack(results).where(labels != IGNORED_LABEL, 0.0).float()
    return torch.stack(results).float()


def gradient_factors(
    weights: Weights,
    gradient_sum: torch.Tensor,
    temperature: float,
    sft_alpha: float,
    labels: torch.Tensor | None,
    first_column: int,
) -> GradientFactors:
    """Factors of `write_gradient` from the weights (times the upstream gradient) and the rows' sums
    of A, [N] each.
    """
    factors = [(weights.jsd / temperature).float().unsqueeze(1), gradient_sum.float().unsqueeze(1)]
    if sft_alpha == 0.0:
        return GradientFactors(*factors, None, None)
    return GradientFactors(*factors, weights.sft.float().unsqueeze(1), labels - first_column)
