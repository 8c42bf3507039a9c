"""The three passes in torch, a block of rows at a time in scratch that stays in cache (mathematics:
divergence.py).

A CPU is bound by arithmetic: A of float32 logits is kept from `compare` to `write_gradient`, in the
memory that becomes the gradient, and operations are chosen by their price: exp2 for exp (a third),
copysign and clamps for `where` (a tenth), scratch that is made once. torch's own threads share each
operation: the caller's thread count is respected.
"""

import math
from collections.abc import Iterator

import torch

from megatron_gkd.loss.divergence import (
    Divergence,
    GradientFactors,
    RowScalars,
    SideStatistics,
    Sums,
    empty_statistics,
)

BLOCK_ENTRIES = {
    "cpu": 2**19
}  # logits of one side in a block: what stays in cache (2**18, 2**21: a quarter slower)
DEVICE_BLOCK_ENTRIES = 2**24  # what fills a GPU
LOG2_E = math.log2(math.e)
SEGMENT = 512  # columns among which the largest logit is looked for by index
KEEPS_ENTRIES_OF = (
    torch.float32,
)  # logits of these dtypes: `compare` writes A, `write_gradient` takes it


class _Scratch:
    """Float32 [rows, V] buffers, made at their first use, one for each name."""

    def __init__(self, num_rows: int, num_columns: int, device: torch.device):
        self.shape, self.device, self.buffers = (num_rows, num_columns), device, {}

    def get(self, name: str, num_rows: int) -> torch.Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        return self.buffers[name][:num_rows]

    def float32(self, name: str, logits: torch.Tensor) -> torch.Tensor:
        """The logits themselves if they are float32, otherwise a copy in the buffer of that name."""
        if logits.dtype == torch.float32:
            return logits
        return self.get(name, len(logits)).copy_(logits)


