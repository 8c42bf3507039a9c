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

from megatron_gkd.loss.divergence import KINDS, Divergence
from megatron_gkd.loss.rows import (
    GradientFactors,
    RowScalars,
    SideStatistics,
    Sums,
    add_kl,
    empty_statistics,
)

# Logits of one side in a block. CPU: what stays in cache (2**18, 2**21: a quarter slower).
BLOCK_ENTRIES = {"cpu": 2**19}
DEVICE_BLOCK_ENTRIES = 2**24  # what fills a GPU
LOG2_E = math.log2(math.e)
SEGMENT = 512  # columns among which the largest logit is looked for by index
# Of logits of these dtypes `compare` may write A to `a_out`, and `write_gradient` takes it.
DTYPES_THAT_KEEP_A = (torch.float32,)


class _Scratch:
    """Float32 [rows, V] buffers, made at their first use, one for each name."""

    def __init__(self, num_rows: int, num_columns: int, device: torch.device):
        self.shape, self.device = (num_rows, num_columns), device
        self.buffers: dict[str, torch.Tensor] = {}

    def get(self, name: str, num_rows: int) -> torch.Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        return self.buffers[name][:num_rows]

    def float32(self, name: str, logits: torch.Tensor) -> torch.Tensor:
        """The logits, if they are float32, otherwise a copy in the named buffer."""
        if logits.dtype == torch.float32:
            return logits
        return self.get(name, len(logits)).copy_(logits)


