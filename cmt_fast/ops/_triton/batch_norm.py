"""BatchNorm in pieces: what a kernel adds to its epilogue or prologue, and the small kernels between two of them.

BatchNorm needs every pixel of a batch before it can normalise the first: the kernel that makes a map stores the moments of each of its tiles,
these are merged in a fixed order, and the next kernel normalises on load. Formulas: docs/math.md, "LayerNorm and BatchNorm".

The statistics are one tensor (6, C) float32; its rows are named below.
"""

import triton
import triton.language as tl

from cmt_fast.ops._triton.gelu import gelu_and_derivative

MEAN: tl.constexpr = tl.constexpr(0)
UNBIASED: tl.constexpr = tl.constexpr(1)  # variance, for the running statistics
RSTD: tl.constexpr = tl.constexpr(2)  # 1 / sqrt(variance + eps)
SCALE: tl.constexpr = tl.constexpr(3)  # weight * rstd
BIAS: tl.constexpr = tl.constexpr(
    4
)  # so that y = (x - mean) * scale + bias, which does not cancel where the variance is small
SHARE: tl.constexpr = tl.constexpr(5)  # 1 / count: the share of a pixel in the statistics; 0 where they are frozen


# ---- in the kernel that makes the map ---------------------------------------------------------------------------------------


@triton.jit
def tile_moments(x, inside, count):
    """Mean and M2 (the sum of squared distances from it) of each column of a tile, over its rows inside of the map.

    Args:
        x: (rows, columns) float32.
        inside: (rows, 1) or (rows, columns), which elements count.
        count: how many rows are inside; may be 0.

    Returns:
        Two (columns,) float32; 0 where nothing counts.
    """
    mean = tl.sum(tl.where(inside, x, 0.0), 0) / tl.maximum(count, 1)
    centred = tl.where(inside, x - mean[None, :], 0.0)
    return mean, tl.sum(centred * centred, 0)


