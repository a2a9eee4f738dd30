"""The mathematics of the local perception unit, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmt_fast.ops.layout import nchw, nhwc


def lpu_reference(x: Tensor, conv: nn.Module) -> Tensor:
    """LPU(X) = DWConv(X) + X (paper, "LPU"). x (B, H, W, C) -> (B, H, W, C)."""
    y = nhwc(conv(nchw(x)))
    # Another shape could broadcast silently. Not asked of symbolic sizes: an exported graph serves every size.
    if not torch.compiler.is_compiling() and y.shape != x.shape:
        raise ValueError(f"conv must keep the shape of x {tuple(x.shape)}, got {tuple(y.shape)} (as B, H, W, C)")
    return y + x
