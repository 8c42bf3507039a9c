"""The three passes as Triton kernels, for CUDA; the letters are divergence.py's.

Of a row, with its maxima t and log-sum-exps l over all ranks, and of one column of it:

    statistics      sum exp((z - t) / T), and with metrics sum x exp(x) of x = (z - t) / T
    A, entry        triton_functions.a_and_summands
    gradient        w_divergence / T (A - Q sum A) + w_cross_entropy (exp(z - t - l_1) - onehot),
                    l_1 the log-sum-exp at T = 1

    statistics      one program a row, online: a new maximum rescales what was summed; reads each
                    side once
    compare         one program a row: the divergence's sums; reads both sides once
    write_gradient  one program a row and block: the gradient; reads both sides once, writes once,
                    also in place

With bfloat16 logits that is 4 + 4 + 6 bytes a logit. The two reductions over the vocabulary (and
over the ranks) lie between the passes, so no two of them can share a read. Each lane sums in
float32 over the row's blocks, and the lanes are added up at the row's end; rows' results are
float64. Columns that do not exist are read as -inf: Q = P = 0, and d is set to 0.

Instructions, not bytes, are scarce at these sizes. Exponentials are of base 2, with log2(e) in the
factors and the rows' scalars. Of a bfloat16 jsd at b = 0.5 ptxas makes 106 instructions a logit for
sm_90 (docs/benchmarks/loss.md).

`write_gradient` reads and writes every entry in one program once, so its output may be one of its
inputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from megatron_gkd.loss.divergence import KINDS, Divergence
from megatron_gkd.loss.rows import (
    GradientFactors,
    RowScalars,
    SideStatistics,
    Sums,
    add_kl,
    empty_statistics,
)
from megatron_gkd.loss.triton_functions import (
    LN_2,
    LOG2_E,
    ON_DEVICE,
    a_and_summands,
    exp2,
    is_outside,
)

BLOCK = 4096  # columns of a row that a program handles at a time, at most
NUM_WARPS = 8
# Triton 3.10 no longer fuses multiplications and additions by itself.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
DTYPES_THAT_KEEP_A = ()  # none: A is cheaper computed twice than written and read
# The interpreter calls plain functions, and refuses to wrap one of a file without triton.language.
RULES = {
    name: triton.jit(kind.rule) if ON_DEVICE.value else kind.rule for name, kind in KINDS.items()
}


@triton.jit
def _statistics_kernel(
    logits: tl.tensor,
    row_stride: tl.tensor,
    num_columns: tl.tensor,
    labels: tl.tensor,
    first_column: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    teacher: tl.tensor,
    teacher_stride: tl.tensor,
    scalars: tl.tensor,
    METRICS: tl.constexpr,
    LABELS: tl.constexpr,
    UNIT: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    teacher += row * teacher_stride
    scalars += row
    lanes = tl.arange(0, BLOCK)
    top = tl.full([], -float("inf"), tl.float32)
    top_column = 0
    sum_exp = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    unit_sum_exp = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + lanes
        valid = columns < num_columns
        z = tl.load(logits + columns, mask=valid, other=-float("inf")).to(tl.float32)
        if REST:
            z_teacher = tl.load(teacher + columns, mask=valid, other=0.0).to(tl.float32)
            is_rest = is_outside(z_teacher, columns, scalars, num_rows)
            z = tl.where(valid & (is_rest == 0), LOWEST, z)
        block_top = tl.max(z, 0)
        new_top = tl.maximum(top, block_top)
        if METRICS:
            block_column = tl.min(tl.where(z == block_top, columns, num_columns), 0)
            top_column = tl.where(block_top > top, block_column, top_column)
        shift = tl.where(start == 0, 0.0, (top - new_top) * scale)
        factor = exp2(shift)
        x = (z - new_top) * scale
        exponentials = exp2(x)
        if METRICS:
            moment = (moment + shift * sum_exp) * factor + tl.where(valid, x, 0.0) * exponentials
        sum_exp = sum_exp * factor + exponentials
        if UNIT:
            unit_factor = tl.where(start == 0, 0.0, exp2((top - new_top) * LOG2_E))
            unit_sum_exp = unit_sum_exp * unit_factor + exp2((z - new_top) * LOG2_E)
        top = new_top
    out += row
    tl.store(out, top.to(tl.float64))
    if METRICS:
        tl.store(out + num_rows, (top_column + first_column).to(tl.float64))
        tl.store(out + 3 * num_rows, (tl.sum(moment, 0) * LN_2).to(tl.float64))
    tl.store(out + 2 * num_rows, tl.sum(sum_exp, 0).to(tl.float64))
    if LABELS:
        if UNIT:
            tl.store(out + 4 * num_rows, tl.sum(unit_sum_exp, 0).to(tl.float64))
        else:
            tl.store(out + 4 * num_rows, tl.sum(sum_exp, 0).to(tl.float64))
        column = tl.load(labels + row) - first_column
        owned = (column >= 0) & (column < num_columns)
        label_logit = tl.load(logits + column, mask=owned, other=0.0)
        tl.store(out + 5 * num_rows, label_logit.to(tl.float64))


@triton.jit
def _compare_kernel(
    student: tl.tensor,
    student_stride: tl.tensor,
    teacher: tl.tensor,
    teacher_stride: tl.tensor,
    num_columns: tl.tensor,
    scalars: tl.tensor,
    scale: tl.tensor,
    beta: tl.tensor,
    clip: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    RULE: tl.constexpr,
    A_BEYOND_CLIP: tl.constexpr,
    HALF: tl.constexpr,
    CLIP: tl.constexpr,
    TOP_K: tl.constexpr,
    SUM_VALUES: tl.constexpr,
    KL_FORWARD: tl.constexpr,
    KL_REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    scalars += row
    lanes = tl.arange(0, BLOCK)
    divergence = tl.zeros([BLOCK], tl.float32)
    gradient_sum = tl.zeros([BLOCK], tl.float32)
    kl_forward = tl.zeros([BLOCK], tl.float32)
    kl_reverse = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + lanes
        valid = columns < num_columns
        _, q, p, d, p_minus_q, a, summands, excess = a_and_summands(
            student, teacher, columns, valid, scalars, num_rows, scale, beta, clip,
            RULE, A_BEYOND_CLIP, HALF, CLIP, TOP_K,
        )  # fmt: skip
        if SUM_VALUES:
            divergence += summands
        if CLIP:
            divergence -= excess
        gradient_sum += a
        if KL_FORWARD:
            kl_forward += d * p - p_minus_q
        if KL_REVERSE:
            kl_reverse += p_minus_q - d * q
    out += row
    if SUM_VALUES or CLIP:
        tl.store(out, tl.sum(divergence, 0).to(tl.float64))
    tl.store(out + num_rows, tl.sum(gradient_sum, 0).to(tl.float64))
    if KL_FORWARD:
        tl.store(out + 2 * num_rows, tl.sum(kl_forward, 0).to(tl.float64))
    if KL_REVERSE:
        tl.store(out + 3 * num_rows, tl.sum(kl_reverse, 0).to(tl.float64))


@triton.jit
def _gradient_kernel(
    out: tl.tensor,
    out_stride: tl.tensor,
    width: tl.tensor,
    student: tl.tensor,
    student_stride: tl.tensor,
    teacher: tl.tensor,
    teacher_stride: tl.tensor,
    num_columns: tl.tensor,
    scalars: tl.tensor,
    scale: tl.tensor,
    beta: tl.tensor,
    clip: tl.tensor,
    divergence_factor: tl.tensor,
    gradient_sum: tl.tensor,
    cross_entropy_factor: tl.tensor,
    label_columns: tl.tensor,
    num_rows: tl.tensor,
    RULE: tl.constexpr,
    A_BEYOND_CLIP: tl.constexpr,
    HALF: tl.constexpr,
    CLIP: tl.constexpr,
    TOP_K: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = columns < num_columns
    student += row * student_stride
    teacher += row * teacher_stride
    scalars += row
    z_student, q, _, _, _, a, _, _ = a_and_summands(
        student, teacher, columns, valid, scalars, num_rows, scale, beta, clip,
        RULE, A_BEYOND_CLIP, HALF, CLIP, TOP_K,
    )  # fmt: skip
    gradient = (a - q * tl.load(gradient_sum + row)) * tl.load(divergence_factor + row)
    if CROSS_ENTROPY:
        unit_log_sum_exp = tl.load(scalars + 2 * num_rows)
        softmax = exp2((z_student - tl.load(scalars)) * LOG2_E - unit_log_sum_exp)
        onehot = tl.where(valid & (columns == tl.load(label_columns + row)), 1.0, 0.0)
        gradient += tl.load(cross_entropy_factor + row) * (softmax - onehot)
    tl.store(
        out + row * out_stride + columns, gradient.to(out.dtype.element_ty), mask=columns < width
    )


def rule_constants(divergence: Divergence) -> dict[str, Any]:
    """What the kernels are compiled for, by name."""
    return dict(
        RULE=RULES[divergence.kind],
        A_BEYOND_CLIP=KINDS[divergence.kind].a_beyond_clip,
        HALF=divergence.beta == 0.5,
        CLIP=divergence.clip is not None,
        TOP_K=divergence.top_k is not None,
    )


def sum_constants(divergence: Divergence, metrics: bool) -> dict[str, bool]:
    """Which sums `compare` makes, besides that of A: the divergence's, and the KLs that are metrics
    or the divergence.
    """
    needed = KINDS[divergence.kind].needed_sums(metrics)
    return dict(
        SUM_VALUES=needed.entries, KL_FORWARD=needed.kl_forward, KL_REVERSE=needed.kl_reverse
    )


def _block(num_columns: int) -> int:
    return min(BLOCK, triton.next_power_of_2(max(num_columns, 16)))


def _check_rows(*matrices: torch.Tensor) -> None:
    if any(matrix.stride(1) != 1 for matrix in matrices):
        raise ValueError(
            "logits must be contiguous along the vocabulary: call .contiguous() before the loss"
        )


def _in_base_2(scalars: RowScalars) -> torch.Tensor:
    """[6, N] in RowScalars' order, with a top K [10, N], the log-sum-exps divided by ln 2."""
    logarithms = (
        "student_log_sum_exp",
        "student_unit_log_sum_exp",
        "teacher_log_sum_exp",
    )
    scaled = {name: getattr(scalars, name) * LOG2_E.value for name in logarithms}
    columns = [column for column in scalars._replace(**scaled) if column is not None]
    return torch.cat(columns, 1).t().contiguous()


