"""Schemas and fake implementations of the compiled depthwise operations: all that tracing needs, nothing compiled.

The C++ side is ``csrc/cpu/depthwise.cpp``. Its boxing reads arguments by position without checking their types, so a change of a
schema here is a change there.
"""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define(
    "cmt_fast_native::depthwise_conv3x3_fwd", "(Tensor x, Tensor weight, Tensor? bias, bool shortcut) -> Tensor"
)
torch.library.define(
    "cmt_fast_native::depthwise_conv3x3_bwd",
    "(Tensor grad, Tensor x, Tensor weight, bool shortcut, bool need_x, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)",
)

depthwise_conv3x3_fwd = torch.ops.cmt_fast_native.depthwise_conv3x3_fwd.default
depthwise_conv3x3_bwd = torch.ops.cmt_fast_native.depthwise_conv3x3_bwd.default


@torch.library.register_fake("cmt_fast_native::depthwise_conv3x3_fwd")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: bool) -> Tensor:
    """x (B, H, W, C), weight (C, 1, 3, 3), bias (C,), any strides -> (B, H, W, C), contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("cmt_fast_native::depthwise_conv3x3_bwd")
def _(
    grad: Tensor, x: Tensor, weight: Tensor, shortcut: bool, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """grad and x (B, H, W, C) -> gradients of x, weight and bias; first dimension 0 where one is not needed."""
    b, h, w, c = x.shape
    return (
        x.new_empty(b if need_x else 0, h, w, c),
        weight.new_empty(c if need_weight else 0, 1, 3, 3),
        weight.new_empty(c if need_bias else 0),
    )
