"""LayerNorm in training as one autograd function: the reduction of the attention sub-layer with windows of one token."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops.checks import second_derivative_error
from cmt_fast.ops.lmhsa.reduce_schema import norm_reduce_backward_triton, norm_reduce_triton


class LayerNormFunction(torch.autograd.Function):
    """LayerNorm of x (..., C) in ``dtype``; weight, bias (C,) or None.

    Kept for the backward pass: x, whose rows are normalised anew. Gradients are computed only where they are needed, once: they cannot be
    differentiated again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return norm_reduce_triton(_rows(x), weight, bias, eps, None, None, 1, dtype, False)[0].view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise second_derivative_error("LayerNorm")
        x, weight, bias = ctx.saved_tensors
        need_x, need_weight, need_bias, _, _ = ctx.needs_input_grad
        dx, sums, _ = norm_reduce_backward_triton(
            _rows(x),
            None,
            _rows(grad.contiguous()),
            None,
            None,
            None,
            None,
            weight,
            bias,
            ctx.eps,
            None,
            1,
            (need_x, need_weight or need_bias, False),
        )
        return (
            dx.view(x.shape) if need_x else None,
            sums[0] if need_weight else None,
            sums[1] if need_bias else None,
            None,
            None,
        )


def _rows(x: Tensor) -> Tensor:
    """(..., C), contiguous -> (1, 1, rows, C): a map whose windows are its rows."""
    return x.view(1, 1, -1, x.shape[-1])
