"""Functions that all Triton kernels share: they read logits and compute the activations.

The arguments of the kernels that read logits are:

- student, teacher, mask: the logits, and one byte for each row, which is 0 if the row is left out.
- C: the number of classes. H, W: sizes of the rows' dimensions (N, H, W). rows: their product.
- tiles: the number of tiles; tiles_w of them are in each row of dimension W.
- inverse_tau: the reciprocal of the temperature.
- s_n, s_h, s_w, s_c: the strides of the student's logits in the dimensions of the rows and of the
  classes; t_ are those of the teacher, m_ those of the mask, g_ those of the gradient.
- ACTIVATION: 0 softmax, 1 sigmoid, 2 identity. MASKED: whether there is a mask. WIDE: whether
  offsets in a tile exceed 32 bits. BR, BC: the numbers of rows and columns of a tile.
"""

import triton
import triton.language as tl

SOFTMAX = tl.constexpr(0)
SIGMOID = tl.constexpr(1)
IDENTITY = tl.constexpr(2)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def tile_of(tile, H, W, tiles_w, BR: tl.constexpr):
    """Return where a tile of rows lies: n, h, first w, offsets to w, row numbers, and which exist.

    A row has the position (n, h, w) in sizes (N, H, W). The rows of a tile have the same n and h,
    so that neighbours in memory are neighbours in the tile.
    """
    outer = tile // tiles_w
    first = (tile - outer * tiles_w).to(tl.int64) * BR
    w = tl.arange(0, BR)
    n = outer // H
    row = outer.to(tl.int64) * W + first + w
    return n.to(tl.int64), (outer - n * H).to(tl.int64), first, w, row, first + w < W


@triton.jit
def offsets(w, columns, w_stride, column_stride, WIDE: tl.constexpr):
    """Return the offsets of the elements of a tile from its first element.

    WIDE is true if they exceed 32 bits.
    """
    if WIDE:
        w = w.to(tl.int64)
        columns = columns.to(tl.int64)
    return (w * w_stride)[:, None] + (columns * column_stride)[None, :]


