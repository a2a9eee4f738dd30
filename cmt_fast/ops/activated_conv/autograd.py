"""GELU, BatchNorm and a convolution in training as one autograd function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.ops.activated_conv import train_schema as kernels
from cmt_fast.ops.batch_norm.training import BatchNormPlan, reduced_sums, statistics
from cmt_fast.ops.checks import second_derivative_error
from cmt_fast.ops.layout import nchw, nhwc


class Options(NamedTuple):
    """What is no tensor.

    Attributes:
        eps: of the BatchNorm.
        group: of processes over which it takes its statistics, or None.
        stride, padding, dilation, groups: of the convolution.
    """

    eps: float
    group: Any
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int


class ActivatedConvFunction(torch.autograd.Function):
    """The convolution of t = BatchNorm(GELU(x)), and the statistics (6, C) of the BatchNorm.

    Takes x (B, H, W, C), contiguous; running mean and variance, or None where the batch's statistics shall serve; :class:`Options`; weight and bias of
    the BatchNorm, and of the convolution, or None for a missing one. The convolution is PyTorch's own.

    Kept for the backward pass: x, and vectors; t is made again. Gradients are computed only where they are needed, once: they cannot be
    differentiated again.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        mean: Tensor | None,
        variance: Tensor | None,
        options: Options,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        partials, counts = kernels.moments(x) if mean is None else (None, None)
        plan = BatchNormPlan(options.eps, mean, variance, options.group)
        n = statistics(plan, partials, counts, bn_weight, bn_bias)
        t = nchw(kernels.normalise(x, n))
        bias = None if bias is None else bias.to(x.dtype)
        out = F.conv2d(t, weight.to(x.dtype), bias, *options[2:])
        ctx.save_for_backward(x, n, weight)
        ctx.options, ctx.frozen = options, mean is not None
        ctx.mark_non_differentiable(n)
        return nhwc(out), n

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise second_derivative_error("GELU, BatchNorm and convolution")
        x, n, weight = ctx.saved_tensors
        need_x, _, _, _, need_bn_weight, need_bn_bias, need_weight, need_bias = ctx.needs_input_grad
        need_bn = need_bn_weight or need_bn_bias
        dx = dt = sums = total = d_weight = d_bias = None
        t = x  # of which only the shape is read without a gradient of the weight

        grad = grad.contiguous()
        if need_x or need_bn:
            dt = nhwc(_convolution_gradients(grad, x, weight, ctx.options, (True, False, False))[0])
        if need_bn or (need_x and not ctx.frozen):
            sums, again = kernels.sums(dt, x, n, need_weight)
            t = again if need_weight else x
            total = None if ctx.frozen else reduced_sums(sums, ctx.options.group)
        elif need_weight:
            t = kernels.normalise(x, n)
        if need_weight or need_bias:
            _, d_weight, d_bias = _convolution_gradients(grad, t, weight, ctx.options, (False, need_weight, need_bias))
        if need_x:
            dx = kernels.gradient(dt, x, n, total)
        d_bn_bias, d_bn_weight = (None, None) if sums is None else sums.unbind()
        found = (d_bn_weight, d_bn_bias, d_weight, d_bias)
        return dx, None, None, None, *(g if needed else None for g, needed in zip(found, ctx.needs_input_grad[4:]))


def _convolution_gradients(
    grad: Tensor, t: Tensor, weight: Tensor, options: Options, needs: tuple[bool, bool, bool]
) -> list[Tensor]:
    """Gradients of the map, of the weight and of the bias; grad and t (B, H, W, channels), of which the first reads its shape alone."""
    return torch.ops.aten.convolution_backward.default(
        nchw(grad),
        nchw(t),
        weight.to(t.dtype),
        [len(weight)],
        options.stride,
        options.padding,
        options.dilation,
        False,
        [0, 0],
        options.groups,
        needs,
    )
