"""The end of an IRFFN and the LPU of the block after it, in training on a GPU: the map between them is made on load, and never in memory.

y, shortcut, lpu (images, height, width, C); the statistics n3 (6, C) of ``_triton/batch_norm.py``; factor (images,), of the branch of each image, or None
for 1. That map, `out`, is shortcut + factor * BatchNorm(y), rounded to the dtype of lpu, in which it would be stored. Formulas: docs/math.md, section 8.
"""

import triton
import triton.language as tl

from cmt_fast.ops._triton.batch_norm import statistics_rows
from cmt_fast.ops._triton.sliding import (
    add_products,
    add_row,
    load_own,
    load_pairs,
    load_taps,
    neighbours,
    pair_columns,
    slide,
    store_sums,
)


@triton.jit
def output_lpu_kernel(
    y,
    n3,
    factor,
    shortcut,
    weight,
    bias,
    lpu,
    images,
    height,
    width,
    C: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """lpu = depthwise 3x3 of out, + out, where out is 0 outside of the map.

    A program slides down ROWS rows of PAIRS pairs of columns (``_triton/sliding.py``) and BLOCK_C channels.

    Args:
        weight: (C, 9). bias: (C,), or None.
        SPLIT: of ``pair_columns``.
    """
    strips = tl.cdiv(height, ROWS)
    first = tl.program_id(0) % strips * ROWS
    tile = tl.program_id(0) // strips // tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) // strips % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_image, offset_e, offset_o, one, left, inside_e, inside_o, right = pair_columns(
        tile, c[None, :], images, height, width, C, 1, SPLIT, PAIRS
    )
    place = (offset_e, offset_o, left, inside_e, inside_o, right)
    start = first_image.to(tl.int64) * height * width * C
    row_size = width * C
    y += start
    shortcut += start
    lpu += start
    taps = load_taps(weight, c[None, :], (c < C)[None, :], 1, 9, True, False, PAIRS)
    empty = tl.zeros((PAIRS, BLOCK_C), tl.float32)
    if bias is not None:
        empty += tl.load(bias + tl.zeros((PAIRS, 1), tl.int32) + c[None, :], (c < C)[None, :], 0.0).to(tl.float32)
    mean, _, scale, added = statistics_rows(n3, c, C, PAIRS)
    factor_e, factor_o = _factors(factor, tile, images, width, PAIRS)
    branch = (mean, scale, added, factor_e, factor_o)

    # Two rows of lpu are unfinished, `this` and `next`. The rows of y and shortcut after the one at work are on their way, in y_row and x_row.
    row = (first - 1) * row_size
    y_row = load_pairs(y + row, first > 0, *place, C)
    x_row = load_pairs(shortcut + row, first > 0, *place, C)
    a, e, o, b = _out_pairs(y_row, x_row, first > 0, left, inside_e, inside_o, right, *branch, lpu.dtype.element_ty)
    e0, e1, e2, o0, o1, o2 = neighbours(a, e, o, b, one, SPLIT)
    row += row_size
    y_row = load_pairs(y + row, True, *place, C)
    x_row = load_pairs(shortcut + row, True, *place, C)
    _, _, next_e = slide(empty, empty, empty, e0, e1, e2, taps)
    _, _, next_o = slide(empty, empty, empty, o0, o1, o2, taps)
    a, e, o, b = _out_pairs(y_row, x_row, True, left, inside_e, inside_o, right, *branch, lpu.dtype.element_ty)
    e0, e1, e2, o0, o1, o2 = neighbours(a, e, o, b, one, SPLIT)
    more = first + 1 < height
    row += row_size
    y_row = load_pairs(y + row, more, *place, C)
    x_row = load_pairs(shortcut + row, more, *place, C)
    _, this_e, next_e = slide(empty, next_e, empty, e0, e1, e2, taps)
    _, this_o, next_o = slide(empty, next_o, empty, o0, o1, o2, taps)
    for i in range(first, tl.minimum(first + ROWS, height)):
        more = i + 1 < height
        a, e, o, b = _out_pairs(y_row, x_row, more, left, inside_e, inside_o, right, *branch, lpu.dtype.element_ty)
        e0, e1, e2, o0, o1, o2 = neighbours(a, e, o, b, one, SPLIT)
        row = (i + 2) * row_size
        y_row = load_pairs(y + row, i + 2 < height, *place, C)
        x_row = load_pairs(shortcut + row, i + 2 < height, *place, C)
        lpu_e, this_e, next_e = slide(this_e, next_e, empty, e0, e1, e2, taps)
        lpu_o, this_o, next_o = slide(this_o, next_o, empty, o0, o1, o2, taps)
        tl.store(lpu + i * row_size + offset_e, lpu_e.to(lpu.dtype.element_ty), inside_e)
        tl.store(lpu + i * row_size + offset_o, lpu_o.to(lpu.dtype.element_ty), inside_o)


