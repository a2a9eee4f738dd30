"""GELU, BatchNorm and a convolution in plain PyTorch: the mathematics."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from cmt_fast.ops.layout import nchw, nhwc


def activated_conv_reference(x: Tensor, *, act: Callable[[Tensor], Tensor], bn: nn.Module, conv: nn.Module) -> Tensor:
    """conv(bn(act(x))): (B, H, W, C) -> (B, H', W', C') (paper, "stem")."""
    return nhwc(conv(bn(act(nchw(x)))))
