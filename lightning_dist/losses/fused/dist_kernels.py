"""Triton kernels of the DIST loss, for logits on a GPU.

Rows are the samples (or pixels), columns are the classes. The forward pass reads the logits once:
in :func:`rows_and_columns`, a program takes tiles of rows, correlates each row, and keeps the
statistics of each column; :func:`merge_columns` merges them over the programs, and correlates the
columns. The backward pass, :func:`gradient`, reads the logits again and writes the gradient. If a
row has more classes than a program can hold, :func:`rows_in_chunks`, :func:`columns_in_chunks` and
:func:`gradient_in_chunks` do the same.

No kernel uses atomic operations, so equal inputs give equal bits. The formulas are those of
:mod:`lightning_dist.losses.streaming`; :mod:`lightning_dist.losses.fused.reading` says what the
arguments mean.
"""

import triton
import triton.language as tl

from lightning_dist.losses.fused.reading import (
    IDENTITY,
    INFINITY,
    SIGMOID,
    SOFTMAX,
    activated,
    activated_chunk,
    constants_of_row,
    kept_row,
    load_tiles,
    position,
    store_tile,
    sum_of,
)


@triton.jit
def mean_of_rows(y, C, ACTIVATION: tl.constexpr):
    """Return the mean of each row, of shape (rows, 1)."""
    mean = (tl.sum(y, 1) / C)[:, None]
    # The mean of probabilities needs no sum, whose rounding the deviations would contain.
    return mean * 0.0 + 1.0 / C if ACTIVATION == SOFTMAX else mean


@triton.jit
def deviations(y, mean, valid, C, ACTIVATION: tl.constexpr):
    """Return the deviations of a tile from the means of its rows."""
    deviation = tl.where(valid, y - mean, 0.0)
    if ACTIVATION == IDENTITY:  # The values may be far from 0, and then their mean is rounded.
        deviation -= tl.where(valid, (tl.sum(deviation, 1) / C)[:, None], 0.0)
    return deviation


@triton.jit
def correlate(ss, tt, st, student_floor, teacher_floor, eps):
    """Return the correlation rho of each row or column, and the coefficients Q and P."""
    student = tl.sqrt(ss)
    teacher = tl.sqrt(tt)
    # Comparisons with NaN are false, so NaN is not taken for a constant.
    student = tl.where(student <= student_floor, INFINITY, student)
    p = tl.where(teacher <= teacher_floor, 0.0, 1.0 / (student * teacher + eps))
    rho = st * p
    return rho, rho * p * teacher / student, p


@triton.jit
def add_tile(a, b, keep, count, pivot_a, pivot_b, mean_a, mean_b, aa, bb, ab):
    """Add a tile to the statistics of its elements: count, means and moments (Welford 1962).

    The means are those of the differences from a pivot, the first value, so that nearly constant
    columns keep their digits. A tile is not reduced to columns here, because threads would have to
    communicate.
    """
    first = ((count == 0) & (keep > 0))[:, None]
    pivot_a = tl.where(first, a, pivot_a)
    pivot_b = tl.where(first, b, pivot_b)
    a -= pivot_a
    b -= pivot_b
    count += keep
    kept = keep[:, None] > 0
    share = (keep / tl.maximum(count, 1.0))[:, None]
    old_a = tl.where(kept, a - mean_a, 0.0)
    old_b = tl.where(kept, b - mean_b, 0.0)
    mean_a += old_a * share
    mean_b += old_b * share
    new_b = b - mean_b
    aa += old_a * (a - mean_a)
    bb += old_b * new_b
    ab += old_a * new_b
    return count, pivot_a, pivot_b, mean_a, mean_b, aa, bb, ab


