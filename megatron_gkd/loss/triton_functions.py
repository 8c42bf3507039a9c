"""Functions of a block of columns for the Triton kernels, float32, in few instructions.

Exponentials are of base 2. log1p and expm1 are polynomials near 0, where log and exp lose all
digits.
"""

import math

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
# libdevice's exp2 and fast_log2f are one or two instructions (they flush denormals) where tl's are
# 4 and about 20. The interpreter has tl's alone.
ON_DEVICE = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def exp2(x: tl.tensor):
    if ON_DEVICE:
        return libdevice.exp2(x)
    return tl.exp2(x)


@triton.jit
def log2(x: tl.tensor):
    if ON_DEVICE:
        return libdevice.fast_log2f(x)
    return tl.log2(x)


@triton.jit
def exp2m1(x: tl.tensor):
    """2^x - 1 for x <= 0, accurate near 0 too: Taylor's series above -0.5."""
    series = 1.5252734e-5
    series = 1.5403530e-4 + x * series
    series = 1.3333558e-3 + x * series
    series = 9.6181291e-3 + x * series
    series = 5.5504109e-2 + x * series
    series = 2.4022651e-1 + x * series
    series = 6.9314718e-1 + x * series
    return tl.where(x > -0.5, x * series, exp2(x) - 1.0)


@triton.jit
def log1p_of_half(e: tl.tensor):
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
def log1p(y: tl.tensor):
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
    return tl.where(y > -0.3, y * series, log2(1.0 + tl.maximum(y, -0.9999999)) * LN_2)


@triton.jit
def is_outside(z_teacher: tl.tensor, columns: tl.tensor, scalars: tl.tensor, num_rows: tl.tensor):
    """Which columns are not of the top K: RowScalars.is_rest. scalars: [10, N], at this row."""
    lowest = tl.load(scalars + 6 * num_rows)
    last_column = tl.load(scalars + 7 * num_rows)
    is_tie = (z_teacher == lowest) & (columns.to(tl.float32) <= last_column)
    return (z_teacher <= lowest) & (is_tie == 0)


@triton.jit
def a_and_summands(
    student: tl.tensor,
    teacher: tl.tensor,
    columns: tl.tensor,
    valid: tl.tensor,
    scalars: tl.tensor,  # [6, N], with a top K [10, N], at this row
    num_rows: tl.tensor,
    scale: tl.tensor,
    beta: tl.tensor,
    clip: tl.tensor,
    RULE: tl.constexpr,
    A_BEYOND_CLIP: tl.constexpr,
    HALF: tl.constexpr,
    CLIP: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """z_student, Q, P, d, P - Q, A, the divergence's entries, and what they are above the clip (0
    without one). student, teacher and scalars point to the row.

        Q, P                exp((z - top) / T - log_sum_exp), of the student's z and the teacher's
        d                   log P - log Q = (z_teacher - z_student - shift) / T
        e                   exp(-|d|) - 1, so that P - Q = max(P, Q) e with the sign of -d
        log(M/P), log(M/Q)  c + max(-d, 0), c + max(d, 0) with c = log1p(e (d > 0 ? b : 1 - b))
        A, entry            RULE: what it does not use is not computed

    RULE and A_BEYOND_CLIP are those of a divergence.Kind, HALF: beta is 0.5, CLIP: there is one.
    TOP_K: there is one; P and d of the rest are as divergence.py says, its clip is shared out.
    """
    z_student = tl.load(student + columns, mask=valid, other=-float("inf")).to(tl.float32)
    z_teacher = tl.load(teacher + columns, mask=valid, other=-float("inf")).to(tl.float32)
    student_top = tl.load(scalars)
    student_log_sum_exp = tl.load(scalars + num_rows)
    teacher_top = tl.load(scalars + 3 * num_rows)
    teacher_log_sum_exp = tl.load(scalars + 4 * num_rows)
    shift = tl.load(scalars + 5 * num_rows)
    difference = z_teacher - z_student
    if TOP_K:
        is_rest = is_outside(z_teacher, columns, scalars, num_rows)
        rest_shift = tl.load(scalars + 8 * num_rows)
        difference = tl.where(is_rest, rest_shift, difference)
        z_teacher = tl.where(is_rest, z_student + rest_shift, z_teacher)
    q = exp2((z_student - student_top) * scale - student_log_sum_exp)
    p = exp2((z_teacher - teacher_top) * scale - teacher_log_sum_exp)
    log2_p_over_q = tl.where(valid, (difference - shift) * scale, 0.0)
    d = log2_p_over_q * LN_2
    e = exp2m1(-tl.abs(log2_p_over_q))
    larger_e = tl.maximum(p, q) * e
    p_minus_q = tl.where(log2_p_over_q > 0.0, -larger_e, larger_e)
    if HALF:
        common = log1p_of_half(e)
    else:
        common = log1p(e * tl.where(log2_p_over_q > 0.0, beta, 1.0 - beta))
    log_m_over_q = common + tl.maximum(d, 0.0)
    log_m_over_p = common + tl.maximum(-d, 0.0)
    a, summands = RULE(q, p, d, p_minus_q, log_m_over_q, log_m_over_p, beta)
    excess = 0.0
    if CLIP:
        limit = clip
        if TOP_K:
            rest_mass = tl.maximum(tl.load(scalars + 9 * num_rows), 1.1754944e-38)
            limit = tl.where(is_rest, q * (clip / rest_mass), clip)
        above = summands > limit
        excess = tl.where(above, summands - limit, 0.0)
        a = tl.where(above, A_BEYOND_CLIP * q, a)
    return z_student, q, p, d, p_minus_q, a, summands, excess
