"""The mathematics of the local perception unit, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor, nn

from cmt_fast.ops.layout import nchw, nhwc


def lpu_reference(x: Tensor, conv: nn.Module) -> Tensor:
    """LPU(X) = DWConv(X) + X (paper, "LPU"). x (B, H, W, C) -> (B, H, W, C)."""
    return nhwc(conv(nchw(x))) + x