@triton.jit
def store_columns(
    means, moments, program, columns, C,
    count, pivot_a, pivot_b, mean_a, mean_b, aa, bb, ab,
):  # fmt: skip
    """Merge the statistics of the elements of a tile over its rows, and store those of columns.

    means: float64 (programs, 2, C), moments: float32 (programs, 3, C).
    """
    n = count[:, None]
    total = tl.maximum(tl.sum(count, 0), 1.0)
    exists = columns < C
    means += program.to(tl.int64) * 2 * C + columns
    moments += program.to(tl.int64) * 3 * C + columns
    # First a rounded mean, then the mean of the deviations from it.
    high_a = tl.sum(n * (pivot_a + mean_a), 0) / total
    high_b = tl.sum(n * (pivot_b + mean_b), 0) / total
    mean_a += pivot_a - high_a[None, :]
    mean_b += pivot_b - high_b[None, :]
    low_a = tl.sum(n * mean_a, 0) / total
    low_b = tl.sum(n * mean_b, 0) / total
    mean_a -= low_a[None, :]
    mean_b -= low_b[None, :]
    tl.store(means, high_a.to(tl.float64) + low_a, mask=exists)
    tl.store(means + C, high_b.to(tl.float64) + low_b, mask=exists)
    tl.store(moments, tl.sum(aa + n * mean_a * mean_a, 0), mask=exists)
    tl.store(moments + C, tl.sum(bb + n * mean_b * mean_b, 0), mask=exists)
    tl.store(moments + 2 * C, tl.sum(ab + n * mean_a * mean_b, 0), mask=exists)


@triton.jit
def rows_and_columns(
    student, teacher, mask, row_data, counts, inters, means, moments,
    C, H, W, tiles_w, tiles, rows, inverse_tau, student_floor, teacher_floor, eps,
    s_n, s_h, s_w, s_c, t_n, t_h, t_w, t_c, m_n, m_h, m_w,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Correlate the rows of all tiles of a program, and store the statistics of their columns.

    row_data: float32 (2, rows), Q and P of each row.
    counts, inters: float64 (programs,), the number of rows and the sum of their correlations.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BC)
    valid = (columns < C)[None, :]
    zero = tl.zeros([BR, BC], tl.float32)
    pivot_a, pivot_b, mean_a, mean_b, aa, bb, ab = zero, zero, zero, zero, zero, zero, zero
    count = tl.zeros([BR], tl.float32)
    inter = tl.zeros([BR], tl.float64)
    for tile in range(program, tiles, tl.num_programs(0)):
        a, b, row, keep = load_tiles(
            tile, student, teacher, mask, columns, valid, H, W, tiles_w,
            s_n, s_h, s_w, s_c, t_n, t_h, t_w, t_c, m_n, m_h, m_w, MASKED, WIDE, BR,
        )  # fmt: skip
        a = activated(a, valid, inverse_tau, ACTIVATION)
        b = activated(b, valid, inverse_tau, ACTIVATION)
        a_mean = mean_of_rows(a, C, ACTIVATION)
        b_mean = mean_of_rows(b, C, ACTIVATION)
        u = deviations(a, a_mean, valid, C, ACTIVATION)
        v = deviations(b, b_mean, valid, C, ACTIVATION)
        rho, q, p = correlate(
            tl.sum(u * u, 1), tl.sum(v * v, 1), tl.sum(u * v, 1),
            tl.sum(tl.abs(a_mean), 1) * student_floor, tl.sum(tl.abs(b_mean), 1) * teacher_floor,
            eps,
        )  # fmt: skip
        tl.store(row_data + row, q, mask=keep)
        tl.store(row_data + rows + row, p, mask=keep)
        inter += tl.where(keep, rho, 0.0).to(tl.float64)
        count, pivot_a, pivot_b, mean_a, mean_b, aa, bb, ab = add_tile(
            a, b, keep.to(tl.float32),
            count, pivot_a, pivot_b, mean_a, mean_b, aa, bb, ab,
        )  # fmt: skip
    store_columns(
        means, moments, program, columns, C,
        count, pivot_a, pivot_b, mean_a, mean_b, aa, bb, ab,
    )  # fmt: skip
    tl.store(counts + program, tl.sum(count.to(tl.float64), 0))
    tl.store(inters + program, tl.sum(inter, 0))


@triton.jit
def chunk_deviations(y, exists, first, second, C, ACTIVATION: tl.constexpr):
    """Return the deviations of a part of a row from the row's mean."""
    if ACTIVATION == SOFTMAX:
        return tl.where(exists, y - 1.0 / C, 0.0)
    return tl.where(exists, y - first - second, 0.0)


