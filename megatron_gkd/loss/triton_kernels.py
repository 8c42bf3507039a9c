"""The three passes as Triton kernels, for CUDA; the letters are divergence.py's.

Of a row, with its maxima t, masses m and log-sum-exps over all ranks, and of one column of it:

    statistics      m = sum exp((z - t) / T), and with metrics sum x exp(x) of x = (z - t) / T
    Q, P            exp((z - t) / T - log m), of the student's z and of the teacher's
    d               log P - log Q = (z_teacher - z_student) / T - shift
    e               exp(-|d|) - 1, so that P - Q = max(P, Q) e with the sign of -d
    jsd             log(M/P) = c + max(-d, 0), log(M/Q) = c + max(d, 0) with c = log1p(e (d > 0 ? b : 1 - b))
                    A = -b Q log(M/Q), entry A - (1 - b) P log(M/P)
    forward_kl      A = Q - P, entry P d - (P - Q)
    reverse_kl      A = -Q d, entry (P - Q) - Q d
    with a clip c   an entry above c (of a KL without its P - Q) counts as c, and A there is 0, Q or -Q
    gradient        w_jsd / T (A - Q sum A) + w_sft (exp(z - t - log m_1) - onehot), m_1 the mass at T = 1

    statistics      one program a row, online: a new maximum rescales what was summed; reads each side once
    compare         one program a row: the divergence's sums; reads both sides once
    write_gradient  one program a row and block: the gradient; reads both sides once, writes once, also in place

With bfloat16 logits that is 4 + 4 + 6 bytes a logit. The two reductions over the vocabulary (and
over the ranks) lie between the passes, so no two of them can share a read. Sums are kept a lane in
float32 over the row's blocks and added up at its end; rows' results are float64. Columns that do
not exist are read as -inf: Q = P = 0, and d is set to 0.

Instructions, not bytes, are scarce at these sizes. Exponentials are of base 2, with log2(e) in the
factors and the rows' scalars; log1p and expm1 are polynomials near 0, where log and exp lose all
digits. Of a bfloat16 jsd at b = 0.5 ptxas makes 104 instructions a logit for sm_90
(docs/benchmarks/loss.md).

`write_gradient` reads and writes every entry in one program once, so its output may be one of its
inputs.
"""

import math

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from megatron_gkd.loss.divergence import (
    KINDS,
    Divergence,
    GradientFactors,
    RowScalars,
    SideStatistics,
    Sums,
    empty_statistics,
)

BLOCK = 4096  # columns of a row that a program handles at a time, at most
NUM_WARPS = 8
OPTIONS = {
    "num_warps": NUM_WARPS,
    "enable_fp_fusion": True,
}  # Triton 3.10 no longer fuses by itself
KEEPS_ENTRIES_OF = ()  # A is cheaper computed twice than written and read

JSD = tl.constexpr(KINDS.index("jsd"))
FORWARD_KL = tl.constexpr(KINDS.index("forward_kl"))
REVERSE_KL = tl.constexpr(KINDS.index("reverse_kl"))
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
# libdevice's exp2 and fast_log2f are one or two instructions (they flush denormals) where tl's are
# 4 and about 20. The interpreter has tl's alone.
ON_DEVICE = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def _exp2(x):
    if ON_DEVICE:
        return libdevice.exp2(x)
    return tl.exp2(x)


@triton.jit
def _log2(x):
    if ON_DEVICE:
        return libdevice.fast_log2f(x)
    return tl.log2(x)


@triton.jit
def _expm1(x):
    """2^x - 1 for x <= 0, accurate near 0 too: Taylor's series above -0.5."""
    series = 1.5252734e-5
    series = 1.5403530e-4 + x * series
    series = 1.3333558e-3 + x * series
    series = 9.6181291e-3 + x * series
    series = 5.5504109e-2 + x * series
    series = 2.4022651e-1 + x * series
    series = 6.9314718e-1 + x * series
    return tl.where(x > -0.5, x * series, _exp2(x) - 1.0)


