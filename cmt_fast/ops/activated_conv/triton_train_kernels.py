"""t = BatchNorm(GELU(x)) before a convolution in training on a GPU: two passes over memory forward, two backward, one tile a program.

x, t and their gradients (rows, C), rows being the pixels of all images; statistics ``n`` (6, C) and sums (2, C) of ``_triton/batch_norm.py``.
"""

import triton
import triton.language as tl

from cmt_fast.ops._triton.batch_norm import (
    MEAN,
    RSTD,
    activation_gradient,
    batch_norm,
    store_gradient_sums,
    store_moments,
    tile_moments,
)
from cmt_fast.ops._triton.gelu import gelu
from cmt_fast.ops._triton.tiles import map_tile


@triton.jit
def activation_moments_kernel(
    x, partials, counts, rows, C: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The moments of a tile of GELU(x): partials (programs, 2, C), counts (programs,)."""
    program, row, c, offset, inside = map_tile(rows, C, BLOCK_N, BLOCK_C)
    value = gelu(tl.load(x + offset, inside, 0.0).to(tl.float32), EXACT)
    count = tl.minimum(rows - program * BLOCK_N, BLOCK_N)
    mean, m2 = tile_moments(value, row < rows, count)
    store_moments(partials, counts, program, count, mean, m2, c, C)


@triton.jit
def activation_norm_kernel(
    x,
    n,
    grad,
    t,
    partials,
    rows,
    C: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """t, and of its gradient a tile's part of the sums of BatchNorm's gradient.

    Args:
        t: or None.
        grad, partials: the gradient of t, and (programs, 2, C); or None.
    """
    program, _, c, offset, inside = map_tile(rows, C, BLOCK_N, BLOCK_C)
    value = gelu(tl.load(x + offset, inside, 0.0).to(tl.float32), EXACT)
    if t is not None:
        tl.store(t + offset, batch_norm(value, n, c, C).to(t.dtype.element_ty), inside)
    if partials is not None:
        mean, rstd = tl.load(n + MEAN * C + c, c < C, 0.0), tl.load(n + RSTD * C + c, c < C, 0.0)
        wide = tl.load(grad + offset, inside, 0.0).to(tl.float32)
        store_gradient_sums(partials, program, wide, wide * ((value - mean[None, :]) * rstd[None, :]), c, C)


@triton.jit
def activation_gradient_kernel(
    grad, x, n, sums, dx, rows, C: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dx = GELU'(x) BatchNorm'(grad), grad being that of t; sums None where the statistics are frozen."""
    _, _, c, offset, inside = map_tile(rows, C, BLOCK_N, BLOCK_C)
    wide = tl.load(grad + offset, inside, 0.0).to(tl.float32)
    out = activation_gradient(wide, tl.load(x + offset, inside, 0.0).to(tl.float32), n, sums, c, C, EXACT)
    tl.store(dx + offset, out.to(dx.dtype.element_ty), inside)
