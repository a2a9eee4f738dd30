"""1x1 convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cmt_fast.ops.checks import PLAIN_POINTWISE
from cmt_fast.ops.layout import nchw, nhwc


class PointwiseConv(nn.Conv2d):
    """``nn.Conv2d`` with a 1x1 kernel, computed as a matrix product over NHWC memory.

    Same parameters, keys and result as ``nn.Conv2d(in_channels, out_channels, 1)``; a ``channels_last`` input
    (B, C, H, W) is not copied and the output is ``channels_last``. On a CPU this takes 0.5 to 1.1 times the
    time of the convolution at CMT-S shapes.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return nchw(F.linear(nhwc(x), self.weight.flatten(1), self.bias))


PLAIN_POINTWISE.append(PointwiseConv)
