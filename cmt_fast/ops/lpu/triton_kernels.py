"""The local perception unit on a GPU, with the LayerNorm and the reduction that follow it in a block."""

import triton
import triton.language as tl

from cmt_fast.ops._triton.norm import normalise_rows
from cmt_fast.ops._triton.sliding import load_pairs, load_taps, neighbours, pair_columns, slide


@triton.jit
def lpu_kernel(
    x,
    taps,
    bias,
    reduction,
    y,
    reduced,
    images,
    height,
    width,
    eps,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = depthwise 3x3 of x, and its LayerNorm, reduced by K x K with stride K.

    A program slides down K * WINDOWS rows of PAIRS pairs of columns (``_triton/sliding.py``) and all channels. A row of y is normalised,
    and added to the window that it lies in, where it is finished: nothing of it is read again.

    Args:
        x, y: (images, height, width, C).
        taps: (9, C), with the shortcut in them.
        bias: (C,).
        reduction: (K * K, C); None if K = 1.
        reduced: (images, height // K, width // K, C).
        CHANNELS: how many of C are not padding.
        SPLIT: of ``pair_columns``.
        BLOCK_C: at least C.
    """
    strips = tl.cdiv(height, K * WINDOWS)
    first = tl.program_id(0) % strips * (K * WINDOWS)
    tile = tl.program_id(0) // strips
    c = tl.arange(0, BLOCK_C)[None, :]
    channel = c < C
    first_image, offset_e, offset_o, one, left, inside_e, inside_o, right = pair_columns(
        tile, c, images, height, width, C, K, SPLIT, PAIRS
    )
    start = first_image.to(tl.int64) * height * width * C
    row_size = width * C
    x += start
    y += start
    if K == 1:
        reduced += start
    else:
        down, across = height // K, width // K
        columns = tl.cdiv(width, K)  # of windows, the unfinished ones at the right border included
        window_column = tile * (2 * PAIRS // K) + tl.arange(0, 2 * PAIRS // K)[:, None]
        window_image, window_j = window_column // columns, window_column % columns
        window_offset = (window_image - first_image) * (down * across) + window_j
        window_offset = tl.where((window_image < images) & (window_j < across), window_offset, -1)  # not stored
        reduced += first_image.to(tl.int64) * (down * across) * C
        column = 2 * (tile * PAIRS + tl.arange(0, PAIRS)[:, None]) % K  # in its window, of the even columns

    taps = load_taps(taps, c, channel, C, 1, False, False, PAIRS)
    empty = tl.zeros((PAIRS, BLOCK_C), tl.float32)
    empty += tl.load(bias + tl.zeros((PAIRS, 1), tl.int32) + c, channel, 0.0).to(tl.float32)

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
    for window in range(tl.minimum(WINDOWS, tl.cdiv(height - first, K))):
        if K > 1:
            total = tl.zeros((PAIRS, BLOCK_C), tl.float32)
        for i in range(K):
            h = first + window * K + i
            e0, e1, e2, o0, o1, o2 = neighbours(a, e, o, b, one, SPLIT)
            row = x + (h + 2) * row_size
            a, e, o, b = load_pairs(row, h + 2 < height, offset_e, offset_o, left, inside_e, inside_o, right, C)
            y_e, this_e, next_e = slide(this_e, next_e, empty, e0, e1, e2, taps)
            y_o, this_o, next_o = slide(this_o, next_o, empty, o0, o1, o2, taps)
            here = h < height
            tl.store(y + h * row_size + offset_e, y_e.to(y.dtype.element_ty), inside_e & here)
            tl.store(y + h * row_size + offset_o, y_o.to(y.dtype.element_ty), inside_o & here)
            y_e = normalise_rows(y_e, c < CHANNELS, CHANNELS, eps, CHANNELS < BLOCK_C)
            y_o = normalise_rows(y_o, c < CHANNELS, CHANNELS, eps, CHANNELS < BLOCK_C)
            if K == 1:
                tl.store(reduced + h * row_size + offset_e, y_e.to(reduced.dtype.element_ty), inside_e & here)
                tl.store(reduced + h * row_size + offset_o, y_o.to(reduced.dtype.element_ty), inside_o & here)
            else:
                weight = reduction + i * K * C + (column * C + c)
                total += y_e * tl.load(weight, channel, 0.0).to(tl.float32)
                total += y_o * tl.load(weight + C, channel, 0.0).to(tl.float32)
        if K > 1:
            sums = tl.sum(tl.reshape(total, (2 * PAIRS // K, K // 2, BLOCK_C)), 1)
            i_out = first // K + window
            pointers = reduced + ((window_offset + i_out * across) * C + c)
            tl.store(pointers, sums.to(reduced.dtype.element_ty), (window_offset >= 0) & (i_out < down) & channel)
