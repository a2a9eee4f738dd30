"""The IRFFN of a packed model on a GPU: expansion, then depthwise convolution and projection, in one kernel or in two.

Widths are seldom powers of two, as tiles are: a width is cut into a tile and a narrower one, such as 304 = 256 + 48 of 64 (``split_width``).
"""

import triton
import triton.language as tl

from cmt_fast.ops._triton.gelu import gelu
from cmt_fast.ops._triton.linear import linear_rows, normal_tile, row_statistics
from cmt_fast.ops._triton.tiles import load_tile


@triton.jit
def expand_kernel(
    x,
    weight,
    bias,
    scale,
    shift,
    out,
    rows,
    eps,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    R: tl.constexpr,
    EXACT: tl.constexpr,
    HELD: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = GELU(LN(x) weight^T + bias) * scale + shift.

    A program does a tile of rows and CHUNKS tiles of hidden channels. Programs of the same rows stand side by side.

    Args:
        x: (rows, C). weight: (R, C). bias, scale, shift: (R,). out: (rows, R).
        CHANNELS: how many of C are not padding.
        EXACT: GELU by erf.
        HELD: the rows are normalised once and kept, in tiles of BLOCK_C and (unless 0) BLOCK_REST channels that hold all C. Else
            they are read and normalised for each tile of hidden channels, BLOCK_C channels at a time.
    """
    splits = tl.cdiv(R, CHUNKS * BLOCK_R)
    first = (tl.program_id(0) // splits).to(tl.int64) * BLOCK_N
    begin = tl.program_id(0) % splits * (CHUNKS * BLOCK_R)
    left = rows - first
    x += first * C
    out += first * R
    row = tl.arange(0, BLOCK_N)[:, None]
    if HELD:
        mean, std = row_statistics(x, left, eps, C, CHANNELS, BLOCK_N, min(BLOCK_C, 256))
        normal = normal_tile(x, mean, std, left, 0, C, CHANNELS, BLOCK_N, BLOCK_C)
        if BLOCK_REST:
            rest = normal_tile(x, mean, std, left, BLOCK_C, C, CHANNELS, BLOCK_N, BLOCK_REST)
    for start in range(begin, min(begin + CHUNKS * BLOCK_R, R), BLOCK_R):
        if HELD:
            weights = load_tile(weight + start * C, C, 0, R - start, 0, C, BLOCK_R, BLOCK_C)
            hidden = tl.dot(normal, tl.trans(weights), input_precision=PRECISION)
            if BLOCK_REST:
                weights = load_tile(weight + start * C, C, 0, R - start, BLOCK_C, C, BLOCK_R, BLOCK_REST)
                hidden = tl.dot(rest, tl.trans(weights), hidden, input_precision=PRECISION)
        else:
            hidden = linear_rows(
                x,
                weight + start * C,
                left,
                R - start,
                eps,
                C,
                CHANNELS,
                True,
                BLOCK_N,
                BLOCK_C,
                BLOCK_R,
                PRECISION,
            )
        r = start + tl.arange(0, BLOCK_R)[None, :]
        hidden += tl.load(bias + r, r < R, 0.0)
        hidden = gelu(hidden, EXACT) * tl.load(scale + r, r < R, 0.0) + tl.load(shift + r, r < R, 0.0)
        tl.store(out + row * R + r, hidden.to(out.dtype.element_ty), (row < left) & (r < R))


@triton.jit
def depthwise_project_kernel(
    hidden,
    taps,
    bias,
    weight,
    out_bias,
    shortcut,
    out,
    images,
    height,
    width,
    C: tl.constexpr,
    R: tl.constexpr,
    EXACT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = shortcut + GELU(depthwise 3x3 of hidden + bias) weight^T + out_bias.

    A program does QUADS squares of 2 x 2 pixels and a tile of BLOCK_C + BLOCK_REST outputs. It makes the left operand of the product
    in registers, BLOCK_R hidden channels at a time. The accumulators start from the shortcut: at the end there is no room for it.

    Args:
        hidden: (images, height, width, R). taps: (9, R). bias: (R,). weight: (C, R). out_bias: (C,).
        shortcut, out: (images, height, width, C).
        EXACT: GELU by erf.
    """
    tiles = tl.cdiv(C, BLOCK_C + BLOCK_REST)
    first_quad = tl.program_id(0) // tiles * QUADS
    column = tl.program_id(0) % tiles * (BLOCK_C + BLOCK_REST)
    first_image, pixel, i, j, inside = _quads(first_quad, images, height, width, QUADS)
    first_pixel = first_image.to(tl.int64) * (height * width)
    hidden += first_pixel * R
    shortcut += first_pixel * C
    out += first_pixel * C
    token = _tokens(pixel, i, j, inside, height, width, QUADS)
    c = column + tl.arange(0, BLOCK_C)[None, :]
    mask = (token >= 0) & (c < C)
    total = tl.load(shortcut + (token * C + c), mask, 0.0).to(tl.float32)
    if BLOCK_REST:
        c_rest = column + BLOCK_C + tl.arange(0, BLOCK_REST)[None, :]
        mask_rest = (token >= 0) & (c_rest < C)
        rest = tl.load(shortcut + (token * C + c_rest), mask_rest, 0.0).to(tl.float32)
    for start in range(0, R, BLOCK_R):
        g = _depthwise_gelu(hidden, taps, bias, start, pixel, i, j, inside, height, width, R, EXACT, QUADS, BLOCK_R)
        g = g.to(out.dtype.element_ty)
        weights = load_tile(weight, R, column, C, start, R, BLOCK_C, BLOCK_R)
        total = tl.dot(g, tl.trans(weights), total, input_precision=PRECISION)
        if BLOCK_REST:
            weights = load_tile(weight, R, column + BLOCK_C, C, start, R, BLOCK_REST, BLOCK_R)
            rest = tl.dot(g, tl.trans(weights), rest, input_precision=PRECISION)
    total += tl.load(out_bias + c, c < C, 0.0)
    tl.store(out + (token * C + c), total.to(out.dtype.element_ty), mask)
    if BLOCK_REST:
        rest += tl.load(out_bias + c_rest, c_rest < C, 0.0)
        tl.store(out + (token * C + c_rest), rest.to(out.dtype.element_ty), mask_rest)


@triton.jit
def depthwise_gelu_kernel(
    hidden,
    taps,
    bias,
    out,
    images,
    height,
    width,
    R: tl.constexpr,
    EXACT: tl.constexpr,
    CHUNKS: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = GELU(depthwise 3x3 of hidden + bias), what :func:`depthwise_project_kernel` keeps in registers.

    A program does QUADS squares of 2 x 2 pixels and CHUNKS tiles of channels.

    Args:
        hidden, out: (images, height, width, R). taps: (9, R). bias: (R,).
        EXACT: GELU by erf.
    """
    splits = tl.cdiv(R, CHUNKS * BLOCK_R)
    first_quad = tl.program_id(0) // splits * QUADS
    begin = tl.program_id(0) % splits * (CHUNKS * BLOCK_R)
    first_image, pixel, i, j, inside = _quads(first_quad, images, height, width, QUADS)
    first_pixel = first_image.to(tl.int64) * (height * width)
    hidden += first_pixel * R
    out += first_pixel * R
    token = _tokens(pixel, i, j, inside, height, width, QUADS)
    for start in range(begin, min(begin + CHUNKS * BLOCK_R, R), BLOCK_R):
        g = _depthwise_gelu(hidden, taps, bias, start, pixel, i, j, inside, height, width, R, EXACT, QUADS, BLOCK_R)
        r = start + tl.arange(0, BLOCK_R)[None, :]
        tl.store(out + (token * R + r), g.to(out.dtype.element_ty), (token >= 0) & (r < R))


@triton.jit
def _quads(first, images, height, width, QUADS: tl.constexpr):
    """The squares of 2 x 2 pixels from ``first`` on, row by row and image by image; at an odd border a square hangs over it.

    Returns:
        The image of the first square; and (QUADS, 1) each: the upper left pixel, counted from that image on, its row and column, and
        whether there is such a square.
    """
    across = (width + 1) // 2
    squares = (height + 1) // 2 * across
    first_image = first // squares
    quad = first + tl.arange(0, QUADS)[:, None]
    image = quad // squares
    i = (quad - image * squares) // across
    j = quad - image * squares - i * across
    pixel = ((image - first_image) * height + 2 * i) * width + 2 * j
    return first_image, pixel, 2 * i, 2 * j, image < images


@triton.jit
def _tokens(pixel, i, j, inside, height, width, QUADS: tl.constexpr):
    """The pixels of squares, (4 * QUADS, 1), square by square and row by row; -1 beyond the map."""
    row, column = tl.arange(0, 4)[None, :] // 2, tl.arange(0, 4)[None, :] % 2
    exists = inside & (i + row < height) & (j + column < width)
    return tl.reshape(tl.where(exists, pixel + row * width + column, -1), (4 * QUADS, 1))


@triton.jit
def _depthwise_gelu(
    hidden,
    taps,
    bias,
    start,
    pixel,
    i,
    j,
    inside,
    height,
    width,
    R: tl.constexpr,
    EXACT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """GELU(depthwise 3x3 of hidden + bias), channels ``start`` on, of the pixels of squares: (4 * QUADS, BLOCK_R) float32.

    The four pixels of a square share their neighbourhood: 16 loads in the place of 36, and as many conversions.
    """
    r = start + tl.arange(0, BLOCK_R)[None, :]
    channel = r < R
    # One row of parameters for each square, not one for all: they arrive in the threads that use them.
    same = tl.zeros((QUADS, 1), tl.int32) + r
    y00 = tl.load(bias + same, channel, 0.0)
    y01, y10, y11 = y00, y00, y00
    for row in tl.static_range(-1, 3):
        there = inside & channel & (i + row >= 0) & (i + row < height)
        pointers = hidden + ((pixel + row * width) * R + r)
        a = tl.load(pointers - R, there & (j > 0), 0.0).to(tl.float32)
        b = tl.load(pointers, there, 0.0).to(tl.float32)
        c = tl.load(pointers + R, there & (j + 1 < width), 0.0).to(tl.float32)
        d = tl.load(pointers + 2 * R, there & (j + 2 < width), 0.0).to(tl.float32)
        if row < 2:  # of the upper pixels
            y00, y01 = _add_row(y00, y01, a, b, c, d, taps + ((row + 1) * 3 * R + same), channel, R)
        if row > -1:
            y10, y11 = _add_row(y10, y11, a, b, c, d, taps + (row * 3 * R + same), channel, R)
    top = tl.join(gelu(y00, EXACT), gelu(y01, EXACT))
    bottom = tl.join(gelu(y10, EXACT), gelu(y11, EXACT))
    square = tl.join(top, bottom)  # (QUADS, BLOCK_R, column, row)
    return tl.reshape(tl.permute(square, (0, 3, 2, 1)), (4 * QUADS, BLOCK_R))


@triton.jit
def _add_row(y0, y1, a, b, c, d, tap, channel, R: tl.constexpr):
    """A row of three taps, for two neighbouring pixels."""
    t0, t1, t2 = tl.load(tap, channel, 0.0), tl.load(tap + R, channel, 0.0), tl.load(tap + 2 * R, channel, 0.0)
    return y0 + a * t0 + b * t1 + c * t2, y1 + b * t0 + c * t1 + d * t2
