"""The numbers of a row: what the passes exchange, the row's weights in the loss, and its results.

Letters as in divergence.py. Of a row only scalars are global: both sides' statistics and the sums
of `compare`. Everything here is local to a rank; the collectives that merge the ranks' numbers are
in passes.py.
"""

from typing import Any, NamedTuple

import torch

from megatron_gkd.loss.divergence import Kind

IGNORED_LABEL = -100


class LinearJsdOutput(NamedTuple):
    """What the loss functions return. Per token, float32 [N], the same on all ranks of the group;
    everything but `loss` is detached.

    A row whose label is -100 is masked: all its numbers are 0, its gradient too. KLs and entropies
    are of the distributions softened by the temperature, in nats; `sft_loss` and the label's
    log-probabilities are at temperature 1.
    """

    loss: torch.Tensor  # (1 - sft_alpha) jsd + sft_alpha sft_loss; gives gradients to the student
    jsd: torch.Tensor  # the chosen divergence
    kl_forward: torch.Tensor  # KL(teacher || student)
    kl_reverse: torch.Tensor  # KL(student || teacher)
    entropy_student: torch.Tensor
    entropy_teacher: torch.Tensor
    # 1 where both sides' largest logits are in the same column (of equal ones the lowest)
    top1_agreement: torch.Tensor
    # None without labels:
    sft_loss: torch.Tensor | None = None  # cross-entropy of the student with the label
    token_correct: torch.Tensor | None = None  # 1 where the student's largest logit is the label's
    label_logprob_student: torch.Tensor | None = None
    label_logprob_teacher: torch.Tensor | None = None


class SideStatistics(NamedTuple):
    """Statistics of one side's logits, float64 [N] each; over a rank's own columns, or after
    `merge` over the whole vocabulary.
    """

    top: torch.Tensor  # largest logit
    top_column: torch.Tensor  # its global column, the lowest one if several are equal
    sum_exp: torch.Tensor  # sum of exp(x), x = (z - top) / T
    moment: torch.Tensor  # sum of x exp(x)
    unit_sum_exp: torch.Tensor  # sum of exp(z - top): sum_exp at T = 1
    label_logit: torch.Tensor  # logit of the row's label; 0 where this rank does not own it


class RowScalars(NamedTuple):
    """What a rank must know of a row to work on its own columns, float32 [N, 1] each, the same on
    all ranks. The log-sum-exps are relative to the largest logit.
    """

    student_top: torch.Tensor
    student_log_sum_exp: torch.Tensor
    student_unit_log_sum_exp: torch.Tensor
    teacher_top: torch.Tensor
    teacher_log_sum_exp: torch.Tensor
    # d = (z_teacher - z_student - shift) / T: of equal softmaxes exactly 0, also where the sides'
    # logits differ by a number and products are fused with sums
    shift: torch.Tensor
    # With a top K, otherwise None. The first two say which of this rank's columns are of the K: a
    # teacher's logit above `lowest`, or equal to it in a column up to `last_column`.
    lowest: torch.Tensor | None = None
    last_column: torch.Tensor | None = None  # of this rank, -1: none that is equal
    rest_shift: torch.Tensor | None = None  # d of the rest is (rest_shift - shift) / T
    rest_mass: torch.Tensor | None = None  # the student's probability of the rest

    def of_rows(self, rows: slice) -> "RowScalars":
        """The scalars of some rows."""
        found: Any = (None if scalar is None else scalar[rows] for scalar in self)
        return RowScalars(*found)

    def is_rest(self, teacher: torch.Tensor) -> torch.Tensor:
        """Which of the teacher's logits [N, V] of this rank's columns are not of the top K."""
        assert self.lowest is not None and self.last_column is not None, "there is no top K"
        columns = torch.arange(teacher.shape[1], dtype=torch.float32, device=teacher.device)
        ties = (teacher == self.lowest).logical_and_(columns <= self.last_column)
        return (teacher > self.lowest).logical_or_(ties).logical_not_()


class Sums(NamedTuple):
    """Over this rank's columns, float64 [N] each; additive over ranks."""

    divergence: torch.Tensor
    gradient_sum: torch.Tensor  # sum of A
    kl_forward: torch.Tensor
    kl_reverse: torch.Tensor


class RowWeights(NamedTuple):
    """The factors of the divergence and of the cross-entropy in a row's loss, float64 [N] each; 0
    in masked rows.
    """

    divergence: torch.Tensor
    cross_entropy: torch.Tensor


class GradientFactors(NamedTuple):
    """What turns A and Q into the gradient of the loss, float32 [N, 1] each, and the labels of the
    cross-entropy.

    gradient = divergence (A - gradient_sum Q) + cross_entropy (softmax(z) - onehot(label))
    """

    divergence: torch.Tensor
    gradient_sum: torch.Tensor
    # None for both: there is no cross-entropy term
    cross_entropy: torch.Tensor | None
    label_columns: torch.Tensor | None  # int64 [N], outside 0 .. V-1 where another rank owns it


def add_kl(sums: Sums, kind: Kind) -> Sums:
    """`sums`, where the divergence is a KL: its sum is added to the field of the divergence, which
    so far holds only what the clip takes off.
    """
    if kind.sum_field != "divergence":
        sums.divergence.add_(getattr(sums, kind.sum_field))
    return sums


