"""The three passes as Triton kernels, for CUDA (mathematics and letters: divergence.py).

    statistics      one program a row: online max and sum of exponentials; reads each side once
    compare         one program a row: the divergence's sums; reads both sides once
    write_gradient  one program a row and block: A - Q sum(A), scaled; reads both sides once, writes once, also in place

With bfloat16 logits that is 4 + 4 + 6 bytes a logit. The two reductions over the vocabulary (and over the ranks) lie
between the passes, so no two of them can share a read. Sums are kept a lane in float32 over the row's blocks and added
up at its end; rows' results are float64. log1p and expm1 are written out: log and exp lose all digits near 0.

`write_gradient` reads and writes every entry in one program once, so its output may be one of its inputs.
"""

from typing import Optional

import torch
import triton
import triton.language as tl

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
KEEPS_ENTRIES_OF = ()  # A is cheaper computed twice than written and read

JSD = tl.constexpr(KINDS.index("jsd"))
FORWARD_KL = tl.constexpr(KINDS.index("forward_kl"))
REVERSE_KL = tl.constexpr(KINDS.index("reverse_kl"))


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, accurate near 0 too: Taylor's series above -0.5."""
    series = 1.0 + x / 8.0
    series = 1.0 + x / 7.0 * series
    series = 1.0 + x / 6.0 * series
    series = 1.0 + x / 5.0 * series
    series = 1.0 + x / 4.0 * series
    series = 1.0 + x / 3.0 * series
    series = 1.0 + x / 2.0 * series
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def _log1p(y):
    """log(1 + y) for -1 < y <= 0, accurate near 0 too: 2 atanh(y / (2 + y)) as a series above -0.3."""
    s = y / (2.0 + y)
    square = s * s
    series = 1.0 / 9.0 + square * (1.0 / 11.0)
    series = 1.0 / 7.0 + square * series
    series = 1.0 / 5.0 + square * series
    series = 1.0 / 3.0 + square * series
    return tl.where(y > -0.3, 2.0 * s * (1.0 + square * series), tl.log(1.0 + tl.maximum(y, -0.9999999)))