@triton.jit
def output_lpu_gradient_kernel(
    grad,
    y,
    n3,
    factor,
    shortcut,
    weight,
    dout,
    partials,
    images,
    height,
    width,
    C: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dout, the gradient of out, and a program's part of the sums of BN3's gradient and of the LPU's.

    A program slides down as in ``output_lpu_kernel``. Each of its pixels takes the nine gradients of lpu around it, for dout and, times its out, for
    the taps: no other out is needed. Where a column is outside of the map, so is what is around it in the same image: grad is 0 there, and adds nothing.

    Args:
        grad, dout: (images, height, width, C), in the dtype of lpu; dout None if it is not needed.
        shortcut: None without WEIGHT.
        weight: (C, 9).
        partials: (programs, ...): with dout the sums of BN3's gradient (2, C), factor * dout and factor * dout * y_hat; with WEIGHT the
            gradients of the taps (C, 9); with BIAS the sum of grad (C,).
        SPLIT: of ``pair_columns``.
    """
    strips = tl.cdiv(height, ROWS)
    strip = tl.program_id(0) % strips
    first = strip * ROWS
    last = tl.minimum(first + ROWS, height)
    tile = tl.program_id(0) // strips // tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) // strips % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_image, offset_e, offset_o, one, left, inside_e, inside_o, right = pair_columns(
        tile, c[None, :], images, height, width, C, 1, SPLIT, PAIRS
    )
    place = (offset_e, offset_o, left, inside_e, inside_o, right)
    start = first_image.to(tl.int64) * height * width * C
    row_size = width * C
    grad += start
    y += start
    zero = tl.zeros((PAIRS, BLOCK_C), tl.float32)
    if dout is not None:
        dout += start
        taps = load_taps(weight, c[None, :], (c < C)[None, :], 1, 9, True, True, PAIRS)
    mean, rstd, scale, added = statistics_rows(n3, c, C, PAIRS)
    factor_e, factor_o = _factors(factor, tile, images, width, PAIRS)
    sum_branch, sum_normal, sum_grad = zero, zero, zero
    upper, middle, lower = (zero, zero, zero), (zero, zero, zero), (zero, zero, zero)  # sums of the taps' rows

    row = grad + (first - 1) * row_size
    a, e, o, b = load_pairs(row, first > 0, *place, C)
    above = neighbours(a, e, o, b, one, SPLIT)
    row += row_size
    a, e, o, b = load_pairs(row, True, *place, C)
    here = neighbours(a, e, o, b, one, SPLIT)
    row += row_size
    a, e, o, b = load_pairs(row, first + 1 < height, *place, C)
    y_e, y_o = load_own(y + first * row_size, True, offset_e, offset_o, inside_e, inside_o)
    if WEIGHT:
        shortcut += start
        x_e, x_o = load_own(shortcut + first * row_size, True, offset_e, offset_o, inside_e, inside_o)
    for i in range(first, last):
        below = neighbours(a, e, o, b, one, SPLIT)
        centred_e, centred_o = y_e.to(tl.float32) - mean, y_o.to(tl.float32) - mean
        if WEIGHT:
            out_e = _out(centred_e, x_e, scale, added, factor_e, grad.dtype.element_ty)
            out_o = _out(centred_o, x_o, scale, added, factor_o, grad.dtype.element_ty)
            # A tap saw what lies on its side of a pixel: a pixel is in the lower row of taps for the gradients above it.
            lower = add_products(lower, *above, out_e, out_o)
            middle = add_products(middle, *here, out_e, out_o)
            upper = add_products(upper, *below, out_e, out_o)
        # The next rows are on their way.
        a, e, o, b = load_pairs(grad + (i + 2) * row_size, i + 2 < height, *place, C)
        next_row = (i + 1) * row_size
        y_e, y_o = load_own(y + next_row, i + 1 < last, offset_e, offset_o, inside_e, inside_o)
        if WEIGHT:
            x_e, x_o = load_own(shortcut + next_row, i + 1 < last, offset_e, offset_o, inside_e, inside_o)
        if dout is not None:
            dout_e, dout_o = add_row(zero, zero, above, taps[0], taps[1], taps[2])
            dout_e, dout_o = add_row(dout_e, dout_o, here, taps[3], taps[4], taps[5])
            dout_e, dout_o = add_row(dout_e, dout_o, below, taps[6], taps[7], taps[8])
            dout_e, dout_o = dout_e.to(dout.dtype.element_ty), dout_o.to(dout.dtype.element_ty)
            tl.store(dout + i * row_size + offset_e, dout_e, inside_e)
            tl.store(dout + i * row_size + offset_o, dout_o, inside_o)
            branch_e, branch_o = dout_e.to(tl.float32) * factor_e, dout_o.to(tl.float32) * factor_o
            sum_branch += branch_e + branch_o
            sum_normal += branch_e * (centred_e * rstd) + branch_o * (centred_o * rstd)
        if BIAS:
            sum_grad += here[1] + here[4]
        above, here = here, below

    partials += (tile * strips + strip).to(tl.int64) * ((2 * (dout is not None) + 9 * WEIGHT + BIAS) * C)
    if dout is not None:
        tl.store(partials + c, tl.sum(sum_branch, 0), c < C)
        tl.store(partials + C + c, tl.sum(sum_normal, 0), c < C)
        partials += 2 * C
    if WEIGHT:
        store_sums(partials, c[None, :], (c < C)[None, :], upper, middle, lower)
        partials += 9 * C
    if BIAS:
        tl.store(partials + c, tl.sum(sum_grad, 0), c < C)


@triton.jit
def _factors(factor, tile, images, width, PAIRS: tl.constexpr):
    """The factors of the even columns of a tile and of the odd ones, (PAIRS, 1) float32."""
    if factor is None:
        return 1.0, 1.0
    else:
        column = 2 * (tile * PAIRS + tl.arange(0, PAIRS)[:, None])
        image_e, image_o = column // width, (column + 1) // width
        return (
            tl.load(factor + image_e, image_e < images, 0.0).to(tl.float32),
            tl.load(factor + image_o, image_o < images, 0.0).to(tl.float32),
        )


@triton.jit
def _out(centred, shortcut, scale, added, factor, dtype: tl.constexpr):
    """out, float32, of a tile of y - mean float32 and one of the shortcut; dtype: of lpu."""
    return ((centred * scale + added) * factor + shortcut.to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def _out_pairs(
    y_row, x_row, there, left, inside_e, inside_o, right, mean, scale, added, factor_e, factor_o, dtype: tl.constexpr
):
    """A row of out, 0 outside of the map, from those of y and the shortcut as ``load_pairs`` gives them."""
    a, e, o, b = y_row
    p, q, r, s = x_row
    a = _out(a.to(tl.float32) - mean, p, scale, added, factor_e, dtype)
    e = _out(e.to(tl.float32) - mean, q, scale, added, factor_e, dtype)
    o = _out(o.to(tl.float32) - mean, r, scale, added, factor_o, dtype)
    b = _out(b.to(tl.float32) - mean, s, scale, added, factor_o, dtype)
    return (
        tl.where(left & there, a, 0.0),
        tl.where(inside_e & there, e, 0.0),
        tl.where(inside_o & there, o, 0.0),
        tl.where(right & there, b, 0.0),
    )