@triton.jit
def merge_moments(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """(count, mean, M2) of the union of two disjoint sets (Chan). Counts are float32 scalars, and either may be 0."""
    count = count_a + count_b
    share = count_b / tl.maximum(count, 1.0)
    delta = mean_b - mean_a
    return count, mean_a + delta * share, m2_a + m2_b + delta * delta * (count_a * share)


@triton.jit
def store_moments(partials, counts, program, count, mean, m2, c, C: tl.constexpr):
    """One program's moments into partials (programs, 2, C) and its count into counts (programs,).

    Args:
        mean, m2: (columns,) float32, of the channels ``c`` (columns,).
    """
    row = partials + program.to(tl.int64) * (2 * C) + c
    tl.store(row, mean, c < C)
    tl.store(row + C, m2, c < C)
    tl.store(counts + program, count.to(tl.float32))  # programs of other channels store the same number


@triton.jit
def store_gradient_sums(partials, program, grad, weighted, c, C: tl.constexpr):
    """One program's part of the gradients of BatchNorm's bias and weight into partials (programs, 2, C).

    Args:
        grad, weighted: (rows, columns) float32, the gradient of BatchNorm's output and that times x_hat; 0 where nothing is.
    """
    out = partials + program.to(tl.int64) * (2 * C) + c
    tl.store(out, tl.sum(grad, 0), c < C)
    tl.store(out + C, tl.sum(weighted, 0), c < C)


# ---- between two kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def merge_moments_kernel(
    partials,
    counts,
    merged,
    merged_counts,
    programs,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """merged[g], merged_counts[g]: the union of the partials GROUP * g to GROUP * (g + 1) - 1, in the order of their indices.

    Args:
        partials: (programs, 2, C). counts: (programs,).
        merged: (groups, 2, C). merged_counts: (groups,).
    """
    tiles = tl.cdiv(C, BLOCK_C)
    group = tl.program_id(0) // tiles
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    last = tl.minimum(programs, (group + 1) * GROUP)
    count, mean, m2 = _merged(partials, counts, group * GROUP, last, c, C, BLOCK_P, BLOCK_C)
    store_moments(merged, merged_counts, group, count, mean, m2, c, C)


@triton.jit
def statistics_kernel(
    partials,
    counts,
    weight,
    bias,
    statistics,
    programs,
    eps,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The statistics (6, C) of the union of all partials.

    Args:
        partials: (programs, 2, C). counts: (programs,).
        weight, bias: (C,), or None for 1 and 0.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = c < C
    count, mean, m2 = _merged(partials, counts, 0, programs, c, C, BLOCK_P, BLOCK_C)
    rstd = tl.rsqrt(m2 / count + eps)
    scale = rstd
    if weight is not None:
        scale *= tl.load(weight + c, channel, 0.0).to(tl.float32)
    added = tl.zeros([BLOCK_C], tl.float32)
    if bias is not None:
        added += tl.load(bias + c, channel, 0.0).to(tl.float32)
    tl.store(statistics + MEAN * C + c, mean, channel)
    tl.store(statistics + UNBIASED * C + c, m2 / (count - 1.0), channel)
    tl.store(statistics + RSTD * C + c, rstd, channel)
    tl.store(statistics + SCALE * C + c, scale, channel)
    tl.store(statistics + BIAS * C + c, added, channel)
    tl.store(statistics + SHARE * C + c, tl.zeros([BLOCK_C], tl.float32) + 1.0 / count, channel)


@triton.jit
def _merged(partials, counts, first, last, c, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Union of the partials first to last - 1: a tile of them at once, one tile after the other."""
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        n = tl.load(counts + p, p < last, 0.0)
        row = partials + p[:, None].to(tl.int64) * (2 * C) + c[None, :]
        inside = (p < last)[:, None] & (c < C)[None, :]
        means = tl.load(row, inside, 0.0)
        tile_count = tl.sum(n, 0)
        tile_mean = tl.sum(means * n[:, None], 0) / tl.maximum(tile_count, 1.0)
        distance = means - tile_mean[None, :]
        tile_m2 = tl.sum(tl.load(row + C, inside, 0.0) + distance * distance * n[:, None], 0)
        count, mean, m2 = merge_moments(count, mean, m2, tile_count, tile_mean, tile_m2)
    return count, mean, m2


@triton.jit
def gradient_sums_kernel(
    grad,
    x,
    statistics,
    partials,
    rows,
    C: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program's part of the gradients of BatchNorm's bias and weight: sums of grad and of grad * x_hat over its rows.

    Args:
        grad, x: (rows, C), the gradient of BatchNorm's output and BatchNorm's input.
        statistics: (6, C).
        partials: (programs, 2, C); a program takes STEPS tiles of BLOCK_N rows.
    """
    tiles = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0) // tiles
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd = tl.load(statistics + MEAN * C + c, c < C, 0.0), tl.load(statistics + RSTD * C + c, c < C, 0.0)
    plain = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    weighted = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for step in range(STEPS):
        row = (program * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        offset = row.to(tl.int64) * C + c[None, :]
        inside = (row < rows) & (c < C)[None, :]
        dy = tl.load(grad + offset, inside, 0.0).to(tl.float32)
        normal = (tl.load(x + offset, inside, 0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        plain += dy
        weighted += dy * normal
    store_gradient_sums(partials, program, plain, weighted, c, C)


@triton.jit
def add_partials_kernel(
    partials,
    sums,
    programs,
    width,
    GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """sums[g]: the sum of the partials GROUP * g to GROUP * (g + 1) - 1, in the order of their indices.

    Args:
        partials: (programs, width) float32. sums: (groups, width) float32.
    """
    tiles = tl.cdiv(width, BLOCK_W)
    group = tl.program_id(0) // tiles
    w = tl.program_id(0) % tiles * BLOCK_W + tl.arange(0, BLOCK_W)
    last = tl.minimum(programs, (group + 1) * GROUP)
    total = tl.zeros([BLOCK_W], tl.float32)
    for start in range(group * GROUP, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[:, None]
        total += tl.sum(
            tl.load(partials + p.to(tl.int64) * width + w[None, :], (p < last) & (w < width)[None, :], 0.0), 0
        )
    tl.store(sums + group.to(tl.int64) * width + w, total, w < width)


# ---- in the kernel that reads the map, or its gradient -------------------------------------------------------------------------


@triton.jit
def batch_norm(x, statistics, c, C: tl.constexpr):
    """y = (x - mean) * scale + bias: the normalised values of x (rows, columns) float32, of the channels c (columns,)."""
    mean, scale = tl.load(statistics + MEAN * C + c, c < C, 0.0), tl.load(statistics + SCALE * C + c, c < C, 0.0)
    bias = tl.load(statistics + BIAS * C + c, c < C, 0.0)
    return (x - mean[None, :]) * scale[None, :] + bias[None, :]


@triton.jit
def statistics_rows(statistics, c, C: tl.constexpr, ROWS: tl.constexpr):
    """Mean, 1 / sigma, scale and bias of the channels c (columns,), one row for each of the ROWS of a tile, as ``load_taps`` has its taps."""
    pointer = statistics + tl.zeros((ROWS, 1), tl.int32) + c[None, :]
    channel = (c < C)[None, :]
    return (
        tl.load(pointer + MEAN * C, channel, 0.0),
        tl.load(pointer + RSTD * C, channel, 0.0),
        tl.load(pointer + SCALE * C, channel, 0.0),
        tl.load(pointer + BIAS * C, channel, 0.0),
    )


@triton.jit
def batch_norm_gradient(grad, x, statistics, sums, c, C: tl.constexpr):
    """The gradient of BatchNorm's input: scale * (grad - share * (sum of grad + x_hat * sum of grad x_hat)).

    Args:
        grad, x: (rows, columns) float32, the gradient of the output and the input, of the channels c (columns,).
        statistics: (6, C).
        sums: (2, C), the sums of grad and of grad * x_hat over all pixels that the statistics were taken of; None where the statistics are
            frozen, which leaves scale * grad (as their share does, being 0).

    Returns:
        (rows, columns) float32.
    """
    channel = c < C
    scale = tl.load(statistics + SCALE * C + c, channel, 0.0)
    if sums is None:
        return scale[None, :] * grad
    mean, rstd = tl.load(statistics + MEAN * C + c, channel, 0.0), tl.load(statistics + RSTD * C + c, channel, 0.0)
    share = tl.load(statistics + SHARE * C + c, channel, 0.0)
    plain, weighted = tl.load(sums + c, channel, 0.0) * share, tl.load(sums + C + c, channel, 0.0) * share
    normal = (x - mean[None, :]) * rstd[None, :]
    return scale[None, :] * (grad - plain[None, :] - normal * weighted[None, :])


@triton.jit
def activation_gradient(grad, x, statistics, sums, c, C: tl.constexpr, EXACT: tl.constexpr):
    """GELU'(x) BatchNorm'(grad): the gradient of x, of which BatchNorm(GELU(x)) was made; arguments of ``batch_norm_gradient`` and ``gelu``."""
    value, slope = gelu_and_derivative(x, EXACT)
    return slope * batch_norm_gradient(grad, value, statistics, sums, c, C)
