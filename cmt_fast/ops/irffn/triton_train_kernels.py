"""The inverted residual feed-forward network in training on a GPU: forward in four kernels, backward in seven to nine.

No BatchNorm passes over memory: moments are made where a map is made, and the map is normalised where it is read (``_triton/batch_norm.py``). Maps
in memory are h and u, before their GELU, and y. Names and formulas: docs/math.md, section 8; ``tests/ops/test_irffn_formulas.py`` has the
same steps in a few lines each.

Everywhere: x, y, out (rows, C), h, u (rows, R), rows being the pixels of all images; statistics (6, channels) and sums (2, channels) of
``_triton/batch_norm.py``; ``n1``, ``n2``, ``n3`` for the statistics of the three BatchNorms, ``s1``, ``s2``, ``s3`` for the sums of their gradients.
"""

import triton
import triton.language as tl

from cmt_fast.ops._triton.batch_norm import (
    MEAN,
    RSTD,
    activation_gradient,
    batch_norm,
    batch_norm_gradient,
    merge_moments,
    statistics_rows,
    store_gradient_sums,
    store_moments,
    tile_moments,
)
from cmt_fast.ops._triton.gelu import gelu
from cmt_fast.ops._triton.linear import linear_rows
from cmt_fast.ops._triton.norm import normal_rows_and_rstd, normal_rows_gradient
from cmt_fast.ops._triton.sliding import (
    add_products,
    add_row,
    load_pairs,
    load_taps,
    neighbours,
    pair_columns,
    slide,
    store_sums,
)
from cmt_fast.ops._triton.tiles import load_tile, map_tile, store_tile

# ---- forward -----------------------------------------------------------------------------------------------------------------


