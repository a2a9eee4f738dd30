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
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shortcut = shortcut
        return depthwise_conv3x3_fwd(x, weight, bias, shortcut)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = depthwise_conv3x3_bwd(grad, x, weight, ctx.shortcut, *needs)
        return *(g if need else None for g, need in zip(grads, needs)), None


def depthwise_conv3x3_native(x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: bool) -> Tensor:
    """The compiled operation, with its gradients where one will be asked for."""
    parts = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in parts):
        return DepthwiseConv3x3Function.apply(x, weight, bias, shortcut)
    return depthwise_conv3x3_fwd(x, weight, bias, shortcut)
