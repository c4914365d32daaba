"""Triton kernels of the KD loss, for logits on a GPU.

Each pass reads the logits once: the forward pass adds up the divergences of the rows, the backward
pass writes the gradient, ``p_student - p_teacher`` times a weight. A row with more classes than a
program can hold is read in chunks, twice in the forward pass.
:mod:`lightning_dist.losses.fused.reading` says what the arguments mean.
"""

import triton
import triton.language as tl

from lightning_dist.losses.fused.reading import (
    INFINITY,
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
def log1p(x):
    """Return log(1 + x) for x from 0 to 1, exact to a few units in the last place."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * x / tl.where(y == 1.0, 1.0, y - 1.0))


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def divergence(p, log_p, log_q):
    """Return p * (log p - log q), and 0 where p is 0 also if log q is not finite."""
    return tl.where(log_p == -INFINITY, 0.0, p * (log_p - tl.where(log_p == -INFINITY, 0.0, log_q)))


@triton.jit
def divergence_of_sigmoids(a, b):
    """Return the divergence of two binary decisions with logits a (student) and b (teacher)."""
    yes = divergence(tl.sigmoid(b), log_sigmoid(b), log_sigmoid(a))
    return yes + divergence(tl.sigmoid(-b), log_sigmoid(-b), log_sigmoid(-a))


@triton.jit
def shifted(x, valid, inverse_tau):
    """Return logits minus their maximum, divided by tau, and the sum of the exponentials."""
    x = tl.where(valid, x, -INFINITY)
    x = (x - tl.max(x, 1)[:, None]) * inverse_tau
    return x, tl.sum(tl.exp(x), 1)[:, None]


@triton.jit
def forward_rows(
    student, teacher, mask, counts, sums,
    C, H, W, tiles_w, tiles, inverse_tau,
    s_n, s_h, s_w, s_c, t_n, t_h, t_w, t_c, m_n, m_h, m_w,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Add up the divergences of all tiles of a program.

    counts, sums: float64 (programs,), the number of rows and the sum of their divergences.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BC)
    valid = (columns < C)[None, :]
    count = tl.zeros([BR], tl.float64)
    total = tl.zeros([BR], tl.float64)
    for tile in range(program, tiles, tl.num_programs(0)):
        a, b, _, keep = load_tiles(
            tile, student, teacher, mask, columns, valid, H, W, tiles_w,
            s_n, s_h, s_w, s_c, t_n, t_h, t_w, t_c, m_n, m_h, m_w, MASKED, WIDE, BR,
        )  # fmt: skip
        if ACTIVATION == SOFTMAX:
            a, a_sum = shifted(a, valid, inverse_tau)
            b, b_sum = shifted(b, valid, inverse_tau)
            value = divergence(tl.exp(b) / b_sum, b - tl.log(b_sum), a - tl.log(a_sum))
        else:
            value = divergence_of_sigmoids(a * inverse_tau, b * inverse_tau)
        total += tl.sum(tl.where(keep[:, None] & valid, value, 0.0), 1).to(tl.float64)
        count += keep.to(tl.float64)
    tl.store(counts + program, tl.sum(count, 0))
    tl.store(sums + program, tl.sum(total, 0))


@triton.jit
def forward_row_in_chunks(
    student, teacher, mask, constants, counts, sums,
    C, H, W, rows, inverse_tau,
    s_n, s_h, s_w, s_c, t_n, t_h, t_w, t_c, m_n, m_h, m_w,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Add up the divergences of one row.

    constants: float32 (4, rows), those of student and teacher.
    """
    row = tl.program_id(0).to(tl.int64)
    n, h, w = position(row, H, W)
    keep = kept_row(mask, row, rows, n, h, w, m_n, m_h, m_w, MASKED)
    student += n * s_n + h * s_h + w * s_w
    teacher += n * t_n + h * t_h + w * t_w
    a0, a1, b0, b1 = 0.0, 0.0, 0.0, 0.0
    if ACTIVATION == SOFTMAX:
        a0, a1 = constants_of_row(student, C, s_c, keep, inverse_tau, ACTIVATION, BC)
        b0, b1 = constants_of_row(teacher, C, t_c, keep, inverse_tau, ACTIVATION, BC)
    columns = tl.arange(0, BC)
    total = tl.zeros([BC], tl.float64)
    for start in range(0, C, BC):
        exists = (start + columns < C) & keep
        at = (start + columns).to(tl.int64)
        a = tl.load(student + at * s_c, mask=exists, other=0.0).to(tl.float32)
        b = tl.load(teacher + at * t_c, mask=exists, other=0.0).to(tl.float32)
        if ACTIVATION == SOFTMAX:
            log_a = (a - a0) * inverse_tau + tl.log(a1)
            log_b = (b - b0) * inverse_tau + tl.log(b1)
            value = divergence(tl.exp((b - b0) * inverse_tau) * b1, log_b, log_a)
        else:
            value = divergence_of_sigmoids(a * inverse_tau, b * inverse_tau)
        total += tl.where(exists, value, 0.0).to(tl.float64)
    tl.store(constants + row, a0)
    tl.store(constants + rows + row, a1)
    tl.store(constants + 2 * rows + row, b0)
    tl.store(constants + 3 * rows + row, b1)
    tl.store(counts + row, keep.to(tl.float64))
    tl.store(sums + row, tl.sum(total, 0))


@triton.jit
def finish(counts, sums, loss, weight, programs, tau, BLOCK: tl.constexpr):
    """Store the loss, and the weight of the gradient."""
    rows = sum_of(counts, programs, BLOCK)
    some = tl.maximum(rows, 1.0)
    tl.store(loss, (sum_of(sums, programs, BLOCK) * tau * tau / some).to(tl.float32))
    tl.store(weight, (tau / some).to(tl.float32))


@triton.jit
def gradient(
    student, teacher, mask, weight, upstream, out,
    C, H, W, tiles_w, tiles, inverse_tau,
    s_n, s_h, s_w, s_c, t_n, t_h, t_w, t_c, m_n, m_h, m_w, g_n, g_h, g_w, g_c,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the student's logits for all tiles of a program."""
    columns = tl.arange(0, BC)
    valid = (columns < C)[None, :]
    factor = tl.load(weight) * tl.load(upstream).to(tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        a, b, _, keep = load_tiles(
            tile, student, teacher, mask, columns, valid, H, W, tiles_w,
            s_n, s_h, s_w, s_c, t_n, t_h, t_w, t_c, m_n, m_h, m_w, MASKED, WIDE, BR,
        )  # fmt: skip
        a = activated(a, valid, inverse_tau, ACTIVATION)
        b = activated(b, valid, inverse_tau, ACTIVATION)
        slope = tl.where(keep[:, None], (a - b) * factor, 0.0)
        store_tile(tile, out, slope, columns, valid, H, W, tiles_w, g_n, g_h, g_w, g_c, WIDE, BR)


@triton.jit
def gradient_in_chunks(
    student, teacher, mask, weight, upstream, out, constants,
    C, H, W, rows, inverse_tau,
    s_n, s_h, s_w, s_c, t_n, t_h, t_w, t_c, m_n, m_h, m_w, g_n, g_h, g_w, g_c,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the gradient of BC classes of one row."""
    row = tl.program_id(0).to(tl.int64)
    n, h, w = position(row, H, W)
    keep = kept_row(mask, row, rows, n, h, w, m_n, m_h, m_w, MASKED)
    factor = tl.load(weight) * tl.load(upstream).to(tl.float32)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    exists = (columns < C) & keep
    at = columns.to(tl.int64)
    student += n * s_n + h * s_h + w * s_w
    teacher += n * t_n + h * t_h + w * t_w
    out += n * g_n + h * g_h + w * g_w
    a = tl.load(student + at * s_c, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(teacher + at * t_c, mask=exists, other=0.0).to(tl.float32)
    a0 = tl.load(constants + row)
    a1 = tl.load(constants + rows + row)
    b0 = tl.load(constants + 2 * rows + row)
    b1 = tl.load(constants + 3 * rows + row)
    a = activated_chunk(a, exists, a0, a1, inverse_tau, ACTIVATION)
    b = activated_chunk(b, exists, b0, b1, inverse_tau, ACTIVATION)
    slope = tl.where(keep, (a - b) * factor, 0.0).to(out.dtype.element_ty)
    tl.store(out + at * g_c, slope, mask=columns < C)
