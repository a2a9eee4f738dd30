"""Schemas and fake implementations of the depthwise kernels: all that tracing needs, nothing compiled, no Triton.

The compiled library (``cmt_fast_native``) and Triton's kernels (``cmt_fast_triton``) have the same signatures. The C++ side is
``csrc/cpu/depthwise.cpp``. Its boxing reads arguments by position without checking their types, so a change of a schema here is a change there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.register import implement


def conv3x3_fwd_fake(x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: bool) -> Tensor:
    """x (B, H, W, C), weight (C, 1, 3, 3), bias (C,), any strides -> (B, H, W, C), contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def conv3x3_bwd_fake(
    grad: Tensor, x: Tensor, weight: Tensor, shortcut: bool, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """grad and x (B, H, W, C) -> gradients of x, weight and bias; first dimension 0 where one is not needed."""
    b, h, w, c = x.shape
    k = weight.shape[-1]
    return (
        x.new_empty(b if need_x else 0, h, w, c),
        weight.new_empty(c if need_weight else 0, 1, k, k),
        weight.new_empty(c if need_bias else 0),
    )


def reduce_fwd_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, H, W, C), weight (C, 1, k, k), bias (C,), any strides -> (B, H // k, W // k, C), contiguous."""
    b, h, w, c = x.shape
    k = weight.shape[-1]
    return x.new_empty(b, h // k, w // k, c)


def reduce_bwd_fake(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (B, H // k, W // k, C), x (B, H, W, C) -> as ``conv3x3_bwd_fake``."""
    return conv3x3_bwd_fake(grad, x, weight, False, need_x, need_weight, need_bias)


for _namespace in ("cmt_fast_native", "cmt_fast_triton"):
    torch.library.define(
        f"{_namespace}::depthwise_conv3x3_fwd", "(Tensor x, Tensor weight, Tensor? bias, bool shortcut) -> Tensor"
    )
    torch.library.define(
        f"{_namespace}::depthwise_conv3x3_bwd",
        "(Tensor grad, Tensor x, Tensor weight, bool shortcut, bool need_x, bool need_weight, bool need_bias)"
        " -> (Tensor, Tensor, Tensor)",
    )
    torch.library.register_fake(f"{_namespace}::depthwise_conv3x3_fwd")(conv3x3_fwd_fake)
    torch.library.register_fake(f"{_namespace}::depthwise_conv3x3_bwd")(conv3x3_bwd_fake)

torch.library.define("cmt_fast_triton::depthwise_reduce_fwd", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.define(
    "cmt_fast_triton::depthwise_reduce_bwd",
    "(Tensor grad, Tensor x, Tensor weight, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
)
torch.library.register_fake("cmt_fast_triton::depthwise_reduce_fwd")(reduce_fwd_fake)
torch.library.register_fake("cmt_fast_triton::depthwise_reduce_bwd")(reduce_bwd_fake)

implement("depthwise_conv3x3_fwd", "cmt_fast.ops.depthwise.triton_launch:conv3x3")
implement("depthwise_conv3x3_bwd", "cmt_fast.ops.depthwise.triton_train_launch:conv3x3_backward")
implement("depthwise_reduce_fwd", "cmt_fast.ops.depthwise.triton_launch:reduce")
implement("depthwise_reduce_bwd", "cmt_fast.ops.depthwise.triton_train_launch:reduce_backward")

depthwise_conv3x3_fwd = torch.ops.cmt_fast_native.depthwise_conv3x3_fwd.default
depthwise_conv3x3_bwd = torch.ops.cmt_fast_native.depthwise_conv3x3_bwd.default
conv3x3_fwd_triton = torch.ops.cmt_fast_triton.depthwise_conv3x3_fwd.default
conv3x3_bwd_triton = torch.ops.cmt_fast_triton.depthwise_conv3x3_bwd.default
reduce_fwd_triton = torch.ops.cmt_fast_triton.depthwise_reduce_fwd.default
reduce_bwd_triton = torch.ops.cmt_fast_triton.depthwise_reduce_bwd.default