@triton.jit
def expand_kernel(
    x,
    weight,
    bias,
    h,
    partials,
    counts,
    rows,
    eps,
    C: tl.constexpr,
    R: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h = LayerNorm(x) weight^T + bias, and the moments of GELU(h).

    Args:
        weight: (R, C) and bias: (R,), LayerNorm's affine part in them.
        partials, counts: (programs, 2, R) and (programs,), or None for h alone.
    """
    tiles = tl.cdiv(R, BLOCK_R)
    program = tl.program_id(0) // tiles
    first = program.to(tl.int64) * BLOCK_N
    column = tl.program_id(0) % tiles * BLOCK_R
    left = rows - first
    total = linear_rows(
        x + first * C, weight + column * C, left, R - column, eps, C, C, True, BLOCK_N, BLOCK_C, BLOCK_R, PRECISION
    )
    r = column + tl.arange(0, BLOCK_R)
    total += tl.load(bias + r, r < R, 0.0)[None, :]
    _store_map(h + first * R, total, left, r, R, partials, counts, program, True, EXACT)


@triton.jit
def dw_kernel(
    h,
    n1,
    weight,
    bias,
    u,
    partials,
    counts,
    images,
    height,
    width,
    R: tl.constexpr,
    EXACT: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """u = depthwise 3x3 of t, + t, where t = BatchNorm(GELU(h)) and 0 outside of the map; and the moments of GELU(u).

    A program slides down ROWS rows of PAIRS pairs of columns (``_triton/sliding.py``) and BLOCK_C channels.

    Args:
        h, u: (images, height, width, R).
        weight: (R, 9). bias: (R,), or None.
        partials, counts: (programs, 2, R) and (programs,), or None for u alone.
        SPLIT: of ``pair_columns``.
    """
    strips = tl.cdiv(height, ROWS)
    strip = tl.program_id(0) % strips
    first = strip * ROWS
    tile = tl.program_id(0) // strips // tl.cdiv(R, BLOCK_C)
    c = tl.program_id(0) // strips % tl.cdiv(R, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_image, offset_e, offset_o, one, left, inside_e, inside_o, right = pair_columns(
        tile, c[None, :], images, height, width, R, 1, SPLIT, PAIRS
    )
    start = first_image.to(tl.int64) * height * width * R
    row_size = width * R
    h += start
    u += start
    taps = load_taps(weight, c[None, :], (c < R)[None, :], 1, 9, True, False, PAIRS)
    empty = tl.zeros((PAIRS, BLOCK_C), tl.float32)
    if bias is not None:
        empty += tl.load(bias + tl.zeros((PAIRS, 1), tl.int32) + c[None, :], (c < R)[None, :], 0.0).to(tl.float32)
    mean, _, scale, added = statistics_rows(n1, c, R, PAIRS)

    # Two rows of u are unfinished, `this` and `next`. The row of h after the one at work is on its way, in a, e, o, b.
    row = h + (first - 1) * row_size
    a, e, o, b = load_pairs(row, first > 0, offset_e, offset_o, left, inside_e, inside_o, right, R)
    a, e, o, b = _activated(a, e, o, b, first > 0, left, inside_e, inside_o, right, mean, scale, added, EXACT)
    e0, e1, e2, o0, o1, o2 = neighbours(a, e, o, b, one, SPLIT)
    row += row_size
    a, e, o, b = load_pairs(row, True, offset_e, offset_o, left, inside_e, inside_o, right, R)
    _, _, next_e = slide(empty, empty, empty, e0, e1, e2, taps)
    _, _, next_o = slide(empty, empty, empty, o0, o1, o2, taps)
    a, e, o, b = _activated(a, e, o, b, True, left, inside_e, inside_o, right, mean, scale, added, EXACT)
    e0, e1, e2, o0, o1, o2 = neighbours(a, e, o, b, one, SPLIT)
    more = first + 1 < height
    row += row_size
    a, e, o, b = load_pairs(row, more, offset_e, offset_o, left, inside_e, inside_o, right, R)
    _, this_e, next_e = slide(empty, next_e, empty, e0, e1, e2, taps)
    _, this_o, next_o = slide(empty, next_o, empty, o0, o1, o2, taps)
    # Each lane has the moments of its own column, all of the same count (Welford); columns are merged at the end.
    zero = tl.zeros((PAIRS, BLOCK_C), tl.float32)
    mean_e, m2_e, mean_o, m2_o = zero, zero, zero, zero
    last = tl.minimum(first + ROWS, height)
    for i in range(first, last):
        a, e, o, b = _activated(a, e, o, b, i + 1 < height, left, inside_e, inside_o, right, mean, scale, added, EXACT)
        e0, e1, e2, o0, o1, o2 = neighbours(a, e, o, b, one, SPLIT)
        row = h + (i + 2) * row_size
        a, e, o, b = load_pairs(row, i + 2 < height, offset_e, offset_o, left, inside_e, inside_o, right, R)
        u_e, this_e, next_e = slide(this_e, next_e, empty, e0, e1, e2, taps)
        u_o, this_o, next_o = slide(this_o, next_o, empty, o0, o1, o2, taps)
        u_e, u_o = u_e.to(u.dtype.element_ty), u_o.to(u.dtype.element_ty)
        tl.store(u + i * row_size + offset_e, u_e, inside_e)
        tl.store(u + i * row_size + offset_o, u_o, inside_o)
        if partials is not None:
            share = 1.0 / (i - first + 1).to(tl.float32)
            mean_e, m2_e = _add_value(mean_e, m2_e, gelu(u_e.to(tl.float32), EXACT), share)
            mean_o, m2_o = _add_value(mean_o, m2_o, gelu(u_o.to(tl.float32), EXACT), share)
    if partials is not None:
        count = (last - first).to(tl.float32)
        moments_e = _merge_lanes(mean_e, m2_e, inside_e, count)
        moments_o = _merge_lanes(mean_o, m2_o, inside_o, count)
        count, mean, m2 = merge_moments(*moments_e, *moments_o)
        store_moments(partials, counts, tile * strips + strip, count, mean, m2, c, R)


@triton.jit
def project_kernel(
    u,
    n2,
    weight,
    bias,
    y,
    partials,
    counts,
    rows,
    C: tl.constexpr,
    R: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = BatchNorm(GELU(u)) weight^T + bias, and the moments of y.

    Args:
        weight: (C, R). bias: (C,), or None.
        partials, counts: (programs, 2, C) and (programs,), or None for y alone.
    """
    tiles = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0) // tiles
    first = program.to(tl.int64) * BLOCK_N
    column = tl.program_id(0) % tiles * BLOCK_C
    left = rows - first
    u += first * R
    weight += column * R
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, R, BLOCK_R):
        tile = load_tile(u, R, 0, left, start, R, BLOCK_N, BLOCK_R).to(tl.float32)
        tile = batch_norm(gelu(tile, EXACT), n2, start + tl.arange(0, BLOCK_R), R)
        weights = load_tile(weight, R, 0, C - column, start, R, BLOCK_C, BLOCK_R)
        total = tl.dot(tile.to(weights.dtype), tl.trans(weights), total, input_precision=PRECISION)
    c = column + tl.arange(0, BLOCK_C)
    if bias is not None:
        total += tl.load(bias + c, c < C, 0.0).to(tl.float32)[None, :]
    _store_map(y + first * C, total, left, c, C, partials, counts, program, False, EXACT)


