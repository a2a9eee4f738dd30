"""GELU, BatchNorm and a convolution of modules by the Triton kernels, in training and wherever else: when they can run, and their call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cmt_fast.ops._triton.reasons import call_reasons
from cmt_fast.ops.activated_conv.autograd import ActivatedConvFunction, Options
from cmt_fast.ops.autocast import product_dtype
from cmt_fast.ops.batch_norm.training import batch_norm_plan, batch_norm_reasons, update_running
from cmt_fast.ops.checks import not_plain
from cmt_fast.ops.parts import Part, dtype_reasons, gelu_reasons


def activated_conv_reasons(x: Tensor, *, act: Part, bn: nn.Module, conv: nn.Module) -> list[str]:
    """Reasons why the kernels cannot do what these parts do to x (B, H, W, C); an empty list if they can."""
    reasons = gelu_reasons("act", act) + batch_norm_reasons("bn", bn, x.shape[3]) + not_plain("conv", conv, nn.Conv2d)
    if reasons:
        return reasons
    assert isinstance(conv, nn.Conv2d)
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        reasons.append(f"conv must pad with zeros, as many as two numbers say, got {conv}")
    if x.shape[0] == 0:
        reasons.append("x holds no image")
    if (pixels := x.shape[0] * x.shape[1] * x.shape[2]) >= 2**30:
        reasons.append(f"x must have less than 2^30 pixels, got {pixels}")
    if x.dtype != (low := product_dtype(x)):
        reasons.append(f"x must have the dtype that autocast gives the convolution, {low}, got {x.dtype}")
    weights, norms = list(conv.parameters()), list(bn.parameters())
    return (
        reasons
        + call_reasons(x, *weights, *norms, gradients=True, autocast=True)
        + dtype_reasons(x, weights=weights, norms=norms)
    )


def activated_conv_fused(x: Tensor, *, act: Part, bn: Any, conv: nn.Conv2d) -> Tensor:
    """What :func:`activated_conv` does, by the kernels; nothing may speak against it (:func:`activated_conv_reasons`)."""
    b, height, width, c = x.shape
    plan = batch_norm_plan(bn, (b, c, height, width))
    options = Options(plan.eps, plan.group, conv.stride, conv.padding, conv.dilation, conv.groups)
    out, statistics = ActivatedConvFunction.apply(
        x.contiguous(), plan.mean, plan.variance, options, bn.weight, bn.bias, conv.weight, conv.bias
    )
    if plan.mean is None:
        update_running(bn, statistics)
    return out