def _blocks(
    num_rows: int, num_columns: int, device: torch.device
) -> tuple[_Scratch, Iterator[slice]]:
    """Scratch for blocks of at most BLOCK_ENTRIES logits (at least one row), and their row slices."""
    entries = BLOCK_ENTRIES.get(device.type, DEVICE_BLOCK_ENTRIES)
    size = min(num_rows, max(1, entries // num_columns))
    slices = (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
    return _Scratch(size, num_columns, device), slices


def _top_and_column(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each row [R, 1], and the lowest column [R] that has it.

    torch's maximum with an index is neither vectorised nor split over threads, and took a third of
    all passes: the index is looked for in one segment of each row, the first whose maximum is the
    row's.
    """
    num_rows, num_columns = z.shape
    segments = z[:, : num_columns // SEGMENT * SEGMENT].unflatten(1, (-1, SEGMENT))
    tops = [segments.amax(-1)] if segments.shape[1] else []
    if num_columns % SEGMENT:
        tops.append(z[:, -(num_columns % SEGMENT) :].amax(-1, keepdim=True))
    top, segment = torch.cat(tops, 1).max(-1, keepdim=True)
    columns = segment * SEGMENT + torch.arange(SEGMENT, device=z.device)
    inside = z.gather(1, columns.clamp_max(num_columns - 1)).argmax(-1)  # the first of equal ones
    return top, segment.squeeze(1) * SEGMENT + inside


def statistics(
    logits: torch.Tensor,
    num_columns: int,
    temperature: float,
    first_column: int,
    labels: torch.Tensor | None,
    metrics: bool,
) -> SideStatistics:
    """Statistics of one side, of the first `num_columns` columns of logits [N, W] of any floating
    dtype.

    first_column: global number of this rank's first column; labels: [N] global columns, or None.
    Without `metrics` top_column and moment are zeros, without `labels` unit_mass and label_logit
    are.
    """
    num_rows = len(logits)
    result = empty_statistics(num_rows, logits.device)
    if num_columns == 0:
        return result
    result = SideStatistics(*(torch.zeros_like(field) for field in result))
    scratch, blocks = _blocks(num_rows, num_columns, logits.device)
    for block in blocks:
        z = scratch.float32("z", logits[block, :num_columns])
        if metrics:
            top, column = _top_and_column(z)
            result.top_column[block] = column.double() + first_column
        else:
            top = z.amax(-1, keepdim=True)
        result.top[block] = top.squeeze(1).double()
        x = torch.sub(z, top, out=scratch.get("x", len(z))).mul_(LOG2_E / temperature)
        exponentials = torch.exp2(x, out=scratch.get("exponentials", len(z)))
        result.mass[block] = exponentials.sum(-1).double()
        if metrics:
            result.moment[block] = exponentials.mul_(x).sum(-1).double() / LOG2_E
        if labels is not None:
            if temperature != 1.0:
                torch.exp2(x.mul_(temperature), out=exponentials)
                result.unit_mass[block] = exponentials.sum(-1).double()
            column = labels[block] - first_column
            owned = (column >= 0) & (column < num_columns)
            picked = z.gather(1, column.clamp(0, num_columns - 1).unsqueeze(1)).squeeze(1)
            result.label_logit[block] = torch.where(owned, picked.double(), 0.0)
    if labels is not None and temperature == 1.0:
        result = result._replace(unit_mass=result.mass)
    return result


def _probabilities(z, top, log_mass, temperature, out):
    """exp((z - top) / T - log_mass) [R, V]; top and log_mass [R, 1]."""
    torch.sub(z, top, out=out)
    torch.add(log_mass * -LOG2_E, out, alpha=LOG2_E / temperature, out=out)
    return torch.exp2(out, out=out)


def _ratios(student, teacher, rows: RowScalars, temperature, scratch: _Scratch):
    """Q, P, d and e of a block, [R, V] each."""
    num_rows = len(student)
    q = _probabilities(
        student, rows.student_top, rows.student_log_mass, temperature, scratch.get("q", num_rows)
    )
    p = _probabilities(
        teacher, rows.teacher_top, rows.teacher_log_mass, temperature, scratch.get("p", num_rows)
    )
    d = torch.sub(teacher, student, out=scratch.get("d", num_rows))
    torch.add(-rows.log_ratio_shift, d, alpha=1.0 / temperature, out=d)
    e = torch.abs(d, out=scratch.get("e", num_rows)).neg_().expm1_()
    return q, p, d, e


def _p_minus_q(q, p, d, e, out):
    """P - Q, accurate also where they are nearly equal."""
    return torch.copysign(torch.maximum(p, q, out=out).mul_(e), d, out=out)


def _log_m_over_either(d, e, beta, scratch: _Scratch):
    """log(M/Q) and log(M/P); overwrites d and e."""
    if beta == 0.5:
        common = e.mul_(0.5)
    else:  # e times (d > 0 ? b : 1 - b)
        signed = torch.copysign(e, d, out=scratch.get("signed", len(d)))
        common = e.mul_(0.5).sub_(signed, alpha=beta - 0.5)
    common.log1p_()
    log_m_over_q = torch.clamp_min(d, 0.0, out=scratch.get("log_m_over_q", len(d))).add_(common)
    log_m_over_p = torch.sub(common, d.clamp_max_(0.0), out=d)
    return log_m_over_q, log_m_over_p


def _entries(kind, beta, q, p, d, e, p_minus_q, scratch: _Scratch):
    """A and the divergence's entries (of a KL without y - x), [R, V] each; overwrites the arguments
    but q.
    """
    if kind == "forward_kl":
        value = p.mul_(d)
        return p_minus_q.neg_(), value
    if kind == "reverse_kl":
        entries = d.mul_(q).neg_()
        return entries, entries
    log_m_over_q, log_m_over_p = _log_m_over_either(d, e, beta, scratch)
    entries = log_m_over_q.mul_(q).mul_(-beta)
    return entries, torch.addcmul(entries, p, log_m_over_p, value=beta - 1.0, out=log_m_over_p)


def _clipped_entries(divergence: Divergence, entries, value, q):
    """Where an entry of the divergence is above the clip; there A is overwritten as divergence.py
    says.
    """
    above = value > divergence.clip
    excess = torch.where(above, value - divergence.clip, 0.0)
    if divergence.kind == "jsd":
        entries.masked_fill_(above, 0.0)
    else:
        entries.copy_(torch.where(above, q if divergence.kind == "forward_kl" else -q, entries))
    return excess


def compare(
    student: torch.Tensor,
    teacher: torch.Tensor,
    num_columns: int,
    rows: RowScalars,
    divergence: Divergence,
    metrics: bool,
    entries_out: torch.Tensor | None = None,
) -> Sums:
    """The divergence's sums over the first `num_columns` columns of student and teacher logits [N,
    W] of any dtype.

    Without `metrics`, kl_forward and kl_reverse are zeros unless one of them is the divergence.
    entries_out: float32 [N, W] for A, or None; may be one of the logits.
    """
    num_rows, kind = len(student), divergence.kind
    sums = Sums(
        *(torch.zeros(num_rows, dtype=torch.float64, device=student.device) for _ in Sums._fields)
    )
    if num_columns == 0:
        return sums
    scratch, blocks = _blocks(num_rows, num_columns, student.device)
    for block in blocks:
        block_rows = RowScalars(*(scalar[block] for scalar in rows))
        z_student = scratch.float32("z_student", student[block, :num_columns])
        z_teacher = scratch.float32("z_teacher", teacher[block, :num_columns])
        q, p, d, e = _ratios(z_student, z_teacher, block_rows, divergence.temperature, scratch)
        p_minus_q, term = None, scratch.get("term", len(q))
        if metrics or kind != "jsd":
            p_minus_q = _p_minus_q(q, p, d, e, scratch.get("p_minus_q", len(q)))
        if metrics or kind == "forward_kl":
            sums.kl_forward[block] = torch.mul(p, d, out=term).sub_(p_minus_q).sum(-1).double()
        if metrics or kind == "reverse_kl":
            sums.kl_reverse[block] = (
                torch.addcmul(p_minus_q, q, d, value=-1.0, out=term).sum(-1).double()
            )
        entries, value = _entries(kind, divergence.beta, q, p, d, e, p_minus_q, scratch)
        if kind == "jsd":
            sums.divergence[block] = value.sum(-1).double()
        if divergence.clip is not None:
            sums.divergence[block] -= (
                _clipped_entries(divergence, entries, value, q).sum(-1).double()
            )
        sums.gradient_sum[block] = entries.sum(-1).double()
        if entries_out is not None:
            entries_out[block, :num_columns] = entries
    if kind == "forward_kl":
        sums.divergence.add_(sums.kl_forward)
    if kind == "reverse_kl":
        sums.divergence.add_(sums.kl_reverse)
    return sums


def write_gradient(
    out: torch.Tensor,
    student: torch.Tensor,
    second: torch.Tensor,
    num_columns: int,
    rows: RowScalars,
    divergence: Divergence,
    factors: GradientFactors,
) -> None:
    """out [N, W] = the loss's gradient w.r.t. the student's logits [N, W], 0 in padded columns.

    second: A as `compare` wrote it if student's dtype is in KEEPS_ENTRIES_OF, otherwise the
    teacher's logits. out may be one of the inputs.
    """
    out[:, num_columns:] = 0
    if num_columns == 0:
        return
    scratch, blocks = _blocks(len(student), num_columns, student.device)
    for block in blocks:
        block_rows = RowScalars(*(scalar[block] for scalar in rows))
        z = scratch.float32("z_student", student[block, :num_columns])
        if student.dtype in KEEPS_ENTRIES_OF:
            entries, q = second[block, :num_columns], scratch.get("q", len(z))
            _probabilities(
                z,
                block_rows.student_top,
                block_rows.student_log_mass,
                divergence.temperature,
                out=q,
            )
        else:
            z_teacher = scratch.float32("z_teacher", second[block, :num_columns])
            entries, q = _recompute_entries(z, z_teacher, block_rows, divergence, scratch)
        result = torch.addcmul(
            entries, q, factors.gradient_sum[block], value=-1.0, out=scratch.get("result", len(z))
        )
        result.mul_(factors.divergence[block])
        if factors.cross_entropy is not None:
            weight, columns = factors.cross_entropy[block], factors.label_columns[block]
            if divergence.temperature != 1.0:
                _probabilities(
                    z, block_rows.student_top, block_rows.student_unit_log_mass, 1.0, out=q
                )
            result.addcmul_(q, weight)
            owned = ((columns >= 0) & (columns < num_columns)).nonzero().squeeze(1)
            result[owned, columns[owned]] -= weight[owned, 0]
        out[block, :num_columns] = result


def _recompute_entries(
    student, teacher, rows: RowScalars, divergence: Divergence, scratch: _Scratch
):
    """A and Q of a block, as in `compare`."""
    q, p, d, e = _ratios(student, teacher, rows, divergence.temperature, scratch)
    p_minus_q = None
    if divergence.kind == "forward_kl":
        p_minus_q = _p_minus_q(q, p, d, e, scratch.get("p_minus_q", len(q)))
    entries, value = _entries(divergence.kind, divergence.beta, q, p, d, e, p_minus_q, scratch)
    if divergence.clip is not None:
        _clipped_entries(divergence, entries, value, q)
    return entries, q
