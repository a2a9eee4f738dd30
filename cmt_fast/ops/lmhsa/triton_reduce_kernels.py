"""What surrounds the attention's core in training: the reduced map that keys and values are made of, and everything back to the stream."""

import triton
import triton.language as tl

from cmt_fast.ops._triton.batch_norm import (
    batch_norm,
    batch_norm_gradient,
    merge_moments,
    store_moments,
    tile_moments,
)
from cmt_fast.ops._triton.norm import normal_rows_and_rstd, normal_rows_gradient, normalise_rows


@triton.jit
def norm_reduce_kernel(
    x,
    norm_weight,
    norm_bias,
    taps,
    bias,
    reduced,
    partials,
    counts,
    pixels,
    height,
    width,
    eps,
    C: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """reduced = depthwise K x K with stride K of y = LN(x), and the moments of the tile for BatchNorm.

    A program makes STEPS tiles of BLOCK_N pixels of the reduced map in all channels. Windows do not overlap: x is read once.

    Args:
        x: (images, height, width, C).
        norm_weight, norm_bias: (C,), or None; not read without NORM, where y = x.
        taps: (K * K, C), or None for K = 1, where reduced = y.
        bias: (C,), or None.
        reduced: (images, height // K, width // K, C), of ``pixels`` rows.
        partials, counts: (programs, 2, C) and (programs,), or None.
    """
    c = tl.arange(0, BLOCK_C)[None, :]
    channel = tl.arange(0, BLOCK_C)
    down, across = height // K, width // K
    count, mean, m2 = 0.0, tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for step in range(STEPS):
        first = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK_N
        pixel = first + tl.arange(0, BLOCK_N)[:, None]
        inside = (pixel < pixels) & (c < C)
        image, i, j = pixel // (down * across), pixel // across % down, pixel % across
        window = x + ((image * height + i * K) * width + j * K) * C + c
        total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        weights = tl.zeros([1, BLOCK_C], tl.float32)
        for tap in range(K * K):
            y = tl.load(window + (tap // K * width + tap % K) * C, inside, 0.0).to(tl.float32)
            if NORM:
                y = normalise_rows(y, c < C, C, eps, C < BLOCK_C)
            if taps is not None:
                weight = tl.load(taps + tap * C + c, c < C, 0.0).to(tl.float32)
                total += y * weight
                weights += weight
            else:
                total += y
                weights += 1.0
        if NORM:  # the affine part of the norm, once for all taps
            if norm_weight is not None:
                total *= tl.load(norm_weight + c, c < C, 0.0).to(tl.float32)
            if norm_bias is not None:
                total += weights * tl.load(norm_bias + c, c < C, 0.0).to(tl.float32)
        if bias is not None:
            total += tl.load(bias + c, c < C, 0.0).to(tl.float32)
        stored = total.to(reduced.dtype.element_ty)
        tl.store(reduced + pixel * C + c, stored, inside)
        if partials is not None:
            tile_count = tl.maximum(tl.minimum(pixels - first, BLOCK_N), 0).to(tl.float32)
            tile_mean, tile_m2 = tile_moments(stored.to(tl.float32), inside, tile_count)
            count, mean, m2 = merge_moments(count, mean, m2, tile_count, tile_mean, tile_m2)
    if partials is not None:
        store_moments(partials, counts, tl.program_id(0), count, mean, m2, channel, C)


@triton.jit
def normalise_kernel(x, statistics, y, rows, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """y = BN(x). x, y: (rows, C); statistics: (6, C)."""
    tiles = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows) & (c < C)[None, :]
    offset = row * C + c[None, :]
    value = batch_norm(tl.load(x + offset, inside, 0.0).to(tl.float32), statistics, c, C)
    tl.store(y + offset, value.to(y.dtype.element_ty), inside)


@triton.jit
def norm_reduce_backward_kernel(
    x,
    grad,
    query_grad,
    reduced_grad,
    reduced,
    statistics,
    sums,
    norm_weight,
    norm_bias,
    taps,
    x_grad,
    norm_partials,
    tap_partials,
    windows,
    height,
    width,
    eps,
    C: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
):
    """From the gradients of y = LN(x) by way of the queries and of keys and values to that of x, and those of the parameters on the way.

    A program does STEPS tiles of BLOCK_N windows of K x K pixels in all channels, the incomplete ones at the lower and right border too, which
    no key or value saw. It keeps what came through BatchNorm for a tile in registers and goes from tap to tap: each pixel is read once.

    Args:
        grad: (images, height, width, C), the gradient of the output, which the shortcut adds to that of x; or None.
        query_grad: (images, height, width, C), of y by way of the queries; None if only the taps' gradients are asked for.
        reduced_grad: (images, height // K, width // K, C), of BatchNorm's output (for K = 1 of y by way of keys and values); or None.
        reduced, statistics, sums: BatchNorm's input, (6, C) and (2, C), see ``batch_norm_gradient``; None for K = 1.
        x, norm_weight, norm_bias, taps, NORM: as of :func:`norm_reduce_kernel`.
        x_grad: (images, height, width, C), or None.
        norm_partials: (programs, 2, C), of the norm's weight and bias; or None.
        tap_partials: (programs, K * K + 1, C), of the taps and of the convolution's bias; or None.
        windows: how many there are: images * ceil(height / K) * ceil(width / K).
    """
    down, across = tl.cdiv(height, K), tl.cdiv(width, K)
    c = tl.arange(0, BLOCK_C)[None, :]
    channel = tl.arange(0, BLOCK_C)
    gamma = tl.zeros([1, BLOCK_C], tl.float32) + 1.0
    beta = tl.zeros([1, BLOCK_C], tl.float32)
    if norm_weight is not None:
        gamma = tl.load(norm_weight + c, c < C, 0.0).to(tl.float32)
    if norm_bias is not None:
        beta = tl.load(norm_bias + c, c < C, 0.0).to(tl.float32)
    if norm_partials is not None:
        weighted = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        plain = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    if tap_partials is not None:
        bias_sum = tl.zeros([BLOCK_C], tl.float32)
        tap_sums = tl.zeros([BLOCK_TAPS, BLOCK_C], tl.float32)
        index = tl.arange(0, BLOCK_TAPS)[:, None]
    for step in range(STEPS):
        window = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        image, i, j = window // (down * across), window // across % down, window % across
        corner = ((image * height + i * K) * width + j * K) * C
        through = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)  # the gradient of the convolution's output
        if reduced_grad is not None:
            complete = (window < windows) & (i < height // K) & (j < width // K) & (c < C)
            offset = ((image * (height // K) + i) * (width // K) + j) * C + c
            through += tl.load(reduced_grad + offset, complete, 0.0).to(tl.float32)
            if K > 1:
                pixel = tl.load(reduced + offset, complete, 0.0).to(tl.float32)
                through = tl.where(complete, batch_norm_gradient(through, pixel, statistics, sums, channel, C), 0.0)
        if tap_partials is not None:
            bias_sum += tl.sum(through, 0)
        for tap in range(K * K):
            inside = (window < windows) & (i * K + tap // K < height) & (j * K + tap % K < width) & (c < C)
            offset = corner + (tap // K * width + tap % K) * C + c
            normal = tl.load(x + offset, inside, 0.0).to(tl.float32)
            if NORM:
                normal, rstd = normal_rows_and_rstd(normal, c < C, C, eps, C < BLOCK_C)
            if tap_partials is not None:
                product = tl.sum(through * (normal * gamma + beta), 0)
                tap_sums += tl.where(index == tap, product[None, :], 0.0)
            if query_grad is not None:
                y_grad = tl.load(query_grad + offset, inside, 0.0).to(tl.float32)
                if taps is not None:
                    y_grad += through * tl.load(taps + tap * C + c, c < C, 0.0).to(tl.float32)
                else:
                    y_grad += through
            if norm_partials is not None:
                weighted += y_grad * normal
                plain += y_grad
            if x_grad is not None:
                if NORM:
                    y_grad = normal_rows_gradient(y_grad * gamma, normal, rstd, C)
                if grad is not None:
                    y_grad += tl.load(grad + offset, inside, 0.0).to(tl.float32)
                tl.store(x_grad + offset, y_grad.to(x_grad.dtype.element_ty), inside)
    if tap_partials is not None:
        tap_partials += tl.program_id(0).to(tl.int64) * ((K * K + 1) * C)
        tl.store(tap_partials + index * C + c, tap_sums, (index < K * K) & (c < C))
        tl.store(tap_partials + K * K * C + channel, bias_sum, channel < C)
    if norm_partials is not None:
        norm_partials += tl.program_id(0).to(tl.int64) * (2 * C) + channel
        tl.store(norm_partials, tl.sum(weighted, 0), channel < C)
        tl.store(norm_partials + C, tl.sum(plain, 0), channel < C)