@triton.jit
def rows_in_chunks(
    student, teacher, mask, row_data, constants, inters,
    C, H, W, rows, inverse_tau, student_floor, teacher_floor, eps,
    s_n, s_h, s_w, s_c, t_n, t_h, t_w, t_c, m_n, m_h, m_w,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Correlate one row.

    constants: float32 (4, rows), those of student and teacher, see :func:`constants_of_row`.
    """
    row = tl.program_id(0).to(tl.int64)
    n, h, w = position(row, H, W)
    keep = kept_row(mask, row, rows, n, h, w, m_n, m_h, m_w, MASKED)
    student += n * s_n + h * s_h + w * s_w
    teacher += n * t_n + h * t_h + w * t_w
    a0, a1 = constants_of_row(student, C, s_c, keep, inverse_tau, ACTIVATION, BC)
    b0, b1 = constants_of_row(teacher, C, t_c, keep, inverse_tau, ACTIVATION, BC)
    columns = tl.arange(0, BC)
    aa = tl.zeros([BC], tl.float32)
    bb = tl.zeros([BC], tl.float32)
    ab = tl.zeros([BC], tl.float32)
    for start in range(0, C, BC):
        exists = (start + columns < C) & keep
        at = (start + columns).to(tl.int64)
        a = tl.load(student + at * s_c, mask=exists, other=0.0).to(tl.float32)
        b = tl.load(teacher + at * t_c, mask=exists, other=0.0).to(tl.float32)
        a = activated_chunk(a, exists, a0, a1, inverse_tau, ACTIVATION)
        b = activated_chunk(b, exists, b0, b1, inverse_tau, ACTIVATION)
        u = chunk_deviations(a, exists, a0, a1, C, ACTIVATION)
        v = chunk_deviations(b, exists, b0, b1, C, ACTIVATION)
        aa += u * u
        bb += v * v
        ab += u * v
    a_mean = 1.0 / C if ACTIVATION == SOFTMAX else tl.abs(a0)
    b_mean = 1.0 / C if ACTIVATION == SOFTMAX else tl.abs(b0)
    rho, q, p = correlate(
        tl.sum(aa, 0), tl.sum(bb, 0), tl.sum(ab, 0),
        a_mean * student_floor, b_mean * teacher_floor, eps,
    )  # fmt: skip
    tl.store(row_data + row, q)
    tl.store(row_data + rows + row, p)
    tl.store(constants + row, a0)
    tl.store(constants + rows + row, a1)
    tl.store(constants + 2 * rows + row, b0)
    tl.store(constants + 3 * rows + row, b1)
    tl.store(inters + row, tl.where(keep, rho, 0.0).to(tl.float64))


@triton.jit
def columns_in_chunks(
    student, teacher, mask, constants, counts, means, moments,
    C, H, W, tiles_w, tiles, rows, inverse_tau,
    s_n, s_h, s_w, s_c, t_n, t_h, t_w, t_c, m_n, m_h, m_w,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Store the statistics of BC columns over all tiles of a program."""
    program = tl.program_id(1)
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    valid = (columns < C)[None, :]
    zero = tl.zeros([BR, BC], tl.float32)
    pivot_a, pivot_b, mean_a, mean_b, aa, bb, ab = zero, zero, zero, zero, zero, zero, zero
    count = tl.zeros([BR], tl.float32)
    for tile in range(program, tiles, tl.num_programs(1)):
        a, b, row, keep = load_tiles(
            tile, student, teacher, mask, columns, valid, H, W, tiles_w,
            s_n, s_h, s_w, s_c, t_n, t_h, t_w, t_c, m_n, m_h, m_w, MASKED, WIDE, BR,
        )  # fmt: skip
        a0 = tl.load(constants + row, mask=keep, other=0.0)[:, None]
        a1 = tl.load(constants + rows + row, mask=keep, other=0.0)[:, None]
        b0 = tl.load(constants + 2 * rows + row, mask=keep, other=0.0)[:, None]
        b1 = tl.load(constants + 3 * rows + row, mask=keep, other=0.0)[:, None]
        both = keep[:, None] & valid
        a = activated_chunk(a, both, a0, a1, inverse_tau, ACTIVATION)
        b = activated_chunk(b, both, b0, b1, inverse_tau, ACTIVATION)
        count, pivot_a, pivot_b, mean_a, mean_b, aa, bb, ab = add_tile(
            a, b, keep.to(tl.float32),
            count, pivot_a, pivot_b, mean_a, mean_b, aa, bb, ab,
        )  # fmt: skip
    store_columns(
        means, moments, program, columns, C,
        count, pivot_a, pivot_b, mean_a, mean_b, aa, bb, ab,
    )  # fmt: skip
    # Each program along the columns counts the same rows.
    tl.store(counts + program, tl.sum(count.to(tl.float64), 0))


@triton.jit
def store_loss(loss, row_weight, rows, inter, intra, C, tau, beta, gamma):
    """Store the loss, and the factor of the rows' coefficients.

    inter and intra are the sums of the correlations of rows and columns.
    """
    some = tl.maximum(rows, 1.0)
    value = (beta + gamma - inter * beta / some - intra * gamma / C) * tau * tau
    tl.store(loss, tl.where(rows > 0, value, value * 0.0).to(tl.float32))
    tl.store(row_weight, (tau * beta / some).to(tl.float32))


@triton.jit
def merged_mean(means, counts, columns, C, programs, rows, BP: tl.constexpr, BC: tl.constexpr):
    """Return the means of columns from those of all programs, in float64."""
    total = tl.zeros([BC], tl.float64)
    for start in range(0, programs, BP):
        program = start + tl.arange(0, BP)
        there = program < programs
        n = tl.load(counts + program, mask=there, other=0.0)[:, None]
        at = means + program.to(tl.int64)[:, None] * 2 * C + columns[None, :]
        both = there[:, None] & (columns < C)[None, :]
        total += tl.sum(n * tl.load(at, mask=both, other=0.0), 0)
    return total / tl.maximum(rows, 1.0)


@triton.jit
def merged_moments(
    means, moments, counts, columns, C, programs, mean_a, mean_b, BP: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Return the moments of columns about their means, in float64 (Chan, Golub, LeVeque 1979)."""
    aa = tl.zeros([BC], tl.float64)
    bb = tl.zeros([BC], tl.float64)
    ab = tl.zeros([BC], tl.float64)
    for start in range(0, programs, BP):
        program = start + tl.arange(0, BP)
        there = program < programs
        n = tl.load(counts + program, mask=there, other=0.0)[:, None]
        at = means + program.to(tl.int64)[:, None] * 2 * C + columns[None, :]
        both = there[:, None] & (columns < C)[None, :]
        u = tl.load(at, mask=both, other=0.0) - mean_a[None, :]
        v = tl.load(at + C, mask=both, other=0.0) - mean_b[None, :]
        at = moments + program.to(tl.int64)[:, None] * 3 * C + columns[None, :]
        aa += tl.sum(tl.load(at, mask=both, other=0.0) + n * u * u, 0)
        bb += tl.sum(tl.load(at + C, mask=both, other=0.0) + n * v * v, 0)
        ab += tl.sum(tl.load(at + 2 * C, mask=both, other=0.0) + n * u * v, 0)
    return aa, bb, ab


@triton.jit
def store_column_data(
    column_data, columns, C, q, p, mean_a, mean_b, EXACT_MEAN: tl.constexpr
):  # fmt: skip
    """Store what the backward pass needs of columns: float32 (4, C), or (5, C) with EXACT_MEAN.

    They are Q, P, the means of student and teacher, and a correction of the means' rounding.
    """
    exists = columns < C
    rounded_a = mean_a.to(tl.float32)
    rounded_b = mean_b.to(tl.float32)
    column_data += columns
    tl.store(column_data, q.to(tl.float32), mask=exists)
    tl.store(column_data + C, p.to(tl.float32), mask=exists)
    tl.store(column_data + 2 * C, rounded_a, mask=exists)
    tl.store(column_data + 3 * C, rounded_b, mask=exists)
    if EXACT_MEAN:
        correction = p * (mean_b - rounded_b) - q * (mean_a - rounded_a)
        tl.store(column_data + 4 * C, correction.to(tl.float32), mask=exists)


@triton.jit
def merge_columns(
    counts, inters, means, moments, column_data, intras, loss, row_weight, packed,
    C, programs, parts, student_tolerance, teacher_tolerance, eps, tau, beta, gamma,
    GATHERED: tl.constexpr, SINGLE: tl.constexpr, EXACT_MEAN: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of all programs, and correlate BC columns.

    parts: the number of `inters`. SINGLE: whether this is the only program, which stores the loss.
    With GATHERED, other processes have statistics too. Then `packed` gets those of this process:
    float64 (2 + 5 * C,), rows, the sum of their correlations, means and moments.
    """
    part = tl.program_id(0)
    columns = part * BC + tl.arange(0, BC)
    exists = columns < C
    rows = sum_of(counts, programs, BP)
    mean_a = merged_mean(means, counts, columns, C, programs, rows, BP, BC)
    mean_b = merged_mean(means + C, counts, columns, C, programs, rows, BP, BC)
    aa, bb, ab = merged_moments(
        means, moments, counts, columns, C, programs, mean_a, mean_b, BP, BC
    )
    if GATHERED:
        at = packed + 2 + columns
        tl.store(at, mean_a, mask=exists)
        tl.store(at + C, mean_b, mask=exists)
        tl.store(at + 2 * C, aa, mask=exists)
        tl.store(at + 3 * C, bb, mask=exists)
        tl.store(at + 4 * C, ab, mask=exists)
        if part == 0:
            tl.store(packed, rows)
            tl.store(packed + 1, sum_of(inters, parts, BP))
    else:
        root = tl.sqrt(rows)
        rho, q, p = correlate(
            aa, bb, ab,
            tl.abs(mean_a) * root * student_tolerance, tl.abs(mean_b) * root * teacher_tolerance,
            eps,
        )  # fmt: skip
        weight = tau * gamma / C
        store_column_data(
            column_data, columns, C, q * weight, p * weight, mean_a, mean_b, EXACT_MEAN
        )
        intra = tl.sum(tl.where(exists, rho, 0.0), 0)
        if SINGLE:
            inter = sum_of(inters, parts, BP)
            store_loss(loss, row_weight, rows, inter, intra, C, tau, beta, gamma)
        else:
            tl.store(intras + part, intra)


@triton.jit
def finish(
    counts, inters, intras, loss, row_weight, C, programs, parts, blocks, tau, beta, gamma,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the loss from the sums of all programs."""
    rows = sum_of(counts, programs, BLOCK)
    inter = sum_of(inters, parts, BLOCK)
    intra = sum_of(intras, blocks, BLOCK)
    store_loss(loss, row_weight, rows, inter, intra, C, tau, beta, gamma)


@triton.jit
def weighted_deviations(a, b, u, v, cq, cp, ca, cb, correction, rq, rp):
    """Return the gradient of the activated values.

    a, b are the values of student and teacher, u and v their deviations from the means of the rows,
    and ca and cb the means of the columns; the others are coefficients.
    """
    return cq * (a - ca) - cp * (b - cb) + correction + rq * u - rp * v


@triton.jit
def gradient(
    student, teacher, mask, row_data, row_weight, column_data, upstream, out,
    C, H, W, tiles_w, tiles, rows, inverse_tau,
    s_n, s_h, s_w, s_c, t_n, t_h, t_w, t_c, m_n, m_h, m_w, g_n, g_h, g_w, g_c,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the student's logits for all tiles of a program."""
    columns = tl.arange(0, BC)
    exists = columns < C
    valid = exists[None, :]
    scale = tl.load(upstream).to(tl.float32)
    weight = tl.load(row_weight) * scale
    cq = tl.load(column_data + columns, mask=exists, other=0.0)[None, :] * scale
    cp = tl.load(column_data + C + columns, mask=exists, other=0.0)[None, :] * scale
    ca = tl.load(column_data + 2 * C + columns, mask=exists, other=0.0)[None, :]
    cb = tl.load(column_data + 3 * C + columns, mask=exists, other=0.0)[None, :]
    correction = 0.0
    if ACTIVATION == IDENTITY:
        correction = tl.load(column_data + 4 * C + columns, mask=exists, other=0.0) * scale
        correction = correction[None, :]
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        a, b, row, keep = load_tiles(
            tile, student, teacher, mask, columns, valid, H, W, tiles_w,
            s_n, s_h, s_w, s_c, t_n, t_h, t_w, t_c, m_n, m_h, m_w, MASKED, WIDE, BR,
        )  # fmt: skip
        a = activated(a, valid, inverse_tau, ACTIVATION)
        b = activated(b, valid, inverse_tau, ACTIVATION)
        u = deviations(a, mean_of_rows(a, C, ACTIVATION), valid, C, ACTIVATION)
        v = deviations(b, mean_of_rows(b, C, ACTIVATION), valid, C, ACTIVATION)
        rq = (tl.load(row_data + row, mask=keep, other=0.0) * weight)[:, None]
        rp = (tl.load(row_data + rows + row, mask=keep, other=0.0) * weight)[:, None]
        slope = weighted_deviations(a, b, u, v, cq, cp, ca, cb, correction, rq, rp)
        if ACTIVATION == SOFTMAX:
            slope = tl.where(valid, slope, 0.0)
            slope = a * (slope - tl.sum(slope * a, 1)[:, None])
        elif ACTIVATION == SIGMOID:
            slope = slope * a * (1.0 - a)
        slope = tl.where(keep[:, None], slope, 0.0)
        store_tile(tile, out, slope, columns, valid, H, W, tiles_w, g_n, g_h, g_w, g_c, WIDE, BR)


@triton.jit
def gradient_in_chunks(
    student, teacher, mask, row_data, row_weight, column_data, upstream, out, constants,
    C, H, W, rows, inverse_tau,
    s_n, s_h, s_w, s_c, t_n, t_h, t_w, t_c, m_n, m_h, m_w, g_n, g_h, g_w, g_c,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one row."""
    row = tl.program_id(0).to(tl.int64)
    n, h, w = position(row, H, W)
    keep = kept_row(mask, row, rows, n, h, w, m_n, m_h, m_w, MASKED)
    student += n * s_n + h * s_h + w * s_w
    teacher += n * t_n + h * t_h + w * t_w
    out += n * g_n + h * g_h + w * g_w
    scale = tl.load(upstream).to(tl.float32)
    weight = tl.load(row_weight) * scale
    rq = tl.load(row_data + row) * weight
    rp = tl.load(row_data + rows + row) * weight
    a0 = tl.load(constants + row)
    a1 = tl.load(constants + rows + row)
    b0 = tl.load(constants + 2 * rows + row)
    b1 = tl.load(constants + 3 * rows + row)
    columns = tl.arange(0, BC)
    dot = tl.zeros([BC], tl.float32)
    if ACTIVATION == SOFTMAX:
        for start in range(0, C, BC):
            a, slope = slope_of_chunk(
                student, teacher, column_data, start + columns, C, s_c, t_c, keep, inverse_tau,
                scale, rq, rp, a0, a1, b0, b1, ACTIVATION,
            )  # fmt: skip
            dot += a * slope
    total = tl.sum(dot, 0)
    for start in range(0, C, BC):
        a, slope = slope_of_chunk(
            student, teacher, column_data, start + columns, C, s_c, t_c, keep, inverse_tau,
            scale, rq, rp, a0, a1, b0, b1, ACTIVATION,
        )  # fmt: skip
        if ACTIVATION == SOFTMAX:
            slope = a * (slope - total)
        elif ACTIVATION == SIGMOID:
            slope = slope * a * (1.0 - a)
        slope = tl.where(keep, slope, 0.0).to(out.dtype.element_ty)
        at = (start + columns).to(tl.int64) * g_c
        tl.store(out + at, slope, mask=start + columns < C)


@triton.jit
def slope_of_chunk(
    student, teacher, column_data, columns, C, s_c, t_c, keep, inverse_tau,
    scale, rq, rp, a0, a1, b0, b1, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Return a part of a row after the activation, and the gradient of these values."""
    exists = columns < C
    both = exists & keep
    at = columns.to(tl.int64)
    a = tl.load(student + at * s_c, mask=both, other=0.0).to(tl.float32)
    b = tl.load(teacher + at * t_c, mask=both, other=0.0).to(tl.float32)
    a = activated_chunk(a, both, a0, a1, inverse_tau, ACTIVATION)
    b = activated_chunk(b, both, b0, b1, inverse_tau, ACTIVATION)
    cq = tl.load(column_data + columns, mask=exists, other=0.0) * scale
    cp = tl.load(column_data + C + columns, mask=exists, other=0.0) * scale
    ca = tl.load(column_data + 2 * C + columns, mask=exists, other=0.0)
    cb = tl.load(column_data + 3 * C + columns, mask=exists, other=0.0)
    correction = 0.0
    if ACTIVATION == IDENTITY:
        correction = tl.load(column_data + 4 * C + columns, mask=exists, other=0.0) * scale
    u = chunk_deviations(a, both, a0, a1, C, ACTIVATION)
    v = chunk_deviations(b, both, b0, b1, C, ACTIVATION)
    slope = weighted_deviations(a, b, u, v, cq, cp, ca, cb, correction, rq, rp)
    return a, tl.where(both, slope, 0.0)
