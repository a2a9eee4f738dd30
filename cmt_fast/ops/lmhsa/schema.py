"""Schemas and fake implementations of the attention sub-layer's kernels: all that tracing needs, nothing compiled.

Shapes are those of :mod:`cmt_fast.inference.program`, padding included: x (B, H, W, C), of which a LayerNorm counts ``channels``;
keys_values (B, M, rows); table (h, N, M). Any strides. ``base2``: the softmax's weights are 2^logit / sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.register import implement

torch.library.define(
    "cmt_fast_triton::absorbed_attention",
    "(Tensor x, Tensor keys_values, Tensor table, Tensor out_bias, bool base2, int channels, float eps) -> Tensor",
)
torch.library.define(
    "cmt_fast_triton::projected_attention",
    "(Tensor x, Tensor query_weight, Tensor query_bias, Tensor keys_values, Tensor table, Tensor out_weight, Tensor out_bias,"
    " bool base2, int channels, float eps) -> Tensor",
)
implement("absorbed_attention", "cmt_fast.ops.lmhsa.triton_launch:absorbed_attention")
implement("projected_attention", "cmt_fast.ops.lmhsa.triton_launch:projected_attention")

absorbed_attention_triton = torch.ops.cmt_fast_triton.absorbed_attention.default
projected_attention_triton = torch.ops.cmt_fast_triton.projected_attention.default


@torch.library.register_fake("cmt_fast_triton::absorbed_attention")
def _(
    x: Tensor, keys_values: Tensor, table: Tensor, out_bias: Tensor, base2: bool, channels: int, eps: float
) -> Tensor:
    """x + sum_h softmax(LN(x) G_h^T + eta_h + table_h) V'_h + out_bias: (B, H, W, C), contiguous.

    The columns of keys_values: G (h, C), V' (h, C), and the key biases eta, at least h. out_bias (C,).
    """
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("cmt_fast_triton::projected_attention")
def _(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    keys_values: Tensor,
    table: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    base2: bool,
    channels: int,
    eps: float,
) -> Tensor:
    """x + sum_h softmax(q_h k_h^T + table_h) v_h Wo_h^T + out_bias, where q = LN(x) Wq^T + bq: (B, H, W, C), contiguous.

    query_weight (h d_qk, C), query_bias (h d_qk,), out_weight (C, h d_v), out_bias (C,); the columns of keys_values: k (h, d_qk), v (h, d_v).
    """
    return torch.empty_like(x, memory_format=torch.contiguous_format)
