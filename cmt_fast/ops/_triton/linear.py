"""Linear layers of the rows of a map, with a LayerNorm before them where one is."""

import triton
import triton.language as tl

from cmt_fast.ops._triton.norm import normalise_rows
from cmt_fast.ops._triton.tiles import load_tile


@triton.jit
def linear_kernel(
    x,
    weight,
    bias,
    shortcut,
    out,
    rows,
    eps,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = x weight^T + bias, of x itself or (NORM) of its LayerNorm, plus a shortcut if there is one.

    Args:
        x: (rows, C). weight: (OUT, C). bias: (OUT,). shortcut: (rows, OUT), or None. out: (rows, OUT).
        CHANNELS: how many of C are not padding.
    """
    tiles = tl.cdiv(OUT, BLOCK_OUT)
    first = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N
    column = tl.program_id(0) % tiles * BLOCK_OUT
    left = rows - first
    total = linear_rows(
        x + first * C,
        weight + column * C,
        left,
        OUT - column,
        eps,
        C,
        CHANNELS,
        NORM,
        BLOCK_N,
        BLOCK_C,
        BLOCK_OUT,
        PRECISION,
    )
    row, o = tl.arange(0, BLOCK_N)[:, None], column + tl.arange(0, BLOCK_OUT)[None, :]
    inside = (row < left) & (o < OUT)
    total += tl.load(bias + o, o < OUT, 0.0)
    if shortcut is not None:
        total += tl.load(shortcut + first * OUT + row * OUT + o, inside, 0.0).to(tl.float32)
    tl.store(out + first * OUT + row * OUT + o, total.to(out.dtype.element_ty), inside)


@triton.jit
def linear_rows(
    x,
    weight,
    rows,
    outputs,
    eps,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first rows of x, or (NORM) of its LayerNorm without the affine, times the first rows of weight, transposed.

    Args:
        x: pointer to (rows, C); weight: pointer to (outputs, C): what a tile needs beyond them is 0.
        CHANNELS: how many of C are not padding; read only with NORM.

    Returns:
        (BLOCK_N, BLOCK_OUT) float32.
    """
    if NORM:
        mean, scale = row_statistics(x, rows, eps, C, CHANNELS, BLOCK_N, BLOCK_C)
    total = tl.zeros([BLOCK_N, BLOCK_OUT], tl.float32)
    for start in range(0, C, BLOCK_C):
        if NORM:
            tile = normal_tile(x, mean, scale, rows, start, C, CHANNELS, BLOCK_N, BLOCK_C)
        else:
            tile = load_tile(x, C, 0, rows, start, C, BLOCK_N, BLOCK_C)
        weights = load_tile(weight, C, 0, outputs, start, C, BLOCK_OUT, BLOCK_C)
        total = tl.dot(tile.to(weights.dtype), tl.trans(weights), total, input_precision=PRECISION)
    return total


@triton.jit
def normal_rows(x, rows, eps, C: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """LayerNorm of the first rows of x, without its affine, in the dtype of x: (BLOCK_N, BLOCK_C), all C in one tile.

    Args:
        x: pointer to (rows, C).
        CHANNELS: how many of C are not padding.
    """
    wide = load_tile(x, C, 0, rows, 0, C, BLOCK_N, BLOCK_C).to(tl.float32)
    counted = tl.arange(0, BLOCK_C)[None, :] < CHANNELS
    return normalise_rows(wide, counted, CHANNELS, eps, CHANNELS < BLOCK_C).to(x.dtype.element_ty)


@triton.jit
def row_statistics(x, rows, eps, C: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of each row, (BLOCK_N,) each, merged chunk by chunk (Chan): nothing cancels.

    Args:
        x: pointer to (rows, C).
        CHANNELS: how many of C are not padding.
    """
    mean = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, CHANNELS, BLOCK_C):
        tile = load_tile(x, C, 0, rows, start, CHANNELS, BLOCK_N, BLOCK_C).to(tl.float32)
        count = tl.minimum(BLOCK_C, CHANNELS - start)
        part = tl.sum(tile, 1) / count
        counted = start + tl.arange(0, BLOCK_C)[None, :] < CHANNELS
        centred = tl.where(counted, tile - part[:, None], 0.0)
        share = count / (start + count)
        squares += tl.sum(centred * centred, 1) + (part - mean) * (part - mean) * start * share
        mean += (part - mean) * share
    return mean, tl.rsqrt(squares / CHANNELS + eps)


@triton.jit
def normal_tile(
    x, mean, scale, rows, start, C: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """LayerNorm of the first rows of x from channel ``start`` on, given :func:`row_statistics`: (BLOCK_N, BLOCK_C) in the dtype of x."""
    tile = load_tile(x, C, 0, rows, start, C, BLOCK_N, BLOCK_C)
    counted = start + tl.arange(0, BLOCK_C)[None, :] < CHANNELS
    normal = (tile.to(tl.float32) - mean[:, None]) * scale[:, None]
    return tl.where(counted, normal, 0.0).to(x.dtype.element_ty)
