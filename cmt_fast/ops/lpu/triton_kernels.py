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
    WINDOWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADJACENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = depthwise 3x3 of x, and with NORM its LayerNorm, reduced by K x K with stride K.

    A program slides down K * WINDOWS rows of COLUMNS columns and BLOCK_C channels, with NORM all of them. A row of x is read once (three
    loads, one column apart, that the L1 cache merges) and goes into the three rows of y that it touches. A row of y is normalised,
    and added to the window it lies in, where it is finished: nothing of it is read again.

    The columns of all images lie side by side, each image's padded to a multiple of K, so that narrow maps fill a tile too. Offsets
    are 64-bit to the first image of a tile and 32-bit from there.

    Args:
        x, y: (images, height, width, C).
        taps: tap t of channel c at t * TAP_STRIDE + c * CHANNEL_STRIDE; SHORTCUT adds 1 to the centre.
        bias: (C,), or None.
        reduction: (K * K, C); None if K = 1.
        reduced: (images, height // K, width // K, C); None without NORM.
        CHANNELS: how many of C are not padding.
        ADJACENT: columns of a window that a thread holds; they are added up before anything moves between threads.
    """
    strips = tl.cdiv(height, K * WINDOWS)
    first = tl.program_id(0) % strips * (K * WINDOWS)
    tile = tl.program_id(0) // strips // tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) // strips % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    channel = c < C

    # A thread holds every (COLUMNS // ADJACENT)-th slot: these become neighbours on the map.
    slot = tl.arange(0, COLUMNS)
    column = tile * COLUMNS + slot % (COLUMNS // ADJACENT) * ADJACENT + slot // (COLUMNS // ADJACENT)
    padded_width = tl.cdiv(width, K) * K
    image, j = column // padded_width, column % padded_width
    centre = ((image < images) & (j < width))[:, None] & channel
    left = centre & (j > 0)[:, None]
    right = centre & (j < width - 1)[:, None]

    row_size = width * C
    first_image = tile * COLUMNS // padded_width
    start = first_image.to(tl.int64) * height * row_size
    offset = (image - first_image)[:, None] * (height * row_size) + j[:, None] * C + c
    x += start
    y += start
    if NORM and K == 1:
        reduced += start
    if NORM and K > 1:
        down, across = height // K, width // K
        window_column = tile * (COLUMNS // K) + tl.arange(0, COLUMNS // K)
        window_image, window_j = window_column // (padded_width // K), window_column % (padded_width // K)
        window_offset = (window_image - first_image) * (down * across) + window_j
        window_offset = tl.where((window_image < images) & (window_j < across), window_offset, -1)  # not stored
        reduced += first_image.to(tl.int64) * (down * across) * C

    tap = taps + c * CHANNEL_STRIDE
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
    empty = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
    if bias is not None:
        empty += tl.load(bias + c, channel, 0.0).to(tl.float32)

    # The two unfinished rows of y: `this` lacks the row of x below it, `below` has only the row above it.
    above = first > 0
    a, b, d = _row(x + (first - 1) * row_size + offset, left & above, centre & above, right & above, C)
    this = empty + a * t0 + b * t1 + d * t2
    a, b, d = _row(x + first * row_size + offset, left, centre, right, C)
    this += a * t3 + b * t4 + d * t5
    below = empty + a * t0 + b * t1 + d * t2
    for window in range(tl.minimum(WINDOWS, tl.cdiv(height - first, K))):
        if NORM and K > 1:
            total = tl.zeros((COLUMNS // ADJACENT, BLOCK_C), tl.float32)
        for i in range(K):
            row = first + window * K + i
            more = row + 1 < height
            a, b, d = _row(x + (row + 1) * row_size + offset, left & more, centre & more, right & more, C)
            result = this + a * t6 + b * t7 + d * t8
            this = below + a * t3 + b * t4 + d * t5
            below = empty + a * t0 + b * t1 + d * t2
            stored = centre & (row < height)
            tl.store(y + row * row_size + offset, result.to(y.dtype.element_ty), stored)
            if NORM:
                normal = normalise_rows(result, c < CHANNELS, CHANNELS, eps, CHANNELS < BLOCK_C)
                if K == 1:
                    tl.store(reduced + row * row_size + offset, normal.to(reduced.dtype.element_ty), stored)
                else:
                    weight = tl.load(reduction + i * K * C + (j % K * C)[:, None] + c, channel, 0.0)
                    weighted = tl.reshape(normal * weight.to(tl.float32), (ADJACENT, COLUMNS // ADJACENT, BLOCK_C))
                    total += tl.sum(weighted, 0)
        if NORM and K > 1:
            sums = tl.sum(tl.reshape(total, (COLUMNS // K, K // ADJACENT, BLOCK_C)), 1)
            window_i = first // K + window
            stored = ((window_offset >= 0) & (window_i < down))[:, None] & channel
            pointers = reduced + window_i * across * C + window_offset[:, None] * C + c
            tl.store(pointers, sums.to(reduced.dtype.element_ty), stored)


@triton.jit
def _row(pointers, left, centre, right, C: tl.constexpr):
    """What lies left of each column, in it, and right of it: (columns, channels) float32 each, 0 outside of the map."""
    return (
        tl.load(pointers - C, left, 0.0).to(tl.float32),
        tl.load(pointers, centre, 0.0).to(tl.float32),
        tl.load(pointers + C, right, 0.0).to(tl.float32),
    )
