"""The local perception unit on a GPU, alone or with the LayerNorm and the reduction that follow it in a block."""

import triton
import triton.language as tl

from cmt_fast.ops._triton.norm import normalise_rows


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
    TAP_STRIDE: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    SHORTCUT: tl.constexpr,
    NORM: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = depthwise 3x3 of x, and with NORM its LayerNorm, reduced by K x K with stride K.

    A program slides down K * WINDOWS rows of PAIRS pairs of neighbouring columns and BLOCK_C channels, with NORM all of them. A row of x
    is read once and goes into the three rows of y that it touches; the two columns of a pair share their loads. A row of y is
    normalised, and added to the window that it lies in, where it is finished: nothing of it is read again.

    The columns of all images lie side by side, each image's padded to a multiple of K, so that narrow maps fill a tile too. Offsets
    are 64-bit to the first image of a tile and 32-bit from there.

    Args:
        x, y: (images, height, width, C).
        taps: tap t of channel c at t * TAP_STRIDE + c * CHANNEL_STRIDE; SHORTCUT adds 1 to the centre.
        bias: (C,), or None.
        reduction: (K * K, C); None if K = 1.
        reduced: (images, height // K, width // K, C); None without NORM.
        CHANNELS: how many of C are not padding.
        SPLIT: an image has an odd number of columns, so that a pair may lie in two images.
    """
    strips = tl.cdiv(height, K * WINDOWS)
    first = tl.program_id(0) % strips * (K * WINDOWS)
    tile = tl.program_id(0) // strips // tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) // strips % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    channel = c < C

    pair = tile * PAIRS + tl.arange(0, PAIRS)[:, None]
    columns = tl.cdiv(width, K) * K
    first_image = tile * (2 * PAIRS) // columns
    start = first_image.to(tl.int64) * height * width * C
    row_size = width * C
    # Even and odd columns of the pairs: `e` and `o` below. `one` if both lie in one image.
    image_e, j_e = 2 * pair // columns, 2 * pair % columns
    offset_e = (image_e - first_image) * (height * row_size) + j_e * C + c
    if SPLIT:
        image_o, j_o = (2 * pair + 1) // columns, (2 * pair + 1) % columns
        offset_o = (image_o - first_image) * (height * row_size) + j_o * C + c
    else:
        image_o, j_o = image_e, j_e + 1
        offset_o = offset_e + C
    one = image_e == image_o
    inside_e = (image_e < images) & (j_e < width) & channel
    inside_o = (image_o < images) & (j_o < width) & channel
    left = inside_e & (j_e > 0)
    right = inside_o & (j_o < width - 1)
    x += start
    y += start
    if NORM and K == 1:
        reduced += start
    if NORM and K > 1:
        down, across = height // K, width // K
        window_column = tile * (2 * PAIRS // K) + tl.arange(0, 2 * PAIRS // K)[:, None]
        window_image, window_j = window_column // (columns // K), window_column % (columns // K)
        window_offset = (window_image - first_image) * (down * across) + window_j
        window_offset = tl.where((window_image < images) & (window_j < across), window_offset, -1)  # not stored
        reduced += first_image.to(tl.int64) * (down * across) * C

    # One row of taps for each row of a tile, not one for all: they arrive in the threads that use them.
    tap = taps + tl.zeros((PAIRS, 1), tl.int32) + c * CHANNEL_STRIDE
    t0 = tl.load(tap, channel, 0.0).to(tl.float32)
    t1 = tl.load(tap + TAP_STRIDE, channel, 0.0).to(tl.float32)
    t2 = tl.load(tap + 2 * TAP_STRIDE, channel, 0.0).to(tl.float32)
    t3 = tl.load(tap + 3 * TAP_STRIDE, channel, 0.0).to(tl.float32)
    t4 = tl.load(tap + 4 * TAP_STRIDE, channel, 0.0).to(tl.float32)
    t5 = tl.load(tap + 5 * TAP_STRIDE, channel, 0.0).to(tl.float32)
    t6 = tl.load(tap + 6 * TAP_STRIDE, channel, 0.0).to(tl.float32)
    t7 = tl.load(tap + 7 * TAP_STRIDE, channel, 0.0).to(tl.float32)
    t8 = tl.load(tap + 8 * TAP_STRIDE, channel, 0.0).to(tl.float32)
    if SHORTCUT:
        t4 += 1.0
    empty = tl.zeros((PAIRS, BLOCK_C), tl.float32)
    if bias is not None:
        empty += tl.load(bias + tl.zeros((PAIRS, 1), tl.int32) + c, channel, 0.0).to(tl.float32)

    # Two rows of y are unfinished: `this` lacks the row of x below it, `next` has only the row above it. The row of x after the one at
    # work is on its way, in a, e, o, b; e0, e1, e2 are what an even column needs of the one at work, o0, o1, o2 an odd one.
    up = first > 0
    row = x + (first - 1) * row_size
    a, e, o, b = _load(row, offset_e, offset_o, left & up, inside_e & up, inside_o & up, right & up, C)
    e0, e1, e2, o0, o1, o2 = _neighbours(a, e, o, b, one, SPLIT)
    a, e, o, b = _load(row + row_size, offset_e, offset_o, left, inside_e, inside_o, right, C)
    this_e = _add(empty, e0, e1, e2, t0, t1, t2)
    this_o = _add(empty, o0, o1, o2, t0, t1, t2)
    e0, e1, e2, o0, o1, o2 = _neighbours(a, e, o, b, one, SPLIT)
    more = first + 1 < height
    row += 2 * row_size
    a, e, o, b = _load(row, offset_e, offset_o, left & more, inside_e & more, inside_o & more, right & more, C)
    this_e = _add(this_e, e0, e1, e2, t3, t4, t5)
    this_o = _add(this_o, o0, o1, o2, t3, t4, t5)
    next_e = _add(empty, e0, e1, e2, t0, t1, t2)
    next_o = _add(empty, o0, o1, o2, t0, t1, t2)
    for window in range(tl.minimum(WINDOWS, tl.cdiv(height - first, K))):
        if NORM and K > 1:
            total = tl.zeros((PAIRS, BLOCK_C), tl.float32)
        for i in range(K):
            h = first + window * K + i
            e0, e1, e2, o0, o1, o2 = _neighbours(a, e, o, b, one, SPLIT)
            more = h + 2 < height
            row = x + (h + 2) * row_size
            a, e, o, b = _load(row, offset_e, offset_o, left & more, inside_e & more, inside_o & more, right & more, C)
            y_e = _add(this_e, e0, e1, e2, t6, t7, t8)
            y_o = _add(this_o, o0, o1, o2, t6, t7, t8)
            this_e = _add(next_e, e0, e1, e2, t3, t4, t5)
            this_o = _add(next_o, o0, o1, o2, t3, t4, t5)
            next_e = _add(empty, e0, e1, e2, t0, t1, t2)
            next_o = _add(empty, o0, o1, o2, t0, t1, t2)
            here = h < height
            tl.store(y + h * row_size + offset_e, y_e.to(y.dtype.element_ty), inside_e & here)
            tl.store(y + h * row_size + offset_o, y_o.to(y.dtype.element_ty), inside_o & here)
            if NORM:
                y_e = normalise_rows(y_e, c < CHANNELS, CHANNELS, eps, CHANNELS < BLOCK_C)
                y_o = normalise_rows(y_o, c < CHANNELS, CHANNELS, eps, CHANNELS < BLOCK_C)
                if K == 1:
                    tl.store(reduced + h * row_size + offset_e, y_e.to(reduced.dtype.element_ty), inside_e & here)
                    tl.store(reduced + h * row_size + offset_o, y_o.to(reduced.dtype.element_ty), inside_o & here)
                else:
                    weight = reduction + i * K * C + (j_e % K * C + c)
                    total += y_e * tl.load(weight, channel, 0.0).to(tl.float32)
                    total += y_o * tl.load(weight + C, channel, 0.0).to(tl.float32)
        if NORM and K > 1:
            sums = tl.sum(tl.reshape(total, (2 * PAIRS // K, K // 2, BLOCK_C)), 1)
            i_out = first // K + window
            pointers = reduced + ((window_offset + i_out * across) * C + c)
            tl.store(pointers, sums.to(reduced.dtype.element_ty), (window_offset >= 0) & (i_out < down) & channel)


@triton.jit
def _load(row, offset_e, offset_o, left, inside_e, inside_o, right, C: tl.constexpr):
    """A row of x: left of the pairs, their even and odd columns, right of the pairs; 0 outside of the map."""
    return (
        tl.load(row + offset_e - C, left, 0.0),
        tl.load(row + offset_e, inside_e, 0.0),
        tl.load(row + offset_o, inside_o, 0.0),
        tl.load(row + offset_o + C, right, 0.0),
    )


@triton.jit
def _neighbours(a, e, o, b, one, SPLIT: tl.constexpr):
    """What lies left of the even columns, in them, right of them, and the same of the odd ones, float32."""
    a, e, o, b = a.to(tl.float32), e.to(tl.float32), o.to(tl.float32), b.to(tl.float32)
    if SPLIT:
        return a, e, tl.where(one, o, 0.0), tl.where(one, e, 0.0), o, b
    return a, e, o, e, o, b


@triton.jit
def _add(y, left, centre, right, t_left, t_centre, t_right):
    """A row of three taps."""
    return y + left * t_left + centre * t_centre + right * t_right
