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
    COLUMNS: tl.constexpr,
    WINDOWS: tl.constexpr,
    ADJACENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = depthwise 3x3 of x; with NORM also its LayerNorm, reduced by K x K with stride K.

    A program slides down K * WINDOWS rows of COLUMNS columns, with all channels. A row of x is read once, in three loads that
    the L1 cache merges, and goes into the three rows of y that it touches; a row of y is normalised and reduced where
    it is finished. The columns of all images lie side by side, each image's padded to a multiple of K, so that narrow maps fill a tile too.

    Args:
        x, y: (images, height, width, C).
        taps: tap t of channel c at t * TAP_STRIDE + c * CHANNEL_STRIDE, row by row; SHORTCUT adds 1 to the centre.
        bias: (C,), or None.
        reduction: (K * K, C); not read if K = 1.
        reduced: (images, height // K, width // K, C).
        CHANNELS: how many of C are not padding.
    """
    strips = tl.cdiv(height, K * WINDOWS)
    first = tl.program_id(0) % strips * (K * WINDOWS)
    tile = tl.program_id(0) // strips
    padded_width = tl.cdiv(width, K) * K
    slot = tl.arange(0, COLUMNS)
    column = tile * COLUMNS + slot % (COLUMNS // ADJACENT) * ADJACENT + slot // (COLUMNS // ADJACENT)
    image = column // padded_width
    j = column % padded_width
    c = tl.arange(0, BLOCK_C)[None, :]
    channel = c < C
    inside = ((image < images) & (j < width))[:, None] & channel
    left = inside & (j > 0)[:, None]
    right = inside & (j < width - 1)[:, None]
    row_size = width * C
    first_image = tile * COLUMNS // padded_width
    x += first_image.to(tl.int64) * height * row_size
    y += first_image.to(tl.int64) * height * row_size
    offset = (image - first_image)[:, None] * (height * row_size) + j[:, None] * C + c

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
    start = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
    if bias is not None:
        start += tl.load(bias + c, channel, 0.0).to(tl.float32)

    a, b, d = _three(
        x + (first - 1) * row_size + offset, left & (first > 0), inside & (first > 0), right & (first > 0), C
    )
    this = start + a * t0 + b * t1 + d * t2
    a, b, d = _three(x + first * row_size + offset, left, inside, right, C)
    this += a * t3 + b * t4 + d * t5
    below = start + a * t0 + b * t1 + d * t2
    if NORM and K > 1:
        down, across = height // K, width // K
        q = tile * (COLUMNS // K) + tl.arange(0, COLUMNS // K)
        image_out, j_out = q // (padded_width // K), q % (padded_width // K)
        stored = (image_out < images) & (j_out < across)
        reduced_offset = tl.where(stored, (image_out - first_image) * (down * across) + j_out, -1)
    for window in range(tl.minimum(WINDOWS, tl.cdiv(height - first, K))):
        if K > 1:
            total = tl.zeros((COLUMNS // ADJACENT, BLOCK_C), tl.float32)
        for i in range(K):
            row = first + window * K + i
            more = row + 1 < height
            a, b, d = _three(x + (row + 1) * row_size + offset, left & more, inside & more, right & more, C)
            result = this + a * t6 + b * t7 + d * t8
            this = below + a * t3 + b * t4 + d * t5
            below = start + a * t0 + b * t1 + d * t2
            tl.store(y + row * row_size + offset, result.to(y.dtype.element_ty), inside & (row < height))
            if NORM:
                normal = normalise_rows(result, c < CHANNELS, CHANNELS, eps, CHANNELS < BLOCK_C)
                if K == 1:
                    tl.store(
                        reduced + first_image.to(tl.int64) * height * row_size + row * row_size + offset,
                        normal.to(reduced.dtype.element_ty),
                        inside,
                    )
                else:
                    weight = reduction + i * K * C + (j % K * C)[:, None] + c
                    weighted = normal * tl.load(weight, channel, 0.0).to(tl.float32)
                    total += tl.sum(tl.reshape(weighted, (ADJACENT, COLUMNS // ADJACENT, BLOCK_C)), 0)
        if NORM and K > 1:
            windows = tl.sum(tl.reshape(total, (COLUMNS // K, K // ADJACENT, BLOCK_C)), 1)
            i_out = first // K + window
            stored = (reduced_offset >= 0) & (i_out < down)
            pointers = (
                reduced + (first_image.to(tl.int64) * down + i_out) * across * C + reduced_offset[:, None] * C + c
            )
            tl.store(pointers, windows.to(reduced.dtype.element_ty), stored[:, None] & channel)


@triton.jit
def _three(pointers, left, centre, right, C: tl.constexpr):
    """A row, and the same row one column to the left and to the right: each (columns, channels) float32."""
    return (
        tl.load(pointers - C, left, 0.0).to(tl.float32),
        tl.load(pointers, centre, 0.0).to(tl.float32),
        tl.load(pointers + C, right, 0.0).to(tl.float32),
    )
