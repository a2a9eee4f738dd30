"""Schema and fake implementation of the local perception unit's kernel with LayerNorm and reduction: all that tracing needs, nothing compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.register import implement

torch.library.define(
    "cmt_fast_triton::lpu_reduce",
    "(Tensor x, Tensor taps, Tensor bias, Tensor? reduction, int k, int channels, float eps) -> (Tensor, Tensor)",
)
implement("lpu_reduce", "cmt_fast.ops.lpu.triton_launch:lpu_reduce")

lpu_reduce_triton = torch.ops.cmt_fast_triton.lpu_reduce.default


@torch.library.register_fake("cmt_fast_triton::lpu_reduce")
def _(
    x: Tensor, taps: Tensor, bias: Tensor, reduction: Tensor | None, k: int, channels: int, eps: float
) -> tuple[Tensor, Tensor]:
    """x (B, H, W, C), any strides; taps (9, C), bias (C,), reduction (k * k, C) -> (B, H, W, C) and (B, H // k, W // k, C)."""
    b, h, w, c = x.shape
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(b, h // k, w // k, c)
