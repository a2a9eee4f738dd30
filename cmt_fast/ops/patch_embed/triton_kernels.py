"""A patch embedding of a packed model on a GPU: 2x2 patches, matrix product, LayerNorm."""

import triton
import triton.language as tl

from cmt_fast.ops._triton.norm import normalise_rows
from cmt_fast.ops._triton.tiles import load_tile


@triton.jit
def patch_embed_kernel(
    x,
    weight,
    bias,
    scale,
    shift,
    y,
    tokens,
    height,
    width,
    eps,
    C_IN: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = scale * LayerNorm(patches of x times weight^T + bias) + shift.

    A program does BLOCK_N tokens, of one image or several, and all channels. The rows of a patch are 2 * C_IN contiguous numbers each.

    Args:
        x: (images, height, width, C_IN).
        weight: (C, 4 * C_IN). bias, scale, shift: (C,).
        y: (tokens, C): (images, height // 2, width // 2, C).
        CHANNELS: how many of C are not padding.
    """
    down, across = height // 2, width // 2
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    row = token // across  # of all images
    first_row = (row // down * height + row % down * 2).to(tl.int64)  # of x
    corner = x + first_row * (width * C_IN) + token % across * (2 * C_IN)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, 4 * C_IN, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        offset = k // (2 * C_IN) * (width * C_IN) + k % (2 * C_IN)
        patches = tl.load(corner + offset, (token < tokens) & (k < 4 * C_IN), 0.0)
        weights = load_tile(weight, 4 * C_IN, 0, C, start, 4 * C_IN, BLOCK_C, BLOCK_K)
        total = tl.dot(patches, tl.trans(weights), total, input_precision=PRECISION)
    c = tl.arange(0, BLOCK_C)[None, :]
    total += tl.load(bias + c, c < C, 0.0)
    normal = normalise_rows(total, c < CHANNELS, CHANNELS, eps, CHANNELS < BLOCK_C)
    result = normal * tl.load(scale + c, c < C, 0.0) + tl.load(shift + c, c < C, 0.0)
    tl.store(y + token.to(tl.int64) * C + c, result.to(y.dtype.element_ty), (token < tokens) & (c < C))
