"""The divergences: their mathematics, their settings, and the few numbers a row that the passes
exchange.

Letters: N rows, V valid columns of this rank, z logits, T temperature, b the STUDENT's weight in
the mixture. Q = softmax(z_student / T), P = softmax(z_teacher / T), M = b Q + (1 - b) P, d = log P
- log Q, e = expm1(-|d|).

    jsd          b KL(Q||M) + (1 - b) KL(P||M)     A = b Q log(Q/M)
    forward_kl   KL(P||Q)                          A = Q - P
    reverse_kl   KL(Q||P)                          A = Q log(Q/P)

    d > 0:  log(M/P) = log1p(b e),        log(M/Q) = log(M/P) + d
    d <= 0: log(M/Q) = log1p((1 - b) e),  log(M/P) = log(M/Q) - d

The gradient w.r.t. z_student is (A - Q sum(A)) / T: a constant added to all d, the error of the
log-sum-exps, cancels in it. For the same reason the KLs are summed as x log(x/y) + (y - x), which
adds nothing to the sum over the vocabulary and is not negative in any entry; in the jsd these terms
cancel. Everything is exactly 0 where P = Q.

With a clip c an entry of the divergence's sum that is above c counts as c and gives no gradient;
there A is 0 (jsd), Q (forward_kl) or -Q (reverse_kl), and the rest stays as it is: adding a
multiple of Q to A changes nothing.

Three passes over the logits: `statistics` of each side, `compare`, `write_gradient`. They exist
twice, in blocked.py for any device and in kernels.py in Triton; `passes_for` chooses. Between the
last two either A is kept (a module's KEEPS_ENTRIES_OF) or the teacher's logits are.
"""

import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

KINDS = ("jsd", "forward_kl", "reverse_kl")


@dataclass(frozen=True)
class Divergence:
    """Which divergence of the two softmaxes."""

    kind: str = "jsd"  # one of KINDS
    beta: float = 0.5  # the student's weight in the mixture; not used by the KLs
    temperature: float = 1.0  # divides both sides' logits
    clip: float | None = (
        None  # largest value of one vocabulary entry of one row, in nats; None: no limit
    )

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"divergence must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "jsd" and not 0.0 < self.beta < 1.0:
            raise ValueError(
                "beta (the student's weight in the mixture) must lie inside (0, 1) for divergence='jsd', got "
                f"{self.beta}: the divergence is 0 at both ends; use divergence='forward_kl' or 'reverse_kl' for what "
                "papers call beta 0 and 1"
            )
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.clip is not None and not self.clip > 0.0:
            raise ValueError(f"clip must be positive, or None for no limit, got {self.clip}")


class SideStatistics(NamedTuple):
    """Of one side, float64 [N] each; over a rank's own columns, or after `merge` over the whole
    vocabulary.
    """

    top: torch.Tensor  # largest logit
    top_column: torch.Tensor  # its global column, the lowest one if several are equal
    mass: torch.Tensor  # sum of exp(x), x = (z - top) / T
    moment: torch.Tensor  # sum of x exp(x)
    unit_mass: torch.Tensor  # sum of exp(z - top): the mass at T = 1
    label_logit: torch.Tensor  # logit of the row's label; 0 where this rank does not own it


class RowScalars(NamedTuple):
    """What a rank must know of a row to work on its own columns, float32 [N, 1] each, the same on
    all ranks.
    """

    student_top: torch.Tensor
    student_log_mass: torch.Tensor
    student_unit_log_mass: torch.Tensor
    teacher_top: torch.Tensor
    teacher_log_mass: torch.Tensor
    log_ratio_shift: torch.Tensor  # d = (z_teacher - z_student) / T - log_ratio_shift


class Sums(NamedTuple):
    """Over this rank's columns, float64 [N] each; additive over ranks."""

    divergence: torch.Tensor
    gradient_sum: torch.Tensor  # sum of A
    kl_forward: torch.Tensor
    kl_reverse: torch.Tensor


class GradientFactors(NamedTuple):
    """What turns A and Q into the gradient of the loss, float32 [N, 1] each, and the labels of the
    cross-entropy.

    gradient = divergence (A - gradient_sum Q) + cross_entropy (softmax(z) - onehot(label))
    """

    divergence: torch.Tensor
    gradient_sum: torch.Tensor
    cross_entropy: torch.Tensor | None  # None: no such term
    label_columns: (
        torch.Tensor | None
    )  # int64 [N], outside 0 .. V-1 where this rank does not own the label


def empty_statistics(num_rows: int, device: torch.device) -> SideStatistics:
    """Statistics of no columns: what a rank contributes that holds nothing but padding."""
    zeros = torch.zeros(num_rows, dtype=torch.float64, device=device)
    return SideStatistics(zeros + torch.finfo(torch.float32).min, zeros, zeros, zeros, zeros, zeros)


def merge(parts: SideStatistics, temperature: float) -> SideStatistics:
    """Statistics of the whole vocabulary from those of G ranks, [G, N] each in rank order."""
    owner = parts.top.argmax(
        0, keepdim=True
    )  # the first of equal ranks, which holds the lowest columns
    top = parts.top.gather(0, owner)
    shift = (parts.top - top) / temperature
    scale = shift.exp()
    return SideStatistics(
        top=top.squeeze(0),
        top_column=parts.top_column.gather(0, owner).squeeze(0),
        mass=(parts.mass * scale).sum(0),
        moment=((parts.moment + shift * parts.mass) * scale).sum(0),
        unit_mass=(parts.unit_mass * (parts.top - top).exp()).sum(0),
        label_logit=parts.label_logit.sum(0),
    )


def row_scalars(student: SideStatistics, teacher: SideStatistics, temperature: float) -> RowScalars:
    """The scalars of `compare` and `write_gradient` from both sides' statistics over the whole
    vocabulary.
    """
    shift = (teacher.top - student.top) / temperature + (teacher.mass.log() - student.mass.log())
    columns = (
        student.top,
        student.mass.log(),
        student.unit_mass.log(),
        teacher.top,
        teacher.mass.log(),
        shift,
    )
    return RowScalars(*(column.float().unsqueeze(1) for column in columns))


def passes_for(device: torch.device) -> ModuleType:
    """The module with the three passes for `device`: kernels on CUDA where Triton is installed,
    otherwise blocked.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from megatron_gkd.loss import triton_kernels

        return triton_kernels
    from megatron_gkd.loss import torch_kernels

    return torch_kernels
