"""The 3x3 convolutions of the stem on a GPU, with GELU and the affine that follows, or with the patch embedding."""

import triton
import triton.language as tl

from cmt_fast.ops._triton.gelu import gelu
from cmt_fast.ops._triton.norm import normalise_rows
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

    A program does BLOCK_H x BLOCK_W pixels of y and all of its channels.

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
    image, row, column = _pixels_of_tile(down, across, BLOCK_H, BLOCK_W)
    total = _convolve(
        x + image * image_stride,
        weight,
        row * STRIDE,
        column * STRIDE,
        height,
        width,
        row_stride,
        column_stride,
        channel_stride,
        C,
        S,
        BLOCK_K,
        BLOCK_S,
        PRECISION,
    )
    s = tl.arange(0, BLOCK_S)[None, :]
    result = gelu(total + tl.load(bias + s, s < S, 0.0), EXACT)
    if scale is not None:
        result = result * tl.load(scale + s, s < S, 0.0) + tl.load(shift + s, s < S, 0.0)
    row, column = row[:, None], column[:, None]
    y += image * (down * across * S) + (row * across + column) * S + s
    tl.store(y, result.to(y.dtype.element_ty), (row < down) & (column < across) & (s < S))


@triton.jit
def conv3x3_embed_kernel(
    x,
    weight,
    bias,
    embed_weight,
    embed_bias,
    scale,
    shift,
    y,
    height,
    width,
    eps,
    S: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = scale * LayerNorm(2x2 patches of GELU(convolution of x + bias) times embed_weight^T + embed_bias) + shift.

    A program does BLOCK_H x BLOCK_W tokens and all of their channels. Patches do not overlap, so no pixel is convolved twice: the program does
    the upper left pixels of its patches, then the upper right ones and so on, each with its quarter of the embedding.

    Args:
        x: (images, height, width, S).
        weight: (S, 9, S). bias: (S,).
        embed_weight: (C, 4 * S). embed_bias, scale, shift: (C,).
        y: (images, height // 2, width // 2, C).
        CHANNELS: how many of C are not padding.
        EXACT: of :func:`gelu`.
    """
    down, across = height // 2, width // 2
    image, row, column = _pixels_of_tile(down, across, BLOCK_H, BLOCK_W)
    s, c = tl.arange(0, BLOCK_S)[None, :], tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_C], tl.float32)
    for pixel in tl.range(4, num_stages=1):
        map_ = _convolve(
            x + image * (height * width * S),
            weight,
            row * 2 + pixel // 2,
            column * 2 + pixel % 2,
            height,
            width,
            width * S,
            S,
            1,
            S,
            S,
            BLOCK_K,
            BLOCK_S,
            PRECISION,
        )
        map_ = gelu(map_ + tl.load(bias + s, s < S, 0.0), EXACT).to(embed_weight.dtype.element_ty)
        weights = load_tile(embed_weight + pixel * S, 4 * S, 0, C, 0, S, BLOCK_C, BLOCK_S)
        total = tl.dot(map_, tl.trans(weights), total, input_precision=PRECISION)
    total += tl.load(embed_bias + c, c < C, 0.0)
    normal = normalise_rows(total, c < CHANNELS, CHANNELS, eps, CHANNELS < BLOCK_C)
    result = normal * tl.load(scale + c, c < C, 0.0) + tl.load(shift + c, c < C, 0.0)
    row, column = row[:, None], column[:, None]
    y += image * (down * across * C) + (row * across + column) * C + c
    tl.store(y, result.to(y.dtype.element_ty), (row < down) & (column < across) & (c < C))


@triton.jit
def _pixels_of_tile(down, across, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """This program's image, and row and column of each pixel of its tile of a map (down, across); some may lie beyond it."""
    tiles_across = tl.cdiv(across, BLOCK_W)
    tiles = tl.cdiv(down, BLOCK_H) * tiles_across
    tile = tl.program_id(0) % tiles
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    row, column = tile // tiles_across * BLOCK_H + pixel // BLOCK_W, tile % tiles_across * BLOCK_W + pixel % BLOCK_W
    return (tl.program_id(0) // tiles).to(tl.int64), row, column


@triton.jit
def _convolve(
    x,
    weight,
    row,
    column,
    height,
    width,
    row_stride,
    column_stride,
    channel_stride,
    C: tl.constexpr,
    S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """3x3 convolution of one image around the pixels (row, column), zero padding, as a matrix product: (pixels, BLOCK_S) float32.

    The product is over the 9 * C terms of a pixel: term t * C + c is channel c under tap t. Each tap loads its own pixels, most of them
    from the L1 cache, where those of its neighbours are.

    Args:
        x: pointer to the image, C channels of (height, width). weight: (S, 9, C).
        row, column: (pixels,), some may lie beyond the image.
    """
    total = tl.zeros([row.shape[0], BLOCK_S], tl.float32)
    for start in tl.static_range(0, 9 * C, BLOCK_K):
        term = start + tl.arange(0, BLOCK_K)[:, None]
        tap = term // C
        h, w = row[None, :] + (tap // 3 - 1), column[None, :] + (tap % 3 - 1)
        inside = (h >= 0) & (h < height) & (w >= 0) & (w < width) & (term < 9 * C)
        offset = h * row_stride + w * column_stride + term % C * channel_stride
        terms = tl.load(x + offset, inside, 0.0).to(weight.dtype.element_ty)
        weights = load_tile(weight, 9 * C, 0, S, start, 9 * C, BLOCK_S, BLOCK_K)
        total = tl.dot(tl.trans(terms), tl.trans(weights), total, input_precision=PRECISION)
    return total
