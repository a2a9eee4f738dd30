"""Schemas and fake implementations of the IRFFN's kernels: all that tracing needs, nothing compiled.

Shapes are those of :mod:`cmt_fast.inference.program`, padding included. Any strides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.register import implement

torch.library.define(
    "cmt_fast_triton::expand",
    "(Tensor x, Tensor weight, Tensor bias, Tensor scale, Tensor shift, int channels, float eps) -> Tensor",
)
torch.library.define(
    "cmt_fast_triton::depthwise_project",
    "(Tensor hidden, Tensor taps, Tensor bias, Tensor weight, Tensor out_bias, Tensor shortcut) -> Tensor",
)
implement("expand", "cmt_fast.ops.irffn.triton_launch:expand")
implement("depthwise_project", "cmt_fast.ops.irffn.triton_launch:depthwise_project")

expand_triton = torch.ops.cmt_fast_triton.expand.default
depthwise_project_triton = torch.ops.cmt_fast_triton.depthwise_project.default


@torch.library.register_fake("cmt_fast_triton::expand")
def _(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, channels: int, eps: float) -> Tensor:
    """GELU(LN(x) weight^T + bias) * scale + shift, of which LN counts ``channels``: x (B, H, W, C) -> (B, H, W, R), contiguous.

    weight (R, C); bias, scale, shift (R,).
    """
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("cmt_fast_triton::depthwise_project")
def _(hidden: Tensor, taps: Tensor, bias: Tensor, weight: Tensor, out_bias: Tensor, shortcut: Tensor) -> Tensor:
    """shortcut + GELU(depthwise 3x3 of hidden + bias) weight^T + out_bias: hidden (B, H, W, R) -> (B, H, W, C), contiguous.

    taps (9, R), bias (R,), weight (C, R), out_bias (C,), shortcut (B, H, W, C).
    """
    return torch.empty_like(shortcut, memory_format=torch.contiguous_format)
