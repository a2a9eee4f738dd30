"""Schema and fake implementation of the Triton attention: all that tracing needs, Triton itself not imported."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.register import implement

torch.library.define(
    "cmt_fast_triton::reduced_kv_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, bool base2) -> Tensor",
)
implement("reduced_kv_attention", "cmt_fast.ops.attention.triton_launch:reduced_kv_attention")

reduced_kv_attention_triton = torch.ops.cmt_fast_triton.reduced_kv_attention.default


@torch.library.register_fake("cmt_fast_triton::reduced_kv_attention")
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, base2: bool) -> Tensor:
    """q (B, h, N, d_qk), k (B, h, M, d_qk), v (B, h, M, d_v), bias (h, N, M), any strides -> (B, h, N, d_v), a transpose of a
    contiguous (B, N, h, d_v), so that the output projection takes it without a copy. ``base2``: weights are 2^logit / sum.
    """
    b, h, n, _ = q.shape
    return q.new_empty(b, n, h, v.shape[3]).transpose(1, 2)
