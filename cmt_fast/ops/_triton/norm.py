"""LayerNorm of rows that a program holds whole, without its affine, and its gradient; and the affine."""

import triton
import triton.language as tl


@triton.jit
def normalise_rows(x, counted, channels, eps, PADDED: tl.constexpr):
    """(x - mean) / sqrt(variance + eps) of each row, over its channels that count.

    Args:
        x: (rows, columns) float32, 0 in every column that does not count.
        counted: (1, columns) or (rows, columns), which columns count; read only if PADDED.
        channels: how many columns count.
        eps: LayerNorm's.
        PADDED: whether some columns do not count.

    Returns:
        (rows, columns) float32, 0 in every column that does not count.
    """
    return normal_rows_and_rstd(x, counted, channels, eps, PADDED)[0]


@triton.jit
def normal_rows_and_rstd(x, counted, channels, eps, PADDED: tl.constexpr):
    """What :func:`normalise_rows` returns, and 1 / sqrt(variance + eps) of each row, (rows,): a backward pass needs both."""
    centred = x - (tl.sum(x, 1) / channels)[:, None]
    if PADDED:
        centred = tl.where(counted, centred, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / channels + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def normal_rows_gradient(grad, normal, rstd, channels):
    """The gradient of x, of the gradient of its normal rows: rstd * (grad - mean of grad - normal * mean of grad * normal).

    Args:
        grad, normal: (rows, columns) float32, 0 in every column that does not count.
        rstd: (rows,).
    """
    shared = (tl.sum(grad, 1) / channels)[:, None] + normal * (tl.sum(grad * normal, 1) / channels)[:, None]
    return (grad - shared) * rstd[:, None]


@triton.jit
def affine(x, weight, bias, c, C: tl.constexpr):
    """x * weight + bias, of columns ``c`` (1, columns); weight and bias are pointers to (C,), or None."""
    if weight is not None:
        x *= tl.load(weight + c, c < C, 0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + c, c < C, 0.0).to(tl.float32)
    return x
