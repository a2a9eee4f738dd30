"""The compiled depthwise convolution as an autograd function."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops.depthwise.schema import depthwise_conv3x3_bwd, depthwise_conv3x3_fwd
from cmt_fast.ops.layout import nchw, nhwc


class DepthwiseConv3x3Function(torch.autograd.Function):
    """(x, weight, bias, shortcut) -> y; the arguments of :func:`cmt_fast.functional.depthwise_conv3x3`.

    Keeps x and weight for the backward pass. Gradients are computed only where they are needed. Under ``create_graph``
    they come from plain PyTorch, which can be differentiated again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shortcut = shortcut
        return depthwise_conv3x3_fwd(x, weight, bias, shortcut)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients = _differentiable_bwd if torch.is_grad_enabled() else depthwise_conv3x3_bwd
        found = gradients(grad, x, weight, ctx.shortcut, *needs)
        return *(g if need else None for g, need in zip(found, needs)), None


def _differentiable_bwd(grad: Tensor, x: Tensor, weight: Tensor, shortcut: bool, *needs: bool):
    """What ``depthwise_conv3x3_bwd`` computes, in operations that PyTorch can differentiate."""
    c = x.shape[-1]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        nchw(grad), nchw(x), weight, [c], [1, 1], [1, 1], [1, 1], False, [0, 0], c, needs
    )
    if needs[0]:
        dx = nhwc(dx) + grad if shortcut else nhwc(dx)
    return dx, dweight, dbias


def depthwise_conv3x3_native(x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: bool) -> Tensor:
    """The compiled operation, with its gradients where one will be asked for."""
    parts = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in parts):
        return DepthwiseConv3x3Function.apply(x, weight, bias, shortcut)
    return depthwise_conv3x3_fwd(x, weight, bias, shortcut)
