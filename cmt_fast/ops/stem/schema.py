"""Schema and fake implementation of the stem's kernels: all that tracing needs, nothing compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.register import implement

torch.library.define(
    "cmt_fast_triton::stem",
    "(Tensor x, Tensor weight1, Tensor bias1, Tensor scale1, Tensor shift1, Tensor weight2, Tensor bias2, Tensor scale2, Tensor shift2,"
    " Tensor weight3, Tensor bias3) -> Tensor",
)
implement("stem", "cmt_fast.ops.stem.triton_launch:stem")

stem_triton = torch.ops.cmt_fast_triton.stem.default


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
