"""A 3x3 convolution of the stem on a GPU, with GELU and the affine that follows."""

import triton
import triton.language as tl

from cmt_fast.ops._triton.gelu import gelu
from cmt_fast.ops._triton.tiles import load_tile


@triton.jit
def conv3x3_kernel(
    x,
    weight,
    bias,
    scale,
    shift,
    y,
    height,
    width,
    image_stride,
    row_stride,
    column_stride,
    channel_stride,
    C: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = scale * GELU(convolution of x, zero padding 1, + bias) + shift.

    A program does BLOCK_H x BLOCK_W pixels of y and all of its channels, as a matrix product over the 9 * C terms of a pixel: term
    t * C + c is channel c under tap t. Each tap loads its own pixels, most of them from the L1 cache, where those of its neighbours are.

    Args:
        x: C channels of images (height, width), of any floating dtype, with the strides given; without strides
            (images, height, width, C) row-major, whose rows are then known to be whole vectors.
        weight: (S, 9, C).
        bias, scale, shift: (S,); scale and shift may be None, for no affine.
        y: (images, cdiv(height, STRIDE), cdiv(width, STRIDE), S).
        EXACT: of :func:`gelu`.
    """
    if image_stride is None:
        image_stride, row_stride, column_stride, channel_stride = height * width * C, width * C, C, 1
    down, across = tl.cdiv(height, STRIDE), tl.cdiv(width, STRIDE)
    tiles_across = tl.cdiv(across, BLOCK_W)
    tiles = tl.cdiv(down, BLOCK_H) * tiles_across
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    top, left = tile // tiles_across * BLOCK_H, tile % tiles_across * BLOCK_W
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    x += image * image_stride
    row, column = (top + pixel // BLOCK_W) * STRIDE - 1, (left + pixel % BLOCK_W) * STRIDE - 1  # of the first tap

    total = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_S], tl.float32)
    for start in tl.static_range(0, 9 * C, BLOCK_K):
        term = start + tl.arange(0, BLOCK_K)[:, None]
        tap = term // C
        h, w = row[None, :] + tap // 3, column[None, :] + tap % 3
        inside = (h >= 0) & (h < height) & (w >= 0) & (w < width) & (term < 9 * C)
        offset = h * row_stride + w * column_stride + term % C * channel_stride
        terms = tl.load(x + offset, inside, 0.0).to(weight.dtype.element_ty)
        weights = load_tile(weight, 9 * C, 0, S, start, 9 * C, BLOCK_S, BLOCK_K)
        total = tl.dot(tl.trans(terms), tl.trans(weights), total, input_precision=PRECISION)

    s = tl.arange(0, BLOCK_S)[None, :]
    h, w = top + pixel[:, None] // BLOCK_W, left + pixel[:, None] % BLOCK_W
    result = gelu(total + tl.load(bias + s, s < S, 0.0), EXACT)
    if scale is not None:
        result = result * tl.load(scale + s, s < S, 0.0) + tl.load(shift + s, s < S, 0.0)
    y += image * (down * across * S)
    tl.store(y + (h * across + w) * S + s, result.to(y.dtype.element_ty), (h < down) & (w < across) & (s < S))