@triton.jit
def _log1p_of_half(e):
    """log(1 + e / 2) for -1 <= e <= 0: a polynomial, its first coefficient exact (relative error
    1e-8).
    """
    series = -1.2684850e-3
    series = -2.9582671e-3 + e * series
    series = -4.3348279e-3 + e * series
    series = -1.4075917e-3 + e * series
    series = -3.5400532e-3 + e * series
    series = 6.0596508e-3 + e * series
    series = -1.5644069e-2 + e * series
    series = 4.1665941e-2 + e * series
    series = -0.125 + e * series
    series = 0.5 + e * series
    return e * series


@triton.jit
def _log1p(y):
    """log(1 + y) for -1 < y <= 0: above -0.3 a polynomial, its first coefficient exact (relative
    error 4e-8).
    """
    series = 0.34709738
    series = -0.085374228 + y * series
    series = 0.21365534 + y * series
    series = -0.24900024 + y * series
    series = 0.33335955 + y * series
    series = -0.49999989 + y * series
    series = 1.0 + y * series
    return tl.where(y > -0.3, y * series, _log2(1.0 + tl.maximum(y, -0.9999999)) * LN_2)


@triton.jit
def _statistics_kernel(
    logits,
    row_stride,
    num_columns,
    labels,
    first_column,
    scale,
    out,
    num_rows,
    METRICS: tl.constexpr,
    LABELS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    lanes = tl.arange(0, BLOCK)
    top = -float("inf")
    top_column = 0
    mass = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    unit_mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + lanes
        valid = columns < num_columns
        z = tl.load(logits + columns, mask=valid, other=-float("inf")).to(tl.float32)
        block_top = tl.max(z, 0)
        new_top = tl.maximum(top, block_top)
        if METRICS:
            block_column = tl.min(tl.where(z == block_top, columns, num_columns), 0)
            top_column = tl.where(block_top > top, block_column, top_column)
        shift = tl.where(start == 0, 0.0, (top - new_top) * scale)
        factor = _exp2(shift)
        x = (z - new_top) * scale
        exponentials = _exp2(x)
        if METRICS:
            moment = (moment + shift * mass) * factor + tl.where(valid, x, 0.0) * exponentials
        mass = mass * factor + exponentials
        if UNIT:
            unit_factor = tl.where(start == 0, 0.0, _exp2((top - new_top) * LOG2_E))
            unit_mass = unit_mass * unit_factor + _exp2((z - new_top) * LOG2_E)
        top = new_top
    out += row
    tl.store(out, top.to(tl.float64))
    if METRICS:
        tl.store(out + num_rows, (top_column + first_column).to(tl.float64))
        tl.store(out + 3 * num_rows, (tl.sum(moment, 0) * LN_2).to(tl.float64))
    tl.store(out + 2 * num_rows, tl.sum(mass, 0).to(tl.float64))
    if LABELS:
        if UNIT:
            tl.store(out + 4 * num_rows, tl.sum(unit_mass, 0).to(tl.float64))
        else:
            tl.store(out + 4 * num_rows, tl.sum(mass, 0).to(tl.float64))
        column = tl.load(labels + row) - first_column
        owned = (column >= 0) & (column < num_columns)
        label_logit = tl.load(logits + column, mask=owned, other=0.0)
        tl.store(out + 5 * num_rows, label_logit.to(tl.float64))


@triton.jit
def _ratios(student, teacher, columns, valid, rows, row, num_rows, scale):
    """z_student, Q, P, d / ln 2, e and P - Q of a block; student and teacher point to the row."""
    z_student = tl.load(student + columns, mask=valid, other=-float("inf")).to(tl.float32)
    z_teacher = tl.load(teacher + columns, mask=valid, other=-float("inf")).to(tl.float32)
    student_top = tl.load(rows + row)
    student_log_mass = tl.load(rows + num_rows + row)
    teacher_top = tl.load(rows + 3 * num_rows + row)
    teacher_log_mass = tl.load(rows + 4 * num_rows + row)
    shift = tl.load(rows + 5 * num_rows + row)
    q = _exp2((z_student - student_top) * scale - student_log_mass)
    p = _exp2((z_teacher - teacher_top) * scale - teacher_log_mass)
    d = tl.where(valid, (z_teacher - z_student) * scale - shift, 0.0)
    e = _expm1(-tl.abs(d))
    larger_e = tl.maximum(p, q) * e
    return z_student, q, p, d, e, tl.where(d > 0.0, -larger_e, larger_e)


@triton.jit
def _entries(
    q, p, d, e, p_minus_q, beta, clip, KIND: tl.constexpr, HALF: tl.constexpr, CLIP: tl.constexpr
):
    """(A, the divergence's entries) of a block; entries of a KL are with their y - x. HALF: beta is
    0.5.
    """
    if KIND == JSD:
        if HALF:
            common = _log1p_of_half(e)
        else:
            common = _log1p(e * tl.where(d > 0.0, beta, 1.0 - beta))
        entries = -beta * q * (common + tl.maximum(d, 0.0) * LN_2)
        value = entries - (1.0 - beta) * p * (common + tl.maximum(-d, 0.0) * LN_2)
        plain, beyond = value, 0.0 * q
    elif KIND == FORWARD_KL:
        entries, plain, beyond = -p_minus_q, d * LN_2 * p, q
        value = plain - p_minus_q
    else:
        entries, plain, beyond = -d * LN_2 * q, -d * LN_2 * q, -q
        value = plain + p_minus_q
    if CLIP:
        entries = tl.where(plain > clip, beyond, entries)
        value -= tl.where(plain > clip, plain - clip, 0.0)
    return entries, value


@triton.jit
def _compare_kernel(
    student,
    student_stride,
    teacher,
    teacher_stride,
    num_columns,
    rows,
    scale,
    beta,
    clip,
    out,
    num_rows,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    CLIP: tl.constexpr,
    METRICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    divergence = tl.zeros([BLOCK], tl.float32)
    gradient_sum = tl.zeros([BLOCK], tl.float32)
    kl_forward = tl.zeros([BLOCK], tl.float32)
    kl_reverse = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + lanes
        valid = columns < num_columns
        _, q, p, d, e, p_minus_q = _ratios(
            student, teacher, columns, valid, rows, row, num_rows, scale
        )
        entries, value = _entries(q, p, d, e, p_minus_q, beta, clip, KIND, HALF, CLIP)
        divergence += value
        gradient_sum += entries
        if METRICS:
            kl_forward += d * LN_2 * p - p_minus_q
            kl_reverse += p_minus_q - d * LN_2 * q
    out += row
    tl.store(out, tl.sum(divergence, 0).to(tl.float64))
    tl.store(out + num_rows, tl.sum(gradient_sum, 0).to(tl.float64))
    if METRICS:
        tl.store(out + 2 * num_rows, tl.sum(kl_forward, 0).to(tl.float64))
        tl.store(out + 3 * num_rows, tl.sum(kl_reverse, 0).to(tl.float64))


@triton.jit
def _gradient_kernel(
    out,
    out_stride,
    width,
    student,
    student_stride,
    teacher,
    teacher_stride,
    num_columns,
    rows,
    scale,
    beta,
    clip,
    divergence_factor,
    gradient_sum,
    cross_entropy_factor,
    label_columns,
    num_rows,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    CLIP: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = columns < num_columns
    student += row * student_stride
    teacher += row * teacher_stride
    z_student, q, p, d, e, p_minus_q = _ratios(
        student, teacher, columns, valid, rows, row, num_rows, scale
    )
    entries, _ = _entries(q, p, d, e, p_minus_q, beta, clip, KIND, HALF, CLIP)
    gradient = (entries - q * tl.load(gradient_sum + row)) * tl.load(divergence_factor + row)
    if CROSS_ENTROPY:
        unit_log_mass = tl.load(rows + 2 * num_rows + row)
        softmax = _exp2((z_student - tl.load(rows + row)) * LOG2_E - unit_log_mass)
        onehot = tl.where(valid & (columns == tl.load(label_columns + row)), 1.0, 0.0)
        gradient += tl.load(cross_entropy_factor + row) * (softmax - onehot)
    tl.store(
        out + row * out_stride + columns, gradient.to(out.dtype.element_ty), mask=columns < width
    )


def _block(num_columns: int) -> int:
    return min(BLOCK, triton.next_power_of_2(max(num_columns, 16)))


def _check_rows(*matrices: torch.Tensor) -> None:
    if any(matrix.stride(1) != 1 for matrix in matrices):
        raise ValueError(
            "logits must be contiguous along the vocabulary: call .contiguous() before the loss"
        )


def _in_base_2(rows: RowScalars) -> torch.Tensor:
    """[6, N] in RowScalars' order, the logarithms divided by ln 2."""
    logarithms = (
        "student_log_mass",
        "student_unit_log_mass",
        "teacher_log_mass",
        "log_ratio_shift",
    )
    rows = rows._replace(**{name: getattr(rows, name) * LOG2_E.value for name in logarithms})
    return torch.cat(rows, 1).t().contiguous()


def statistics(
    logits: torch.Tensor,
    num_columns: int,
    temperature: float,
    first_column: int,
    labels: torch.Tensor | None,
    metrics: bool,
) -> SideStatistics:
    """As blocked.statistics."""
    _check_rows(logits)
    num_rows = len(logits)
    if num_columns == 0:
        return empty_statistics(num_rows, logits.device)
    out = torch.zeros(
        len(SideStatistics._fields), num_rows, dtype=torch.float64, device=logits.device
    )
    _statistics_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        num_columns,
        labels.contiguous() if labels is not None else logits,
        first_column,
        LOG2_E.value / temperature,
        out,
        num_rows,
        METRICS=metrics,
        LABELS=labels is not None,
        UNIT=labels is not None and temperature != 1.0,
        BLOCK=_block(num_columns),
        **OPTIONS,
    )
    return SideStatistics(*out)


def compare(
    student: torch.Tensor,
    teacher: torch.Tensor,
    num_columns: int,
    rows: RowScalars,
    divergence: Divergence,
    metrics: bool,
    entries_out: None = None,
) -> Sums:
    """As blocked.compare, which alone keeps A."""
    _check_rows(student, teacher)
    num_rows = len(student)
    out = torch.zeros(len(Sums._fields), num_rows, dtype=torch.float64, device=student.device)
    _compare_kernel[(num_rows,)](
        student,
        student.stride(0),
        teacher,
        teacher.stride(0),
        num_columns,
        _in_base_2(rows),
        LOG2_E.value / divergence.temperature,
        divergence.beta,
        divergence.clip or 0.0,
        out,
        num_rows,
        KIND=KINDS.index(divergence.kind),
        HALF=divergence.beta == 0.5,
        CLIP=divergence.clip is not None,
        METRICS=metrics,
        BLOCK=_block(num_columns),
        **OPTIONS,
    )
    return Sums(*out)


def write_gradient(
    out: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    num_columns: int,
    rows: RowScalars,
    divergence: Divergence,
    factors: GradientFactors,
) -> None:
    """As blocked.write_gradient."""
    _check_rows(out, student, teacher)
    num_rows, width = out.shape
    cross_entropy = factors.cross_entropy is not None
    block = _block(width)
    _gradient_kernel[(num_rows, triton.cdiv(width, block))](
        out,
        out.stride(0),
        width,
        student,
        student.stride(0),
        teacher,
        teacher.stride(0),
        num_columns,
        _in_base_2(rows),
        LOG2_E.value / divergence.temperature,
        divergence.beta,
        divergence.clip or 0.0,
        factors.divergence.contiguous(),
        factors.gradient_sum.contiguous(),
        factors.cross_entropy.contiguous() if cross_entropy else factors.divergence,
        factors.label_columns.contiguous() if cross_entropy else factors.divergence,
        num_rows,
        KIND=KINDS.index(divergence.kind),
        HALF=divergence.beta == 0.5,
        CLIP=divergence.clip is not None,
        CROSS_ENTROPY=cross_entropy,
        BLOCK=block,
        **OPTIONS,
    )