def statistics(
    logits: torch.Tensor,
    num_columns: int,
    temperature: float,
    first_column: int,
    labels: torch.Tensor | None,
    metrics: bool,
    rest_of: tuple[torch.Tensor, RowScalars] | None = None,
) -> SideStatistics:
    """As torch_kernels.statistics."""
    # without a top K its arguments are not read
    teacher, scalars = (logits, logits) if rest_of is None else (rest_of[0], _in_base_2(rest_of[1]))
    _check_rows(logits, teacher)
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
        teacher,
        teacher.stride(0),
        scalars,
        METRICS=metrics,
        LABELS=labels is not None,
        UNIT=labels is not None and temperature != 1.0,
        REST=rest_of is not None,
        BLOCK=_block(num_columns),
        **OPTIONS,
    )
    return SideStatistics(*out)


def compare(
    student: torch.Tensor,
    teacher: torch.Tensor,
    num_columns: int,
    scalars: RowScalars,
    divergence: Divergence,
    metrics: bool,
    a_out: None = None,
) -> Sums:
    """As torch_kernels.compare, which alone keeps A."""
    _check_rows(student, teacher)
    num_rows = len(student)
    out = torch.zeros(len(Sums._fields), num_rows, dtype=torch.float64, device=student.device)
    _compare_kernel[(num_rows,)](
        student,
        student.stride(0),
        teacher,
        teacher.stride(0),
        num_columns,
        _in_base_2(scalars),
        LOG2_E.value / divergence.temperature,
        divergence.beta,
        divergence.clip or 0.0,
        out,
        num_rows,
        BLOCK=_block(num_columns),
        **rule_constants(divergence),
        **sum_constants(divergence, metrics),
        **OPTIONS,
    )
    return add_kl(Sums(*out), KINDS[divergence.kind])


def write_gradient(
    out: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    num_columns: int,
    scalars: RowScalars,
    divergence: Divergence,
    factors: GradientFactors,
) -> None:
    """As torch_kernels.write_gradient."""
    _check_rows(out, student, teacher)
    num_rows, width = out.shape
    # without a cross-entropy its arguments are not read
    cross_entropy = factors.divergence if factors.cross_entropy is None else factors.cross_entropy
    label_columns = factors.divergence if factors.label_columns is None else factors.label_columns
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
        _in_base_2(scalars),
        LOG2_E.value / divergence.temperature,
        divergence.beta,
        divergence.clip or 0.0,
        factors.divergence.contiguous(),
        factors.gradient_sum.contiguous(),
        cross_entropy.contiguous(),
        label_columns.contiguous(),
        num_rows,
        CROSS_ENTROPY=factors.cross_entropy is not None,
        BLOCK=block,
        **rule_constants(divergence),
        **OPTIONS,
    )