@triton.jit
def output_kernel(
    y, n3, factor, shortcut, out, rows, pixels, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out = shortcut + factor * BatchNorm(y).

    Args:
        factor: (images,), of the branch of each image of ``pixels`` pixels; or None for 1.
        shortcut: (rows, C), or None.
    """
    _, row, c, offset, inside = map_tile(rows, C, BLOCK_N, BLOCK_C)
    branch = batch_norm(tl.load(y + offset, inside, 0.0).to(tl.float32), n3, c, C)
    if factor is not None:
        branch *= tl.load(factor + row // pixels, row < rows, 0.0).to(tl.float32)
    if shortcut is not None:
        branch += tl.load(shortcut + offset, inside, 0.0).to(tl.float32)
    tl.store(out + offset, branch.to(out.dtype.element_ty), inside)


# ---- backward: the projection -------------------------------------------------------------------------------------------------


@triton.jit
def output_sums_kernel(
    grad,
    y,
    n3,
    factor,
    partials,
    rows,
    pixels,
    C: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program's part of the sums of BN3's gradient, over STEPS tiles of BLOCK_N rows.

    Args:
        grad: (rows, C), of ``out``. factor, pixels: of ``output_kernel``.
        partials: (programs, 2, C).
    """
    tiles = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0) // tiles
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd = tl.load(n3 + MEAN * C + c, c < C, 0.0)[None, :], tl.load(n3 + RSTD * C + c, c < C, 0.0)[None, :]
    plain = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    weighted = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for step in range(STEPS):
        row = (program * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        offset, inside = row.to(tl.int64) * C + c[None, :], (row < rows) & (c < C)[None, :]
        branch = _branch_gradient(grad, factor, row, rows, pixels, offset, inside)
        plain += branch
        weighted += branch * ((tl.load(y + offset, inside, 0.0).to(tl.float32) - mean) * rstd)
    store_gradient_sums(partials, program, plain, weighted, c, C)


@triton.jit
def output_gradient_kernel(
    grad, y, n3, s3, factor, dy, rows, pixels, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dy = BN3'(factor * grad).

    Args:
        grad: (rows, C), of ``out``. factor, pixels: of ``output_kernel``.
    """
    _, row, c, offset, inside = map_tile(rows, C, BLOCK_N, BLOCK_C)
    tile = _output_gradient(grad, y, n3, s3, factor, row, c, rows, pixels, offset, inside, C)
    tl.store(dy + offset, tile.to(dy.dtype.element_ty), inside)


@triton.jit
def project_weight_kernel(
    grad,
    y,
    n3,
    s3,
    factor,
    dy,
    u,
    n2,
    products,
    biases,
    rows,
    pixels,
    C: tl.constexpr,
    R: tl.constexpr,
    STEPS: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program's part of dy^T (GELU(u) normalised, without BN2's affine) and of the sum of dy, over STEPS tiles of BLOCK_N rows.

    Args:
        grad, y, n3, s3, factor, pixels: of ``output_gradient_kernel``, whose dy is made and stored here; all but pixels None where dy is read.
        products: (programs, C, R); biases: (programs, C).
    """
    tiles_r, tiles = tl.cdiv(R, BLOCK_R), tl.cdiv(R, BLOCK_R) * tl.cdiv(C, BLOCK_C)
    program = (tl.program_id(0) // tiles).to(tl.int64)
    c = tl.program_id(0) % tiles // tiles_r * BLOCK_C
    r = tl.program_id(0) % tiles_r * BLOCK_R
    channel, column = r + tl.arange(0, BLOCK_R), c + tl.arange(0, BLOCK_C)
    mean, rstd = tl.load(n2 + MEAN * R + channel, channel < R, 0.0), tl.load(n2 + RSTD * R + channel, channel < R, 0.0)
    total = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    bias = tl.zeros([BLOCK_C], tl.float32)
    for step in range(STEPS):
        first = (program * STEPS + step) * BLOCK_N
        if y is None:
            tile = load_tile(dy, C, first, rows, c, C, BLOCK_N, BLOCK_C)
        else:
            row = first.to(tl.int32) + tl.arange(0, BLOCK_N)[:, None]
            offset, inside = row.to(tl.int64) * C + column[None, :], (row < rows) & (column < C)[None, :]
            wide = _output_gradient(grad, y, n3, s3, factor, row, column, rows, pixels, offset, inside, C)
            tile = tl.where(inside, wide, 0.0).to(dy.dtype.element_ty)
            tl.store(dy + offset, tile, inside)
        value = gelu(load_tile(u, R, first, rows, r, R, BLOCK_N, BLOCK_R).to(tl.float32), EXACT)
        normal = ((value - mean[None, :]) * rstd[None, :]).to(tile.dtype)
        total = tl.dot(tl.trans(tile), normal, total, input_precision=PRECISION)
        bias += tl.sum(tile.to(tl.float32), 0)
    _store_products(products, biases, program, total, bias, c, r, C, R, BLOCK_C, BLOCK_R)


@triton.jit
def project_input_kernel(
    dy,
    weight,
    u,
    n2,
    s2,
    du,
    rows,
    C: tl.constexpr,
    R: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """du = GELU'(u) BN2'(dy weight). weight: (C, R)."""
    tiles = tl.cdiv(R, BLOCK_R)
    first = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N
    column = tl.program_id(0) % tiles * BLOCK_R
    total = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for start in range(0, C, BLOCK_C):
        grad = load_tile(dy, C, first, rows, start, C, BLOCK_N, BLOCK_C)
        weights = load_tile(weight, R, start, C, column, R, BLOCK_C, BLOCK_R)
        total = tl.dot(grad, weights, total, input_precision=PRECISION)
    wide = load_tile(u, R, first, rows, column, R, BLOCK_N, BLOCK_R).to(tl.float32)
    r = column + tl.arange(0, BLOCK_R)
    total = activation_gradient(total, wide, n2, s2, r, R, EXACT)
    row = first + tl.arange(0, BLOCK_N)[:, None]
    tl.store(du + row * R + r[None, :], total.to(du.dtype.element_ty), (row < rows) & (r < R)[None, :])


# ---- backward: the depthwise convolution ---------------------------------------------------------------------------------------


@triton.jit
def dw_gradient_kernel(
    du,
    h,
    n1,
    weight,
    dt,
    partials,
    images,
    height,
    width,
    R: tl.constexpr,
    EXACT: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dt, the gradient of the convolution's and the shortcut's input, and a program's part of the sums over its pixels.

    A program slides down as in ``dw_kernel``. Each of its pixels takes the nine gradients of u around it, for dt and, times its t, for the taps:
    no other t is needed. Where a column is outside of the map, so is what is around it in the same image: du is 0 there, and adds nothing.

    Args:
        du, h, dt: (images, height, width, R).
        weight: (R, 9).
        partials: (programs, 12 R), the sums of dt, dt * t_hat and du, and the gradients of the taps (R, 9).
        SPLIT: of ``pair_columns``.
    """
    strips = tl.cdiv(height, ROWS)
    strip = tl.program_id(0) % strips
    first = strip * ROWS
    last = tl.minimum(first + ROWS, height)
    tile = tl.program_id(0) // strips // tl.cdiv(R, BLOCK_C)
    c = tl.program_id(0) // strips % tl.cdiv(R, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_image, offset_e, offset_o, one, left, inside_e, inside_o, right = pair_columns(
        tile, c[None, :], images, height, width, R, 1, SPLIT, PAIRS
    )
    start = first_image.to(tl.int64) * height * width * R
    row_size = width * R
    du += start
    h += start
    dt += start
    taps = load_taps(weight, c[None, :], (c < R)[None, :], 1, 9, True, True, PAIRS)
    mean, rstd, scale, added = statistics_rows(n1, c, R, PAIRS)
    zero = tl.zeros((PAIRS, BLOCK_C), tl.float32)
    sum_dt, sum_normal, sum_du = zero, zero, zero
    upper, middle, lower = (zero, zero, zero), (zero, zero, zero), (zero, zero, zero)  # sums of the taps' rows

    row = du + (first - 1) * row_size
    a, e, o, b = load_pairs(row, first > 0, offset_e, offset_o, left, inside_e, inside_o, right, R)
    above = neighbours(a, e, o, b, one, SPLIT)
    row += row_size
    a, e, o, b = load_pairs(row, True, offset_e, offset_o, left, inside_e, inside_o, right, R)
    here = neighbours(a, e, o, b, one, SPLIT)
    row += row_size
    a, e, o, b = load_pairs(row, first + 1 < height, offset_e, offset_o, left, inside_e, inside_o, right, R)
    row = h + first * row_size
    h_e, h_o = tl.load(row + offset_e, inside_e, 0.0), tl.load(row + offset_o, inside_o, 0.0)
    for i in range(first, last):
        below = neighbours(a, e, o, b, one, SPLIT)
        g_e, g_o = gelu(h_e.to(tl.float32), EXACT), gelu(h_o.to(tl.float32), EXACT)
        # The next rows are on their way.
        row = du + (i + 2) * row_size
        a, e, o, b = load_pairs(row, i + 2 < height, offset_e, offset_o, left, inside_e, inside_o, right, R)
        row = h + (i + 1) * row_size
        more = i + 1 < last
        h_e, h_o = tl.load(row + offset_e, inside_e & more, 0.0), tl.load(row + offset_o, inside_o & more, 0.0)
        dt_e, dt_o = zero, zero
        dt_e, dt_o = add_row(dt_e, dt_o, above, taps[0], taps[1], taps[2])
        dt_e, dt_o = add_row(dt_e, dt_o, here, taps[3], taps[4], taps[5])
        dt_e, dt_o = add_row(dt_e, dt_o, below, taps[6], taps[7], taps[8])
        tl.store(dt + i * row_size + offset_e, dt_e.to(dt.dtype.element_ty), inside_e)
        tl.store(dt + i * row_size + offset_o, dt_o.to(dt.dtype.element_ty), inside_o)
        t_e, t_o = (g_e - mean) * scale + added, (g_o - mean) * scale + added
        # A tap saw what lies on its side of a pixel: a pixel is in the lower row of taps for the gradients above it.
        lower = add_products(lower, *above, t_e, t_o)
        middle = add_products(middle, *here, t_e, t_o)
        upper = add_products(upper, *below, t_e, t_o)
        sum_dt += dt_e + dt_o
        sum_normal += dt_e * ((g_e - mean) * rstd) + dt_o * ((g_o - mean) * rstd)
        sum_du += here[1] + here[4]
        above, here = here, below
    partials += (tile * strips + strip).to(tl.int64) * (12 * R)
    tl.store(partials + c, tl.sum(sum_dt, 0), c < R)
    tl.store(partials + R + c, tl.sum(sum_normal, 0), c < R)
    tl.store(partials + 2 * R + c, tl.sum(sum_du, 0), c < R)
    store_sums(partials + 3 * R, c[None, :], (c < R)[None, :], upper, middle, lower)


# ---- backward: the expansion --------------------------------------------------------------------------------------------------


@triton.jit
def expand_input_kernel(
    dt,
    h,
    n1,
    s1,
    weight,
    x,
    shortcut,
    dx,
    moments,
    rows,
    eps,
    C: tl.constexpr,
    R: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx = LayerNorm'(dz) + shortcut, dz = (GELU'(h) BN1'(dt)) weight: in one program, which holds whole rows.

    Args:
        weight: (R, C), LayerNorm's in it.
        x, shortcut, dx, moments: of ``layer_norm_gradient_kernel``.
        BLOCK_C: at least C.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    dz = _normal_gradient(dt, h, n1, s1, weight, first, 0, rows, C, R, EXACT, BLOCK_N, BLOCK_R, BLOCK_C, PRECISION)
    _store_input_gradient(dz, x, shortcut, dx, moments, first, rows, eps, C)


@triton.jit
def normal_gradient_kernel(
    dt,
    h,
    n1,
    s1,
    weight,
    dz,
    rows,
    C: tl.constexpr,
    R: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dz = (GELU'(h) BN1'(dt)) weight, (rows, C), where no tile holds C channels. weight: (R, C), LayerNorm's in it."""
    tiles = tl.cdiv(C, BLOCK_C)
    first = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N
    c = tl.program_id(0) % tiles * BLOCK_C
    tile = _normal_gradient(dt, h, n1, s1, weight, first, c, rows, C, R, EXACT, BLOCK_N, BLOCK_R, BLOCK_C, PRECISION)
    store_tile(dz + first * C + c, tile, C, rows - first, C - c)


@triton.jit
def layer_norm_gradient_kernel(
    dz,
    x,
    shortcut,
    dx,
    moments,
    rows,
    eps,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = LayerNorm'(dz) + shortcut, LayerNorm being without its affine; a program holds whole rows.

    Args:
        x, dz, dx: (rows, C). shortcut: (rows, C), the gradient that passes by, or None.
        moments: (rows, 2), mean and 1 / sigma of each row of x.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    tile = load_tile(dz, C, first, rows, 0, C, BLOCK_N, BLOCK_C).to(tl.float32)
    _store_input_gradient(tile, x, shortcut, dx, moments, first, rows, eps, C)


@triton.jit
def expand_weight_kernel(
    dt,
    h,
    n1,
    s1,
    x,
    moments,
    products,
    biases,
    rows,
    C: tl.constexpr,
    R: tl.constexpr,
    STEPS: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program's part of dh^T x_hat and of the sum of dh = GELU'(h) BN1'(dt), over STEPS tiles of BLOCK_N rows.

    Args:
        moments: (rows, 2), of ``expand_input_kernel``.
        products: (programs, R, C); biases: (programs, R).
    """
    tiles_c, tiles = tl.cdiv(C, BLOCK_C), tl.cdiv(C, BLOCK_C) * tl.cdiv(R, BLOCK_R)
    program = (tl.program_id(0) // tiles).to(tl.int64)
    r = tl.program_id(0) % tiles // tiles_c * BLOCK_R
    c = tl.program_id(0) % tiles_c * BLOCK_C
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    bias = tl.zeros([BLOCK_R], tl.float32)
    for step in range(STEPS):
        first = (program * STEPS + step) * BLOCK_N
        row = first + tl.arange(0, BLOCK_N)
        grad = load_tile(dt, R, first, rows, r, R, BLOCK_N, BLOCK_R).to(tl.float32)
        wide = load_tile(h, R, first, rows, r, R, BLOCK_N, BLOCK_R).to(tl.float32)
        dh = activation_gradient(grad, wide, n1, s1, r + tl.arange(0, BLOCK_R), R, EXACT)
        dh = tl.where((row < rows)[:, None], dh, 0.0).to(dt.dtype.element_ty)
        mean = tl.load(moments + 2 * row, row < rows, 0.0)[:, None]
        rstd = tl.load(moments + 2 * row + 1, row < rows, 0.0)[:, None]
        normal = (load_tile(x, C, first, rows, c, C, BLOCK_N, BLOCK_C).to(tl.float32) - mean) * rstd
        total = tl.dot(tl.trans(dh), normal.to(dh.dtype), total, input_precision=PRECISION)
        bias += tl.sum(dh.to(tl.float32), 0)
    _store_products(products, biases, program, total, bias, r, c, R, C, BLOCK_R, BLOCK_C)


# ---- backward: both weights ---------------------------------------------------------------------------------------------------


@triton.jit
def weight_gradient_kernel(
    products,
    biases,
    weight,
    gamma,
    beta,
    dweight,
    dbias,
    sums,
    programs,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Gradients of a linear layer behind a norm's affine, (gamma x_hat + beta) weight^T + bias, from the sums of grad^T x_hat and of grad.

    Those of gamma and beta need no pass of their own: they are sums over the outputs of weight times the same product.

    Args:
        products: (programs, OUT, IN); biases: (programs, OUT): added in the order of the programs.
        weight, dweight: (OUT, IN). gamma, beta: (IN,), or None for 1 and 0.
        dbias: (OUT,). sums: (2, IN), the gradients of beta and gamma.
    """
    i = tl.program_id(0) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    input_ = i < IN
    scale = tl.zeros([BLOCK_IN], tl.float32) + 1.0
    shift = tl.zeros([BLOCK_IN], tl.float32)
    if gamma is not None:
        scale = tl.load(gamma + i, input_, 0.0).to(tl.float32)
    if beta is not None:
        shift = tl.load(beta + i, input_, 0.0).to(tl.float32)
    sum_plain = tl.zeros([BLOCK_IN], tl.float32)
    sum_weighted = tl.zeros([BLOCK_IN], tl.float32)
    for start in range(0, OUT, BLOCK_OUT):
        o = start + tl.arange(0, BLOCK_OUT)
        offset, inside = o[:, None] * IN + i[None, :], (o < OUT)[:, None] & input_[None, :]
        product = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
        bias = tl.zeros([BLOCK_OUT], tl.float32)
        part, bias_part = products + offset, biases + o
        for _ in range(programs):
            product += tl.load(part, inside, 0.0)
            bias += tl.load(bias_part, o < OUT, 0.0)
            part += OUT * IN
            bias_part += OUT
        gradient = product * scale[None, :] + bias[:, None] * shift[None, :]
        tl.store(dweight + offset, gradient.to(dweight.dtype.element_ty), inside)
        tl.store(dbias + o, bias.to(dbias.dtype.element_ty), o < OUT)  # all programs store the same
        wide = tl.load(weight + offset, inside, 0.0).to(tl.float32)
        sum_plain += tl.sum(wide * bias[:, None], 0)
        sum_weighted += tl.sum(wide * product, 0)
    tl.store(sums + i, sum_plain, input_)
    tl.store(sums + IN + i, sum_weighted, input_)


# ---- parts ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _store_map(
    out, values, rows, c, C: tl.constexpr, partials, counts, program, ACTIVATED: tl.constexpr, EXACT: tl.constexpr
):
    """Store a tile of the first rows of ``out`` and of the channels c, and the moments of what was stored (ACTIVATED: of its GELU)."""
    row = tl.arange(0, values.shape[0])[:, None]
    values = values.to(out.dtype.element_ty)
    tl.store(out + row * C + c[None, :], values, (row < rows) & (c < C)[None, :])
    if partials is not None:
        values = values.to(tl.float32)
        if ACTIVATED:
            values = gelu(values, EXACT)
        count = tl.minimum(rows, values.shape[0])
        mean, m2 = tile_moments(values, row < rows, count)
        store_moments(partials, counts, program, count, mean, m2, c, C)


@triton.jit
def _store_products(
    products,
    biases,
    program,
    total,
    bias,
    o,
    i,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """A program's part of a weight's gradient, the tile that starts at (o, i), and of its bias's."""
    o, i = o + tl.arange(0, BLOCK_OUT), i + tl.arange(0, BLOCK_IN)
    inside = (o < OUT)[:, None] & (i < IN)[None, :]
    tl.store(products + program * (OUT * IN) + o[:, None] * IN + i[None, :], total, inside)
    tl.store(biases + program * OUT + o, bias, o < OUT)  # programs of other inputs store the same


@triton.jit
def _branch_gradient(grad, factor, row, rows, pixels, offset, inside):
    """factor * grad, 0 outside, float32."""
    branch = tl.load(grad + offset, inside, 0.0).to(tl.float32)
    if factor is not None:
        branch *= tl.load(factor + row // pixels, row < rows, 0.0).to(tl.float32)
    return branch


@triton.jit
def _output_gradient(grad, y, n3, s3, factor, row, c, rows, pixels, offset, inside, C: tl.constexpr):
    """BN3'(factor * grad), of the rows (rows, 1) and channels c (columns,) of a tile; float32, anything outside."""
    branch = _branch_gradient(grad, factor, row, rows, pixels, offset, inside)
    wide = tl.load(y + offset, inside, 0.0).to(tl.float32)
    return batch_norm_gradient(branch, wide, n3, s3, c, C)


@triton.jit
def _normal_gradient(
    dt,
    h,
    n1,
    s1,
    weight,
    first,
    column,
    rows,
    C: tl.constexpr,
    R: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The tile (BLOCK_N, BLOCK_C) of (GELU'(h) BN1'(dt)) weight that starts at (first, column): float32, 0 in columns from C on."""
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, R, BLOCK_R):
        grad = load_tile(dt, R, first, rows, start, R, BLOCK_N, BLOCK_R).to(tl.float32)
        wide = load_tile(h, R, first, rows, start, R, BLOCK_N, BLOCK_R).to(tl.float32)
        r = start + tl.arange(0, BLOCK_R)
        # Beyond R the weights are 0 as well. But what depends on an index the compiler makes once, and warps share it; else it would move
        # the arithmetic behind the exchange, and all warps of a row, which have other columns of dz, would do the same.
        dh = tl.where((r < R)[None, :], activation_gradient(grad, wide, n1, s1, r, R, EXACT), 0.0)
        weights = load_tile(weight, C, start, R, column, C, BLOCK_R, BLOCK_C)
        total = tl.dot(dh.to(weights.dtype), weights, total, input_precision=PRECISION)
    return total


@triton.jit
def _store_input_gradient(dz, x, shortcut, dx, moments, first, rows, eps, C: tl.constexpr):
    """dx and moments of ``layer_norm_gradient_kernel``, given a tile dz float32 of whole rows from ``first`` on, 0 in columns from C on."""
    c = tl.arange(0, dz.shape[1])[None, :]
    wide = load_tile(x, C, first, rows, 0, C, dz.shape[0], dz.shape[1]).to(tl.float32)
    normal, rstd = normal_rows_and_rstd(wide, c < C, C, eps, dz.shape[1] > C)
    out = normal_rows_gradient(dz, normal, rstd, C)
    row = first + tl.arange(0, dz.shape[0])
    offset, inside = row[:, None] * C + c, (row < rows)[:, None] & (c < C)
    if shortcut is not None:
        out += tl.load(shortcut + offset, inside, 0.0).to(tl.float32)
    tl.store(dx + offset, out.to(dx.dtype.element_ty), inside)
    tl.store(moments + 2 * row, tl.sum(wide, 1) / C, row < rows)
    tl.store(moments + 2 * row + 1, rstd, row < rows)


@triton.jit
def _activated(a, e, o, b, there, left, inside_e, inside_o, right, mean, scale, added, EXACT: tl.constexpr):
    """A row of h as ``load_pairs`` gives it -> of t, 0 outside of the map, float32."""
    a, e, o, b = a.to(tl.float32), e.to(tl.float32), o.to(tl.float32), b.to(tl.float32)
    return (
        tl.where(left & there, (gelu(a, EXACT) - mean) * scale + added, 0.0),
        tl.where(inside_e & there, (gelu(e, EXACT) - mean) * scale + added, 0.0),
        tl.where(inside_o & there, (gelu(o, EXACT) - mean) * scale + added, 0.0),
        tl.where(right & there, (gelu(b, EXACT) - mean) * scale + added, 0.0),
    )


@triton.jit
def _add_value(mean, m2, value, share):
    """Moments of n - 1 values, and of one more; share is 1 / n (Welford)."""
    delta = value - mean
    mean += delta * share
    return mean, m2 + delta * (value - mean)


@triton.jit
def _merge_lanes(mean, m2, inside, count):
    """Count, mean and M2 of the columns that are inside, of the moments (PAIRS, BLOCK_C) of ``count`` values each."""
    lanes = tl.max(tl.sum(inside.to(tl.float32), 0), 0)  # the same for every channel of the map
    merged = tl.sum(tl.where(inside, mean, 0.0), 0) / tl.maximum(lanes, 1.0)
    distance = tl.where(inside, mean - merged[None, :], 0.0)
    return lanes * count, merged, tl.sum(tl.where(inside, m2, 0.0) + distance * distance * count, 0)
