"""Schema and fake implementation of the patch embedding's kernel: all that tracing needs, nothing compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.register import implement

torch.library.define(
    "cmt_fast_triton::patch_embed",
    "(Tensor x, Tensor weight, Tensor bias, Tensor scale, Tensor shift, int channels, float eps) -> Tensor",
)
implement("patch_embed", "cmt_fast.ops.patch_embed.triton_launch:patch_embed")

patch_embed_triton = torch.ops.cmt_fast_triton.patch_embed.default


@torch.library.register_fake("cmt_fast_triton::patch_embed")
def _(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, channels: int, eps: float) -> Tensor:
    """x (B, H, W, C_in), any strides; weight (C, 4 C_in), bias, scale and shift (C,) -> (B, H // 2, W // 2, C), contiguous."""
    b, h, w, _ = x.shape
    return x.new_empty(b, h // 2, w // 2, weight.shape[0])
