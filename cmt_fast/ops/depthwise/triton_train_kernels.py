"""The gradients of the depthwise convolutions on a GPU."""

import triton
import triton.language as tl

from cmt_fast.ops._triton.sliding import (
    add_products,
    load_own,
    load_pairs,
    load_taps,
    neighbours,
    pair_columns,
    slide,
    store_sums,
)


@triton.jit
def conv3x3_backward_kernel(
    grad,
    x,
    weight,
    dx,
    partials,
    images,
    height,
    width,
    C: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SHORTCUT: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients of the depthwise 3x3 in one pass over that of y and x: docs/math.md, section 3.

    A program slides down ROWS rows as ``conv3x3_kernel`` does. A row of grad that arrives belongs to three rows of dx and, by the same
    three taps each, to the products with three rows of x. Of the sums of the taps a program has the products with its own rows of x.

    Args:
        grad, x, dx: (images, height, width, C); dx None if it is not needed.
        weight: (C, 9).
        partials: (programs, ...), in the order of the programs of a tile of channels, the sums of weight (C, 9) with WEIGHT, without which x is
            not read, then those of bias (C,) with BIAS.
        SHORTCUT: grad goes to dx unchanged too.
        SPLIT: of ``pair_columns``.
    """
    strips = tl.cdiv(height, ROWS)
    strip = tl.program_id(0) % strips
    first = strip * ROWS
    end = tl.minimum(first + ROWS, height)
    tile = tl.program_id(0) // strips // tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) // strips % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    first_image, offset_e, offset_o, one, left, inside_e, inside_o, right = pair_columns(
        tile, c, images, height, width, C, 1, SPLIT, PAIRS
    )
    start = first_image.to(tl.int64) * height * width * C
    row_size = width * C
    grad += start
    x += start
    empty = tl.zeros((PAIRS, BLOCK_C), tl.float32)
    if dx is not None:
        dx += start
        taps = load_taps(weight, c, c < C, 1, 9, SHORTCUT, True, PAIRS)
    upper, middle, lower = (empty, empty, empty), (empty, empty, empty), (empty, empty, empty)  # sums of the taps' rows
    total = empty  # of grad

    a, e, o, b = load_pairs(
        grad + (first - 1) * row_size, first > 0, offset_e, offset_o, left, inside_e, inside_o, right, C
    )
    e0, e1, e2, o0, o1, o2 = neighbours(a, e, o, b, one, SPLIT)
    if dx is not None:
        _, _, next_e = slide(empty, empty, empty, e0, e1, e2, taps)
        _, _, next_o = slide(empty, empty, empty, o0, o1, o2, taps)
    if WEIGHT:
        # x0, x1 and x2 are the rows of x above the row of grad at work, beside it and below it, as far as they are the program's own.
        x1_e, x1_o = load_own(x + first * row_size, True, offset_e, offset_o, inside_e, inside_o)
        x2_e, x2_o = load_own(x + (first + 1) * row_size, first + 1 < end, offset_e, offset_o, inside_e, inside_o)
        x1_e, x1_o, x2_e, x2_o = x1_e.to(tl.float32), x1_o.to(tl.float32), x2_e.to(tl.float32), x2_o.to(tl.float32)
        lower = add_products(lower, e0, e1, e2, o0, o1, o2, x1_e, x1_o)
    a, e, o, b = load_pairs(grad + first * row_size, True, offset_e, offset_o, left, inside_e, inside_o, right, C)
    e0, e1, e2, o0, o1, o2 = neighbours(a, e, o, b, one, SPLIT)
    if dx is not None:
        _, this_e, next_e = slide(empty, next_e, empty, e0, e1, e2, taps)
        _, this_o, next_o = slide(empty, next_o, empty, o0, o1, o2, taps)
    if WEIGHT:
        middle = add_products(middle, e0, e1, e2, o0, o1, o2, x1_e, x1_o)
        lower = add_products(lower, e0, e1, e2, o0, o1, o2, x2_e, x2_o)
        x0_e, x0_o, x1_e, x1_o = x1_e, x1_o, x2_e, x2_o
        x2_e, x2_o = load_own(x + (first + 2) * row_size, first + 2 < end, offset_e, offset_o, inside_e, inside_o)
        x2_e, x2_o = x2_e.to(tl.float32), x2_o.to(tl.float32)
    if BIAS:
        total += tl.where(first == 0, e1 + o1, 0.0)  # below, each program adds the rows of grad below its own
    a, e, o, b = load_pairs(
        grad + (first + 1) * row_size, first + 1 < height, offset_e, offset_o, left, inside_e, inside_o, right, C
    )
    a, e, o, b = a.to(tl.float32), e.to(tl.float32), o.to(tl.float32), b.to(tl.float32)
    for h in range(first, end):
        # The next rows are on their way while this one is at work. They become float32 when that is done: 16-bit values that
        # wait for a turn of the loop are packed and unpacked, which costs more than the products.
        row = grad + (h + 2) * row_size
        a3, e3, o3, b3 = load_pairs(row, h + 2 < height, offset_e, offset_o, left, inside_e, inside_o, right, C)
        e0, e1, e2, o0, o1, o2 = neighbours(a, e, o, b, one, SPLIT)
        if dx is not None:
            dx_e, this_e, next_e = slide(this_e, next_e, empty, e0, e1, e2, taps)
            dx_o, this_o, next_o = slide(this_o, next_o, empty, o0, o1, o2, taps)
            tl.store(dx + h * row_size + offset_e, dx_e.to(dx.dtype.element_ty), inside_e)
            tl.store(dx + h * row_size + offset_o, dx_o.to(dx.dtype.element_ty), inside_o)
        if WEIGHT:
            x3_e, x3_o = load_own(x + (h + 3) * row_size, h + 3 < end, offset_e, offset_o, inside_e, inside_o)
            upper = add_products(upper, e0, e1, e2, o0, o1, o2, x0_e, x0_o)
            middle = add_products(middle, e0, e1, e2, o0, o1, o2, x1_e, x1_o)
            lower = add_products(lower, e0, e1, e2, o0, o1, o2, x2_e, x2_o)
            x0_e, x0_o, x1_e, x1_o, x2_e, x2_o = x1_e, x1_o, x2_e, x2_o, x3_e.to(tl.float32), x3_o.to(tl.float32)
        if BIAS:
            total += e1 + o1
        a, e, o, b = a3.to(tl.float32), e3.to(tl.float32), o3.to(tl.float32), b3.to(tl.float32)

    partials += (tile * strips + strip).to(tl.int64) * ((9 * WEIGHT + BIAS) * C)
    if WEIGHT:
        store_sums(partials, c, c < C, upper, middle, lower)
    if BIAS:
        tl.store(partials + 9 * WEIGHT * C + c, tl.sum(total, 0)[None, :], c < C)


@triton.jit
def reduce_backward_kernel(
    grad,
    x,
    weight,
    dx,
    partials,
    windows,
    height,
    width,
    C: tl.constexpr,
    K: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    TILES: tl.constexpr,
    WINDOWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients of the reduction. A program has one row of the windows of TILES tiles, and the taps in it.

    Windows that the lower and the right border cut count as windows here, with a gradient of 0: so all of dx is written.

    Args:
        grad: (images, height // K, width // K, C).
        x, dx: (images, height, width, C); dx None if it is not needed.
        weight: (C, K * K).
        partials: (programs, ...), in the order of the programs of a row and a tile of channels, the sums of weight (C, K * K) with WEIGHT,
            without which x is not read, then those of bias (C,) with BIAS; None without either.
        windows: those that the borders cut included.
    """
    i = tl.program_id(0) % K
    c = tl.program_id(0) // K % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)[None, None, :]
    program = tl.program_id(0) // K // tl.cdiv(C, BLOCK_C)
    j = tl.arange(0, BLOCK_K)[None, :, None]
    taps = (j < K) & (c < C)
    down, across = height // K, width // K
    columns, rows = tl.cdiv(width, K), tl.cdiv(height, K)
    if dx is not None:
        t = tl.load(weight + c * (K * K) + i * K + j, taps, 0.0).to(tl.float32)
    products = tl.zeros((WINDOWS, BLOCK_K, BLOCK_C), tl.float32)
    total = tl.zeros((WINDOWS, 1, BLOCK_C), tl.float32)
    for tile in range(program * TILES, tl.minimum((program + 1) * TILES, tl.cdiv(windows, WINDOWS))):
        n = tile * WINDOWS + tl.arange(0, WINDOWS)[:, None, None]
        p, q, image = n // columns % rows, n % columns, (n // columns // rows).to(tl.int64)
        whole = (n < windows) & (p < down) & (q < across)
        g = tl.load(grad + ((image * down + p) * across + q) * C + c, whole & (c < C), 0.0).to(tl.float32)
        pixel = ((image * height + p * K + i) * width + q * K + j) * C + c
        if dx is not None:
            inside = (n < windows) & (p * K + i < height) & (q * K + j < width) & taps
            tl.store(dx + pixel, (g * t).to(dx.dtype.element_ty), inside)
        if WEIGHT:
            products += g * tl.load(x + pixel, whole & taps, 0.0).to(tl.float32)
        if BIAS:
            total += g
    if partials is not None:
        partials += program.to(tl.int64) * ((K * K * WEIGHT + BIAS) * C)
    if WEIGHT:
        tl.store(partials + c * (K * K) + i * K + j, tl.sum(products, 0, keep_dims=True), taps)
    if BIAS:
        tl.store(partials + K * K * WEIGHT * C + c, tl.sum(total, 0, keep_dims=True), (c < C) & (i == 0))
