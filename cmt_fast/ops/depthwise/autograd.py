"""The compiled depthwise convolution as an autograd function."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cmt_fast.ops.depthwise.schema import depthwise_conv3x3_bwd, depthwise_conv3x3_fwd


class DepthwiseConv3x3Function(torch.autograd.Function):
    """(x, weight, bias, shortcut) -> y; the arguments of :func:`cmt_fast.functional.depthwise_conv3x3`.

    Keeps x and weight for the backward pass. Gradients are computed only where they are needed, and once: there is no
    second derivative.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: bool) -> Tensor:
        return depthwise_conv3x3_fwd(x, weight, bias, shortcut)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor | None, bool], output: Tensor) -> None:
        x, weight, _, ctx.shortcut = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = depthwise_conv3x3_bwd(grad, x, weight, ctx.shortcut, *needs)
        return *(g if need else None for g, need in zip(grads, needs)), None