def empty_results(labels: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """The fields after `loss` of no rows: [K, 0], K as in `row_results`."""
    optional = 0 if labels is not None else len(LinearJsdOutput._field_defaults)
    return like.detach().new_empty(len(LinearJsdOutput._fields) - 1 - optional, 0)


def empty_statistics(num_rows: int, device: torch.device) -> SideStatistics:
    """Statistics of no columns: what a rank contributes that holds nothing but padding."""
    zeros = torch.zeros(num_rows, dtype=torch.float64, device=device)
    return SideStatistics(zeros + torch.finfo(torch.float32).min, zeros, zeros, zeros, zeros, zeros)


def merge(parts: SideStatistics, temperature: float) -> SideStatistics:
    """Statistics of the whole vocabulary from those of G ranks, [G, N] each in rank order."""
    # the first of equal ranks, which holds the lowest columns
    owner = parts.top.argmax(0, keepdim=True)
    top = parts.top.gather(0, owner)
    shift = (parts.top - top) / temperature
    scale = shift.exp()
    return SideStatistics(
        top=top.squeeze(0),
        top_column=parts.top_column.gather(0, owner).squeeze(0),
        sum_exp=(parts.sum_exp * scale).sum(0),
        moment=((parts.moment + shift * parts.sum_exp) * scale).sum(0),
        unit_sum_exp=(parts.unit_sum_exp * (parts.top - top).exp()).sum(0),
        label_logit=parts.label_logit.sum(0),
    )


def row_scalars(student: SideStatistics, teacher: SideStatistics, temperature: float) -> RowScalars:
    """The scalars of `compare` and `write_gradient` from both sides' statistics over the whole
    vocabulary.
    """
    shift = (teacher.top - student.top) + temperature * (
        teacher.sum_exp.log() - student.sum_exp.log()
    )
    columns = (
        student.top,
        student.sum_exp.log(),
        student.unit_sum_exp.log(),
        teacher.top,
        teacher.sum_exp.log(),
        shift,
    )
    return RowScalars(*(column.float().unsqueeze(1) for column in columns))


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
            f"labels must have one id for each of the {num_rows} rows, "
            f"got shape {tuple(labels.shape)}"
        )
    wrong = (labels != IGNORED_LABEL) & ((labels < 0) | (labels >= vocab_size))
    if wrong.any():
        raise ValueError(
            f"label {labels[wrong][0].item()} is not {IGNORED_LABEL} and not below the vocabulary "
            f"size {vocab_size}"
        )


def row_weights(
    labels: torch.Tensor | None, num_rows: int, sft_alpha: float, device: torch.device
) -> RowWeights:
    """The weights of each row in the loss: 0 where the label is -100; without labels all rows count
    the same.
    """
    active = torch.ones(num_rows, dtype=torch.float64, device=device)
    if labels is not None:
        active = (labels != IGNORED_LABEL).double()
    return RowWeights(active * (1.0 - sft_alpha), active * sft_alpha)


def zero_masked_rows(gradient: torch.Tensor, labels: torch.Tensor | None) -> None:
    """0 in the rows of `gradient` [N, ...] whose label is -100: a weight of 0 would leave NaN where
    the row holds any.
    """
    if labels is not None:
        gradient.index_fill_(0, (labels == IGNORED_LABEL).nonzero().squeeze(1), 0)


def row_results(
    student: SideStatistics,
    teacher: SideStatistics,
    sums: Sums,
    labels: torch.Tensor | None,
    weights: RowWeights,
) -> torch.Tensor:
    """The fields of LinearJsdOutput in their order, float32 [7, N], or [11, N] with labels."""
    results = [
        weights.divergence * sums.divergence,
        sums.divergence,
        sums.kl_forward,
        sums.kl_reverse,
        student.sum_exp.log() - student.moment / student.sum_exp,
        teacher.sum_exp.log() - teacher.moment / teacher.sum_exp,
        (student.top_column == teacher.top_column).double(),
    ]
    if labels is None:
        return torch.stack(results).float()
    student_logprob = student.label_logit - student.top - student.unit_sum_exp.log()
    teacher_logprob = teacher.label_logit - teacher.top - teacher.unit_sum_exp.log()
    results[0] = results[0] - weights.cross_entropy * student_logprob
    results += [
        -student_logprob,
        (student.top_column == labels).double(),
        student_logprob,
        teacher_logprob,
    ]
    return torch.stack(results).where(labels != IGNORED_LABEL, 0.0).float()


def gradient_factors(
    weights: RowWeights,
    gradient_sum: torch.Tensor,
    temperature: float,
    sft_alpha: float,
    labels: torch.Tensor | None,
    first_column: int,
) -> GradientFactors:
    """Factors of `write_gradient` from the weights (times the upstream gradient) and the rows' sums
    of A, [N] each.
    """
    divergence = (weights.divergence / temperature).float().unsqueeze(1)
    sums = gradient_sum.float().unsqueeze(1)
    if sft_alpha == 0.0 or labels is None:
        return GradientFactors(divergence, sums, None, None)
    cross_entropy = weights.cross_entropy.float().unsqueeze(1)
    return GradientFactors(divergence, sums, cross_entropy, labels - first_column)
