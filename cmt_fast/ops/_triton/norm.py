"""LayerNorm without its affine, of rows that a program holds whole."""

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
    centred = x - (tl.sum(x, 1) / channels)[:, None]
    if PADDED:
        centred = tl.where(counted, centred, 0.0)
    variance = tl.sum(centred * centred, 1) / channels
    return centred * tl.rsqrt(variance + eps)[:, None]