@triton.jit
def load(pointer, at, exists):
    """Return a tile in float32, with 0 where there is no element or a mask leaves out the row."""
    return tl.load(pointer + at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def kept_rows(mask, n, h, first, w, inside, m_n, m_h, m_w, MASKED: tl.constexpr):
    """Return which rows of a tile exist and are not left out."""
    if MASKED:
        at = mask + n * m_n + h * m_h + first * m_w + w * m_w
        return inside & (tl.load(at, mask=inside, other=0) != 0)
    return inside


@triton.jit
def load_tiles(
    tile, student, teacher, mask, columns, valid, H, W, tiles_w,
    s_n, s_h, s_w, s_c, t_n, t_h, t_w, t_c, m_n, m_h, m_w,
    MASKED: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Return a tile of student and teacher, row numbers, and which rows are kept."""
    n, h, first, w, row, inside = tile_of(tile, H, W, tiles_w, BR)
    keep = kept_rows(mask, n, h, first, w, inside, m_n, m_h, m_w, MASKED)
    both = keep[:, None] & valid
    s_at = offsets(w, columns, s_w, s_c, WIDE)
    t_at = offsets(w, columns, t_w, t_c, WIDE)
    a = load(student + n * s_n + h * s_h + first * s_w, s_at, both)
    b = load(teacher + n * t_n + h * t_h + first * t_w, t_at, both)
    return a, b, row, keep


@triton.jit
def store_tile(
    tile, out, values, columns, valid, H, W, tiles_w, g_n, g_h, g_w, g_c,
    WIDE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Store a tile of the gradient, also of the rows that are left out."""
    n, h, first, w, _, inside = tile_of(tile, H, W, tiles_w, BR)
    at = out + n * g_n + h * g_h + first * g_w + offsets(w, columns, g_w, g_c, WIDE)
    tl.store(at, values.to(out.dtype.element_ty), mask=inside[:, None] & valid)


@triton.jit
def kept_row(mask, row, rows, n, h, w, m_n, m_h, m_w, MASKED: tl.constexpr):
    """Return whether a row exists and is not left out."""
    if MASKED:
        return tl.load(mask + n * m_n + h * m_h + w * m_w) != 0
    return row < rows


@triton.jit
def position(row, H, W):
    """Return the position (n, h, w) of a row."""
    outer = row // W
    return outer // H, outer % H, row % W


@triton.jit
def activated(x, valid, inverse_tau, ACTIVATION: tl.constexpr):
    """Return a tile (rows, classes) after the activation, with 0 in columns that do not exist."""
    if ACTIVATION == SOFTMAX:
        x = tl.where(valid, x, -INFINITY)
        # Subtract before scaling: the largest logits, which matter most, lose no digits.
        x = tl.exp((x - tl.max(x, 1)[:, None]) * inverse_tau)
        return x / tl.sum(x, 1)[:, None]
    x = x * inverse_tau
    if ACTIVATION == SIGMOID:
        x = tl.sigmoid(x)
    return tl.where(valid, x, 0.0)


@triton.jit
def constants_of_row(pointer, C, column_stride, keep, inverse_tau, ACTIVATION: tl.constexpr,
                     BC: tl.constexpr):  # fmt: skip
    """Return two numbers from which the activation and the mean of a row in chunks follow.

    For the softmax, they are the largest logit and the reciprocal of the sum; otherwise the mean,
    in two parts.
    """
    columns = tl.arange(0, BC)
    highest = tl.full([BC], -INFINITY, tl.float32)
    total = tl.zeros([BC], tl.float32)
    for start in range(0, C, BC):
        exists = (start + columns < C) & keep
        at = pointer + (start + columns).to(tl.int64) * column_stride
        if ACTIVATION == SOFTMAX:
            x = tl.load(at, mask=exists, other=-INFINITY).to(tl.float32)
            # A maximum ignores NaN, but the sum does not.
            new = tl.maximum(highest, x)
            rescale = tl.where(highest == new, 1.0, tl.exp((highest - new) * inverse_tau))
            added = tl.where(x == -INFINITY, 0.0, tl.exp((x - new) * inverse_tau))
            total = total * rescale + added
            highest = new
        else:
            x = tl.load(at, mask=exists, other=0.0).to(tl.float32) * inverse_tau
            if ACTIVATION == SIGMOID:
                x = tl.where(exists, tl.sigmoid(x), 0.0)
            total += x
    if ACTIVATION == SOFTMAX:
        top = tl.max(highest, 0)
        rescale = tl.where(highest == top, 1.0, tl.exp((highest - top) * inverse_tau))
        return top, 1.0 / tl.sum(total * rescale, 0)
    mean = tl.sum(total, 0) / C
    rest = tl.zeros([BC], tl.float32)
    if ACTIVATION == IDENTITY:  # The values may be far from 0, and then their mean is rounded.
        for start in range(0, C, BC):
            exists = (start + columns < C) & keep
            at = pointer + (start + columns).to(tl.int64) * column_stride
            x = tl.load(at, mask=exists, other=0.0).to(tl.float32) * inverse_tau
            rest += tl.where(exists, x - mean, 0.0)
    return mean, tl.sum(rest, 0) / C


@triton.jit
def activated_chunk(x, exists, first, second, inverse_tau, ACTIVATION: tl.constexpr):
    """Return a part of rows after the activation; see :func:`constants_of_row`."""
    if ACTIVATION == SOFTMAX:
        x = tl.exp((x - first) * inverse_tau) * second
    else:
        x = x * inverse_tau
        if ACTIVATION == SIGMOID:
            x = tl.sigmoid(x)
    return tl.where(exists, x, 0.0)


@triton.jit
def sum_of(numbers, length, BLOCK: tl.constexpr):
    """Return the sum of an array in float64."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(numbers + at, mask=at < length, other=0.0)
    return tl.sum(total, 0)
