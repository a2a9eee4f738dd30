"""The mathematics of the depthwise convolutions, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cmt_fast.ops.layout import nchw, nhwc


def depthwise_conv3x3_reference(x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: bool) -> Tensor:
    """y[c] = weight[c] * x[c] + bias[c] (+ x[c]): 3x3, stride 1, zero padding 1. (B, H, W, C) -> (B, H, W, C)."""
    y = nhwc(F.conv2d(nchw(x), weight, bias, padding=1, groups=x.shape[-1]))
    return y + x if shortcut else y


def depthwise_reduce_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """k x k depthwise convolution with stride k: (B, H, W, C) -> (B, H // k, W // k, C)."""
    k = weight.shape[-1]
    return nhwc(F.conv2d(nchw(x), weight, bias, stride=k, groups=x.shape[-1]))
