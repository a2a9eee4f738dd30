"""The two views of one memory layout.

Everything in cmt_fast is NHWC in memory: tokens ``(B, H*W, C)`` and maps ``(B, H, W, C)`` are the same bytes, and
``nchw`` of a map is a ``torch.channels_last`` tensor. No function here copies.
"""

from __future__ import annotations

from torch import Tensor


def nchw(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), a view."""
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), a view."""
    return x.permute(0, 2, 3, 1)
