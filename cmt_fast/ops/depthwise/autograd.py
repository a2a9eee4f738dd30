"""The depthwise kernels as autograd functions."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops.autocast import product_dtype
from cmt_fast.ops.depthwise.schema import (
    conv3x3_bwd_triton,
    conv3x3_fwd_triton,
    depthwise_conv3x3_bwd,
    depthwise_conv3x3_fwd,
    reduce_bwd_triton,
    reduce_fwd_triton,
)
from cmt_fast.ops.layout import nchw, nhwc

#: By backend: the operator and the one of its gradients.
_CONV3X3 = {
    "native": (depthwise_conv3x3_fwd, depthwise_conv3x3_bwd),
    "triton": (conv3x3_fwd_triton, conv3x3_bwd_triton),
}


class DepthwiseConv3x3Function(torch.autograd.Function):
    """(x, weight, bias, shortcut, backend) -> y; the arguments of :func:`cmt_fast.functional.depthwise_conv3x3`.

    Keeps x and weight for the backward pass. Gradients are computed only where they are needed. Under ``create_graph``
    they come from plain PyTorch, which can be differentiated again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: bool, backend: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shortcut, ctx.backend = shortcut, backend
        return _CONV3X3[backend][0](x, weight, bias, shortcut)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            found = _differentiable_bwd(grad, x, weight, 1, 1, needs)
            if needs[0] and ctx.shortcut:
                found = found[0] + grad, *found[1:]
        else:
            found = _CONV3X3[ctx.backend][1](grad, x, weight, ctx.shortcut, *needs)
        return *(g if need else None for g, need in zip(found, needs)), None, None


class DepthwiseReduceFunction(torch.autograd.Function):
    """(x, weight, bias) -> y; the arguments of :func:`cmt_fast.functional.depthwise_reduce`. As above, on Triton's kernels."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return reduce_fwd_triton(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            found = _differentiable_bwd(grad, x, weight, weight.shape[-1], 0, needs)
        else:
            found = reduce_bwd_triton(grad, x, weight, *needs)
        return tuple(g if need else None for g, need in zip(found, needs))


def _differentiable_bwd(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, needs: tuple[bool, ...]):
    """The gradients of a depthwise convolution in operations that PyTorch can differentiate."""
    c = x.shape[-1]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        *(nchw(grad), nchw(x), weight.to(x.dtype), [c]),
        *([stride, stride], [padding, padding], [1, 1], False, [0, 0], c, needs),
    )
    return nhwc(dx) if needs[0] else dx, dweight, dbias


def depthwise_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: bool, backend: str) -> Tensor:
    """The operator of ``backend``, with its gradients where one will be asked for."""
    if backend == "triton":
        dtype = product_dtype(x)
        x = x.to(torch.promote_types(dtype, x.dtype) if shortcut else dtype)  # an fp32 shortcut stays fp32
    if _differentiated(x, weight, bias):
        return DepthwiseConv3x3Function.apply(x, weight, bias, shortcut, backend)
    return _CONV3X3[backend][0](x, weight, bias, shortcut)


def depthwise_reduce_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Triton's operator, with its gradients where one will be asked for."""
    x = x.to(product_dtype(x))
    if _differentiated(x, weight, bias):
        return DepthwiseReduceFunction.apply(x, weight, bias)
    return reduce_fwd_triton(x, weight, bias)


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
