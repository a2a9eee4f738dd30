"""The depthwise convolutions on a GPU."""

import triton
import triton.language as tl

from cmt_fast.ops._triton.sliding import load_pairs, load_taps, neighbours, pair_columns, slide


@triton.jit
def conv3x3_kernel(
    x,
    weight,
    bias,
    y,
    images,
    height,
    width,
    C: tl.constexpr,
    SHORTCUT: tl.constexpr,
    TURN: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = depthwise 3x3 of x, or, with TURN, the gradient of x from that of y.

    A program slides down ROWS rows of PAIRS pairs of columns (``_triton/sliding.py``) and BLOCK_C channels.

    Args:
        x, y: (images, height, width, C).
        weight: (C, 9).
        bias: (C,), or None.
        SHORTCUT: add x.
        TURN: the taps by 180 degrees.
        SPLIT: of ``pair_columns``.
    """
    strips = tl.cdiv(height, ROWS)
    first = tl.program_id(0) % strips * ROWS
    tile = tl.program_id(0) // strips // tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) // strips % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    first_image, offset_e, offset_o, one, left, inside_e, inside_o, right = pair_columns(
        tile, c, images, height, width, C, 1, SPLIT, PAIRS
    )
    start = first_image.to(tl.int64) * height * width * C
    row_size = width * C
    x += start
    y += start
    taps = load_taps(weight, c, c < C, 1, 9, SHORTCUT, TURN, PAIRS)
    empty = tl.zeros((PAIRS, BLOCK_C), tl.float32)
    if bias is not None:
        empty += tl.load(bias + tl.zeros((PAIRS, 1), tl.int32) + c, c < C, 0.0).to(tl.float32)

    # Two rows of y are unfinished, `this` and `next`. The row of x after the one at work is on its way, in a, e, o, b; e0, e1, e2 are
    # what an even column needs of the one at work, o0, o1, o2 an odd one.
    row = x + (first - 1) * row_size
    a, e, o, b = load_pairs(row, first > 0, offset_e, offset_o, left, inside_e, inside_o, right, C)
    e0, e1, e2, o0, o1, o2 = neighbours(a, e, o, b, one, SPLIT)
    row += row_size
    a, e, o, b = load_pairs(row, True, offset_e, offset_o, left, inside_e, inside_o, right, C)
    _, _, next_e = slide(empty, empty, empty, e0, e1, e2, taps)
    _, _, next_o = slide(empty, empty, empty, o0, o1, o2, taps)
    e0, e1, e2, o0, o1, o2 = neighbours(a, e, o, b, one, SPLIT)
    row += row_size
    a, e, o, b = load_pairs(row, first + 1 < height, offset_e, offset_o, left, inside_e, inside_o, right, C)
    _, this_e, next_e = slide(empty, next_e, empty, e0, e1, e2, taps)
    _, this_o, next_o = slide(empty, next_o, empty, o0, o1, o2, taps)
    for h in range(first, tl.minimum(first + ROWS, height)):
        e0, e1, e2, o0, o1, o2 = neighbours(a, e, o, b, one, SPLIT)
        row = x + (h + 2) * row_size
        a, e, o, b = load_pairs(row, h + 2 < height, offset_e, offset_o, left, inside_e, inside_o, right, C)
        y_e, this_e, next_e = slide(this_e, next_e, empty, e0, e1, e2, taps)
        y_o, this_o, next_o = slide(this_o, next_o, empty, o0, o1, o2, taps)
        tl.store(y + h * row_size + offset_e, y_e.to(y.dtype.element_ty), inside_e)
        tl.store(y + h * row_size + offset_o, y_o.to(y.dtype.element_ty), inside_o)


@triton.jit
def reduce_kernel(
    x,
    weight,
    bias,
    y,
    windows,
    height,
    width,
    C: tl.constexpr,
    K: tl.constexpr,
    WINDOWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = depthwise K x K of x with stride K. A program makes WINDOWS neighbours of BLOCK_C channels, row by row of their windows.

    Args:
        x: (images, height, width, C).
        weight: (C, K * K).
        bias: (C,), or None.
        y: (images, height // K, width // K, C).
        windows: pixels of y.
    """
    n = tl.program_id(0) // tl.cdiv(C, BLOCK_C) * WINDOWS + tl.arange(0, WINDOWS)[:, None, None]
    j = tl.arange(0, BLOCK_K)[None, :, None]
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)[None, None, :]
    down, across = height // K, width // K
    row = n // across  # of all images
    x += ((row // down).to(tl.int64) * height + row % down * K) * width * C + (n % across * K + j) * C + c
    weight += c * (K * K) + j
    taps = (j < K) & (c < C)
    inside = (n < windows) & taps
    products = tl.zeros((WINDOWS, BLOCK_K, BLOCK_C), tl.float32)
    for i in range(K):
        t = tl.load(weight + i * K, taps, 0.0).to(tl.float32)
        products += t * tl.load(x + i * width * C, inside, 0.0).to(tl.float32)
    result = tl.sum(products, 1, keep_dims=True)
    if bias is not None:
        result += tl.load(bias + c, c < C, 0.0).to(tl.float32)
    tl.store(y + n.to(tl.int64) * C + c, result.to(y.dtype.element_ty), (n < windows) & (c < C))
