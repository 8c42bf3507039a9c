"""The divergences: their mathematics, one entry each in one table, and their settings.

Letters: N rows, V valid columns of this rank, z logits, T temperature, b the STUDENT's weight in
the mixture, and

    Q = softmax(z_student / T),  P = softmax(z_teacher / T),  M = b Q + (1 - b) P,
    d = log P - log Q,  e = expm1(-|d|).

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

With a top_k K both sides have K + 1 outcomes: the teacher's K best entries (of equal ones the
lowest columns) and the rest as one. Over the whole vocabulary that is the divergence of Q and a P
whose rest is the student's, scaled to the teacher's mass: P = r Q there, r = P(rest) / Q(rest). All
entries of the rest then have one d = log r, and as every rule is homogeneous in (Q, P) their sum is
the entry of the two masses and their A add up to its A; so is the gradient, the rest's spread over
its columns as Q is. A column is of the K if (logit, -column) is not below the K-th such pair: four
scalars a row say it all, and no index is kept. A clip is for the rest as a whole: of one of its
columns c Q / Q(rest). Both KLs are of the K + 1 outcomes too, entropies of whole distributions.

Three passes over the logits: `statistics` of each side, `compare`, `write_gradient`. They exist
twice, in torch_kernels.py for any device and in triton_kernels.py; passes.py chooses. Between the
last two either A is kept (a module's DTYPES_THAT_KEEP_A) or the teacher's logits are.

A new divergence is an entry of KINDS with its two rules, its name in `Name`, and its formula in
tests/reference_loss.py. This file imports neither torch nor triton: config.py reads it too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Name = Literal["jsd", "forward_kl", "reverse_kl"]  # the keys of KINDS


class TorchBlock(Protocol):
    """What a rule in torch works on: some rows, float32 [R, V] each, in scratch memory.

    A rule may overwrite everything but q; it asks for the methods' results before it overwrites
    anything.
    """

    q: "Tensor"
    p: "Tensor"
    d: "Tensor"

    def p_minus_q(self) -> "Tensor":
        """P - Q, accurate also where they are nearly equal."""

    def log_m_over_q_and_p(self, beta: float) -> "tuple[Tensor, Tensor]":
        """log(M/Q) and log(M/P); overwrites d."""


class NeededSums(NamedTuple):
    """Which sums over the vocabulary `compare` makes, besides that of A."""

    entries: bool  # of the divergence's entries, where it is none of the KLs
    kl_forward: bool
    kl_reverse: bool


@dataclass(frozen=True)
class Kind:
    """A divergence: its two rules, and what the passes and a run have to know of it.

    A rule gives, for each column of each row, A and the entry of the divergence's sum (of a KL
    without its y - x).
    """

    # (q, p, d, p_minus_q, log_m_over_q, log_m_over_p, beta) -> (A, entry) of one column, in
    # operators alone: Triton compiles it for a block of them.
    rule: Callable[[float, float, float, float, float, float, float], tuple[float, float]]
    # (block, beta) -> (A, entry). The same in torch and in place.
    torch_rule: Callable[[TorchBlock, float], "tuple[Tensor, Tensor]"]
    a_beyond_clip: float  # A where the entry is above the clip, as a multiple of Q
    # The field of rows.Sums that holds the sum of its entries; that of a KL is a metric as well.
    sum_field: Literal["divergence", "kl_forward", "kl_reverse"]
    formula: str  # for the log of a run; {student} and {teacher} are the weights in the mixture
    # Of a divergence with a mixture: what papers call it where the TEACHER's weight is 0 and 1.
    limits: tuple[Name, Name] | None = None

    @property
    def uses_beta(self) -> bool:
        """Whether there is a mixture, of which beta is the student's weight."""
        return self.limits is not None

    def needed_sums(self, metrics: bool) -> NeededSums:
        """With `metrics` both KLs; otherwise what the divergence itself needs."""
        return NeededSums(
            self.sum_field == "divergence",
            metrics or self.sum_field == "kl_forward",
            metrics or self.sum_field == "kl_reverse",
        )


def _jsd(
    q: float,
    p: float,
    d: float,
    p_minus_q: float,
    log_m_over_q: float,
    log_m_over_p: float,
    beta: float,
) -> tuple[float, float]:
    a = -beta * q * log_m_over_q
    return a, a - (1.0 - beta) * p * log_m_over_p


def _jsd_in_torch(block: TorchBlock, beta: float) -> "tuple[Tensor, Tensor]":
    import torch

    log_m_over_q, log_m_over_p = block.log_m_over_q_and_p(beta)
    a = log_m_over_q.mul_(block.q).mul_(-beta)
    return a, torch.addcmul(a, block.p, log_m_over_p, value=beta - 1.0, out=log_m_over_p)


def _forward_kl(
    q: float,
    p: float,
    d: float,
    p_minus_q: float,
    log_m_over_q: float,
    log_m_over_p: float,
    beta: float,
) -> tuple[float, float]:
    return -p_minus_q, p * d


def _forward_kl_in_torch(block: TorchBlock, beta: float) -> "tuple[Tensor, Tensor]":
    return block.p_minus_q().neg_(), block.p.mul_(block.d)


def _reverse_kl(
    q: float,
    p: float,
    d: float,
    p_minus_q: float,
    log_m_over_q: float,
    log_m_over_p: float,
    beta: float,
) -> tuple[float, float]:
    a = -d * q
    return a, a


def _reverse_kl_in_torch(block: TorchBlock, beta: float) -> "tuple[Tensor, Tensor]":
    a = block.d.mul_(block.q).neg_()
    return a, a


KINDS: dict[str, Kind] = {
    "jsd": Kind(
        rule=_jsd,
        torch_rule=_jsd_in_torch,
        a_beyond_clip=0.0,
        sum_field="divergence",
        formula="M = {student:.2f} student + {teacher:.2f} teacher, "
        "JSD = {student:.2f} KL(student || M) + {teacher:.2f} KL(teacher || M)",
        limits=("forward_kl", "reverse_kl"),
    ),
    "forward_kl": Kind(
        rule=_forward_kl,
        torch_rule=_forward_kl_in_torch,
        a_beyond_clip=1.0,
        sum_field="kl_forward",
        formula="forward KL = KL(teacher || student)",
    ),
    "reverse_kl": Kind(
        rule=_reverse_kl,
        torch_rule=_reverse_kl_in_torch,
        a_beyond_clip=-1.0,
        sum_field="kl_reverse",
        formula="reverse KL = KL(student || teacher)",
    ),
}


@dataclass(frozen=True)
class Divergence:
    """Which divergence of the two softmaxes. Raises ValueError for a setting out of its range."""

    kind: str = "jsd"  # a key of KINDS
    beta: float = 0.5  # the student's weight in the mixture; not used by the KLs
    temperature: float = 1.0  # divides both sides' logits
    clip: float | None = None  # most that one entry of one row counts, in nats; None: no limit
    top_k: int | None = None  # teacher's entries that stand for themselves; None: all of them

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"divergence must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if (limits := KINDS[self.kind].limits) and not 0.0 < self.beta < 1.0:
            raise ValueError(
                "beta (the student's weight in the mixture) must lie inside (0, 1) for "
                f"divergence={self.kind!r}, got {self.beta}: the divergence is 0 at both ends; use "
                f"divergence={limits[0]!r} or {limits[1]!r} for what papers call beta 0 and 1"
            )
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.clip is not None and not self.clip > 0.0:
            raise ValueError(f"clip must be positive, or None for no limit, got {self.clip}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all, got {self.top_k}")
