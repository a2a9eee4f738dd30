"""Schemas and fake implementations of the stem's kernels: all that tracing needs, nothing compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.register import implement

torch.library.define(
    "cmt_fast_triton::stem",
    "(Tensor x, Tensor weight1, Tensor bias1, Tensor scale1, Tensor shift1, Tensor weight2, Tensor bias2, Tensor scale2, Tensor shift2,"
    " Tensor weight3, Tensor bias3) -> Tensor",
)
torch.library.define(
    "cmt_fast_triton::stem_embed",
    "(Tensor x, Tensor weight1, Tensor bias1, Tensor scale1, Tensor shift1, Tensor weight2, Tensor bias2, Tensor scale2, Tensor shift2,"
    " Tensor weight3, Tensor bias3, Tensor embed_weight, Tensor embed_bias, Tensor scale, Tensor shift, int channels, float eps) -> Tensor",
)
implement("stem_embed", "cmt_fast.ops.stem.triton_launch:stem_embed")
implement("stem", "cmt_fast.ops.stem.triton_launch:stem")

stem_triton = torch.ops.cmt_fast_triton.stem.default
stem_embed_triton = torch.ops.cmt_fast_triton.stem_embed.default


@torch.library.register_fake("cmt_fast_triton::stem")
def _(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
) -> Tensor:
    """x (B, in_chans, H, W), any strides and dtype; the rest as in :class:`cmt_fast.inference.program.Stem` -> (B, ceil(H / 2), ceil(W / 2), S)."""
    b, _, h, w = x.shape
    return weight1.new_empty(b, (h + 1) // 2, (w + 1) // 2, bias1.shape[0])


@torch.library.register_fake("cmt_fast_triton::stem_embed")
def _(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    embed_weight: Tensor,
    embed_bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    channels: int,
    eps: float,
) -> Tensor:
    """The same, then :class:`cmt_fast.inference.program.PatchEmbed` -> (B, ceil(H / 2) // 2, ceil(W / 2) // 2, C)."""
    b, _, h, w = x.shape
    return weight1.new_empty(b, (h + 1) // 2 // 2, (w + 1) // 2 // 2, embed_bias.shape[0])