def _blocks(
    num_rows: int, num_columns: int, device: torch.device
) -> tuple[_Scratch, Iterator[slice]]:
    """Scratch for blocks of at most BLOCK_ENTRIES logits (at least one row), and their rows."""
    num_entries = BLOCK_ENTRIES.get(device.type, DEVICE_BLOCK_ENTRIES)
    size = min(num_rows, max(1, num_entries // num_columns))
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
    rest_of: tuple[torch.Tensor, RowScalars] | None = None,
) -> SideStatistics:
    """Statistics of one side, of the first `num_columns` columns of logits [N, W] of any floating
    dtype.

    first_column: global number of this rank's first column; labels: [N] global columns, or None.
    rest_of: the teacher's logits and the scalars of a top K, outside of which the columns are that
    count. Where there are none, `top` is the lowest number and sum_exp means nothing.
    Without `metrics` top_column and moment are zeros, without `labels` unit_sum_exp and label_logit
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
        if rest_of is not None:
            is_rest = rest_of[1].of_rows(block).is_rest(rest_of[0][block, :num_columns])
            z = torch.where(is_rest, z, torch.finfo(torch.float32).min)
        if metrics:
            top, column = _top_and_column(z)
            result.top_column[block] = column.double() + first_column
        else:
            top = z.amax(-1, keepdim=True)
        result.top[block] = top.squeeze(1).double()
        x = torch.sub(z, top, out=scratch.get("x", len(z))).mul_(LOG2_E / temperature)
        exponentials = torch.exp2(x, out=scratch.get("exponentials", len(z)))
        result.sum_exp[block] = exponentials.sum(-1).double()
        if metrics:
            result.moment[block] = exponentials.mul_(x).sum(-1).double() / LOG2_E
        if labels is not None:
            if temperature != 1.0:
                torch.exp2(x.mul_(temperature), out=exponentials)
                result.unit_sum_exp[block] = exponentials.sum(-1).double()
            column = labels[block] - first_column
            owned = (column >= 0) & (column < num_columns)
            picked = z.gather(1, column.clamp(0, num_columns - 1).unsqueeze(1)).squeeze(1)
            result.label_logit[block] = torch.where(owned, picked.double(), 0.0)
    if labels is not None and temperature == 1.0:
        result = result._replace(unit_sum_exp=result.sum_exp)
    return result


def _probabilities(
    z: torch.Tensor,
    top: torch.Tensor,
    log_sum_exp: torch.Tensor,
    temperature: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """exp((z - top) / T - log_sum_exp) [R, V]; top and log_sum_exp [R, 1]."""
    torch.sub(z, top, out=out)
    torch.add(log_sum_exp * -LOG2_E, out, alpha=LOG2_E / temperature, out=out)
    return torch.exp2(out, out=out)


class _Block:
    """Q, P, d and e of some rows, float32 [R, V] each, in scratch: divergence.TorchBlock."""

    def __init__(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        scalars: RowScalars,
        temperature: float,
        scratch: _Scratch,
    ):
        self.scratch, self.scalars, num_rows = scratch, scalars, len(student)
        rest_shift = scalars.rest_shift
        self.is_rest = None if rest_shift is None else scalars.is_rest(teacher)
        if self.is_rest is not None and rest_shift is not None:
            of_rest = torch.add(student, rest_shift, out=scratch.get("of_rest", num_rows))
            teacher = torch.where(self.is_rest, of_rest, teacher, out=of_rest)
        self.q = _probabilities(
            student,
            scalars.student_top,
            scalars.student_log_sum_exp,
            temperature,
            scratch.get("q", num_rows),
        )
        self.p = _probabilities(
            teacher,
            scalars.teacher_top,
            scalars.teacher_log_sum_exp,
            temperature,
            scratch.get("p", num_rows),
        )
        self.d = torch.sub(teacher, student, out=scratch.get("d", num_rows))
        if self.is_rest is not None and rest_shift is not None:  # not rounded by the sum above
            torch.where(self.is_rest, rest_shift, self.d, out=self.d)
        self.d.sub_(scalars.shift)
        if temperature != 1.0:
            self.d.mul_(1.0 / temperature)
        self.e = torch.copysign(self.d, -1.0, out=scratch.get("e", num_rows)).expm1_()
        self._p_minus_q: torch.Tensor | None = None

    def p_minus_q(self) -> torch.Tensor:
        """P - Q, accurate also where they are nearly equal; computed once."""
        if self._p_minus_q is None:
            larger = torch.maximum(self.p, self.q, out=self.scratch.get("p_minus_q", len(self.q)))
            self._p_minus_q = torch.copysign(larger.mul_(self.e), self.d, out=larger)
        return self._p_minus_q

    def log_m_over_q_and_p(self, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
        """log(M/Q) and log(M/P); overwrites d and e."""
        d, e, num_rows = self.d, self.e, len(self.d)
        if beta == 0.5:
            common = e.mul_(0.5)
        else:  # e times (d > 0 ? b : 1 - b)
            signed = torch.copysign(e, d, out=self.scratch.get("signed", num_rows))
            common = e.mul_(0.5).sub_(signed, alpha=beta - 0.5)
        common.log1p_()
        log_m_over_q = torch.clamp_min(d, 0.0, out=self.scratch.get("log_m_over_q", num_rows))
        log_m_over_q.add_(common)
        log_m_over_p = torch.sub(common, d.clamp_max_(0.0), out=d)
        return log_m_over_q, log_m_over_p

    def limit(self, clip: float) -> float | torch.Tensor:
        """Most that an entry counts: of one of the rest its share of the rest's."""
        if self.is_rest is None or self.scalars.rest_mass is None:
            return clip
        tiny = torch.finfo(torch.float32).tiny
        of_rest = self.q * (clip / self.scalars.rest_mass.clamp_min(tiny))
        return torch.where(self.is_rest, of_rest, clip)

    def kl_forward_sum(self) -> torch.Tensor:
        """KL(P||Q) over these columns, float32 [R]."""
        term = torch.mul(self.p, self.d, out=self.scratch.get("term", len(self.q)))
        return term.sub_(self.p_minus_q()).sum(-1)

    def kl_reverse_sum(self) -> torch.Tensor:
        """KL(Q||P) over these columns, float32 [R]."""
        term = self.scratch.get("term", len(self.q))
        return torch.addcmul(self.p_minus_q(), self.q, self.d, value=-1.0, out=term).sum(-1)


def _clip(
    block: _Block, a: torch.Tensor, summands: torch.Tensor, clip: float, a_beyond_clip: float
) -> torch.Tensor:
    """What the divergence's `summands` are above `clip`, [R, V]; there A in `a` is
    overwritten as divergence.py says.
    """
    limit = block.limit(clip)
    above = summands > limit
    excess = torch.where(above, summands - limit, 0.0)
    a.copy_(torch.where(above, block.q * a_beyond_clip, a))
    return excess


def compare(
    student: torch.Tensor,
    teacher: torch.Tensor,
    num_columns: int,
    scalars: RowScalars,
    divergence: Divergence,
    metrics: bool,
    a_out: torch.Tensor | None = None,
) -> Sums:
    """The divergence's sums over the first `num_columns` columns of student and teacher logits [N,
    W] of any dtype.

    Without `metrics`, kl_forward and kl_reverse are zeros unless one of them is the divergence.
    a_out: float32 [N, W] for A, or None; may be one of the logits.
    """
    num_rows, kind = len(student), KINDS[divergence.kind]
    sums = Sums(
        *(torch.zeros(num_rows, dtype=torch.float64, device=student.device) for _ in Sums._fields)
    )
    if num_columns == 0:
        return sums
    needed = kind.needed_sums(metrics)
    scratch, blocks = _blocks(num_rows, num_columns, student.device)
    for rows in blocks:
        block = _Block(
            scratch.float32("z_student", student[rows, :num_columns]),
            scratch.float32("z_teacher", teacher[rows, :num_columns]),
            scalars.of_rows(rows),
            divergence.temperature,
            scratch,
        )
        if needed.kl_forward:
            sums.kl_forward[rows] = block.kl_forward_sum().double()
        if needed.kl_reverse:
            sums.kl_reverse[rows] = block.kl_reverse_sum().double()
        a, summands = kind.torch_rule(block, divergence.beta)
        if needed.entries:
            sums.divergence[rows] = summands.sum(-1).double()
        if divergence.clip is not None:
            excess = _clip(block, a, summands, divergence.clip, kind.a_beyond_clip)
            sums.divergence[rows] -= excess.sum(-1).double()
        sums.gradient_sum[rows] = a.sum(-1).double()
        if a_out is not None:
            a_out[rows, :num_columns] = a
    return add_kl(sums, kind)


def _recompute_a(block: _Block, divergence: Divergence) -> tuple[torch.Tensor, torch.Tensor]:
    """A and Q of a block, as in `compare`."""
    kind = KINDS[divergence.kind]
    a, summands = kind.torch_rule(block, divergence.beta)
    if divergence.clip is not None:
        _clip(block, a, summands, divergence.clip, kind.a_beyond_clip)
    return a, block.q


def write_gradient(
    out: torch.Tensor,
    student: torch.Tensor,
    teacher_or_a: torch.Tensor,
    num_columns: int,
    scalars: RowScalars,
    divergence: Divergence,
    factors: GradientFactors,
) -> None:
    """out [N, W] = the loss's gradient w.r.t. the student's logits [N, W], 0 in padded columns.

    teacher_or_a: A as `compare` wrote it if student's dtype is in DTYPES_THAT_KEEP_A,
    otherwise the teacher's logits. out may be one of the inputs.
    """
    out[:, num_columns:] = 0
    if num_columns == 0:
        return
    temperature, (cross_entropy, label_columns) = divergence.temperature, factors[2:]
    scratch, blocks = _blocks(len(student), num_columns, student.device)
    for rows in blocks:
        own = scalars.of_rows(rows)
        z = scratch.float32("z_student", student[rows, :num_columns])
        second = teacher_or_a[rows, :num_columns]
        if student.dtype in DTYPES_THAT_KEEP_A:
            q = scratch.get("q", len(z))
            _probabilities(z, own.student_top, own.student_log_sum_exp, temperature, out=q)
            a = second
        else:
            z_teacher = scratch.float32("z_teacher", second)
            block = _Block(z, z_teacher, own, temperature, scratch)
            a, q = _recompute_a(block, divergence)
        result = torch.addcmul(
            a, q, factors.gradient_sum[rows], value=-1.0, out=scratch.get("result", len(z))
        )
        result.mul_(factors.divergence[rows])
        if cross_entropy is not None and label_columns is not None:
            weight, columns = cross_entropy[rows], label_columns[rows]
            if temperature != 1.0:
                _probabilities(z, own.student_top, own.student_unit_log_sum_exp, 1.0, out=q)
            result.addcmul_(q, weight)
            owned = ((columns >= 0) & (columns < num_columns)).nonzero().squeeze(1)
            result[owned, columns[owned]] -= weight[owned, 0]
        out[rows, :num_columns] = result