@triton.jit
def _statistics_kernel(
    logits,
    row_stride,
    num_columns,
    labels,
    first_column,
    inverse_temperature,
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
        shift = tl.where(start == 0, 0.0, (top - new_top) * inverse_temperature)
        scale = tl.exp(shift)
        x = tl.where(valid, (z - new_top) * inverse_temperature, 0.0)
        exponentials = tl.where(valid, tl.exp(x), 0.0)
        if METRICS:
            moment = (moment + shift * mass) * scale + x * exponentials
        mass = mass * scale + exponentials
        if UNIT:
            unit_scale = tl.where(start == 0, 0.0, tl.exp(top - new_top))
            unit_mass = unit_mass * unit_scale + tl.where(valid, tl.exp(z - new_top), 0.0)
        top = new_top
    out += row
    tl.store(out, top.to(tl.float64))
    if METRICS:
        tl.store(out + num_rows, (top_column + first_column).to(tl.float64))
        tl.store(out + 3 * num_rows, tl.sum(moment, 0).to(tl.float64))
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
def _ratios(z_student, z_teacher, rows, row, num_rows, inverse_temperature):
    """Q, P, d, P - Q and e of a block; rows is [6, N], RowScalars in their order."""
    student_top = tl.load(rows + row)
    student_log_mass = tl.load(rows + num_rows + row)
    teacher_top = tl.load(rows + 3 * num_rows + row)
    teacher_log_mass = tl.load(rows + 4 * num_rows + row)
    shift = tl.load(rows + 5 * num_rows + row)
    q = tl.exp((z_student - student_top) * inverse_temperature - student_log_mass)
    p = tl.exp((z_teacher - teacher_top) * inverse_temperature - teacher_log_mass)
    d = (z_teacher - z_student) * inverse_temperature - shift
    e = _expm1(-tl.abs(d))
    larger_e = tl.maximum(p, q) * e
    return q, p, d, tl.where(d > 0.0, -larger_e, larger_e), e


@triton.jit
def _entries(q, p, d, p_minus_q, e, beta, clip, KIND: tl.constexpr, CLIP: tl.constexpr):
    """(A, the divergence's entries) of a block; entries of a KL are with their y - x."""
    if KIND == JSD:
        common = _log1p(e * tl.where(d > 0.0, beta, 1.0 - beta))
        entries = -beta * q * (common + tl.maximum(d, 0.0))
        value = entries - (1.0 - beta) * p * (common + tl.maximum(-d, 0.0))
        plain, beyond = value, 0.0 * q
    elif KIND == FORWARD_KL:
        entries, plain, beyond = -p_minus_q, p * d, q
        value = plain - p_minus_q
    else:
        entries, plain, beyond = -q * d, -q * d, -q
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
    inverse_temperature,
    beta,
    clip,
    out,
    num_rows,
    KIND: tl.constexpr,
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
        z_student = tl.load(student + columns, mask=valid, other=0.0).to(tl.float32)
        z_teacher = tl.load(teacher + columns, mask=valid, other=0.0).to(tl.float32)
        q, p, d, p_minus_q, e = _ratios(z_student, z_teacher, rows, row, num_rows, inverse_temperature)
        entries, value = _entries(q, p, d, p_minus_q, e, beta, clip, KIND, CLIP)
        divergence += tl.where(valid, value, 0.0)
        gradient_sum += tl.where(valid, entries, 0.0)
        if METRICS:
            kl_forward += tl.where(valid, p * d - p_minus_q, 0.0)
            kl_reverse += tl.where(valid, p_minus_q - q * d, 0.0)
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
    inverse_temperature,
    beta,
    clip,
    divergence_factor,
    gradient_sum,
    cross_entropy_factor,
    label_columns,
    num_rows,
    KIND: tl.constexpr,
    CLIP: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = columns < num_columns
    z_student = tl.load(student + row * student_stride + columns, mask=valid, other=0.0).to(tl.float32)
    z_teacher = tl.load(teacher + row * teacher_stride + columns, mask=valid, other=0.0).to(tl.float32)
    q, p, d, p_minus_q, e = _ratios(z_student, z_teacher, rows, row, num_rows, inverse_temperature)
    entries, _ = _entries(q, p, d, p_minus_q, e, beta, clip, KIND, CLIP)
    gradient = (entries - q * tl.load(gradient_sum + row)) * tl.load(divergence_factor + row)
    if CROSS_ENTROPY:
        unit_log_mass = tl.load(rows + 2 * num_rows + row)
        softmax = tl.exp(z_student - tl.load(rows + row) - unit_log_mass)
        onehot = tl.where(columns == tl.load(label_columns + row), 1.0, 0.0)
        gradient += tl.load(cross_entropy_factor + row) * (softmax - onehot)
    gradient = tl.where(valid, gradient, 0.0)
    tl.store(out + row * out_stride + columns, gradient.to(out.dtype.element_ty), mask=columns < width)


def _block(num_columns: int) -> int:
    return min(BLOCK, triton.next_power_of_2(max(num_columns, 16)))


def _check_rows(*matrices: torch.Tensor) -> None:
    if any(matrix.stride(1) != 1 for matrix in matrices):
        raise ValueError("logits must be contiguous along the vocabulary: call .contiguous() before the loss")


def statistics(
    logits: torch.Tensor,
    num_columns: int,
    temperature: float,
    first_column: int,
    labels: Optional[torch.Tensor],
    metrics: bool,
) -> SideStatistics:
    """As blocked.statistics."""
    _check_rows(logits)
    num_rows = len(logits)
    if num_columns == 0:
        return empty_statistics(num_rows, logits.device)
    out = torch.zeros(len(SideStatistics._fields), num_rows, dtype=torch.float64, device=logits.device)
    _statistics_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        num_columns,
        labels if labels is not None else logits,
        first_column,
        1.0 / temperature,
        out,
        num_rows,
        METRICS=metrics,
        LABELS=labels is not None,
        UNIT=labels is not None and temperature != 1.0,
        BLOCK=_block(num_columns),
        num_warps=NUM_WARPS,
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
        torch.cat(rows, 1).t().contiguous(),
        1.0 / divergence.temperature,
        divergence.beta,
        divergence.clip or 0.0,
        out,
        num_rows,
        KIND=KINDS.index(divergence.kind),
        CLIP=divergence.clip is not None,
        METRICS=metrics,
        BLOCK=_block(num_columns),
        num_warps=NUM_WARPS,
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
        torch.cat(rows, 1).t().contiguous(),
        1.0 / divergence.temperature,
        divergence.beta,
        divergence.clip or 0.0,
        factors.divergence,
        factors.gradient_sum,
        factors.cross_entropy if cross_entropy else factors.divergence,
        factors.label_columns if cross_entropy else factors.divergence,
        num_rows,
        KIND=KINDS.index(divergence.kind),
        CLIP=divergence.clip is not None,
        CROSS_ENTROPY=cross_entropy,
        BLOCK=block,
        num_warps=NUM_WARPS,
    )
