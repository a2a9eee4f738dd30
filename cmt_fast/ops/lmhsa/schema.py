"""Schemas and fake implementations of the attention sub-layer's kernels: all that tracing needs, nothing compiled.

Of packed models, shapes are those of :mod:`cmt_fast.inference.program`, padding included: x (B, H, W, C), of which a LayerNorm counts ``channels``;
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


# ---- training: from the stream to the stream, around LayerNorm's gradient and the chain of keys and values ------------------------

torch.library.define(
    "cmt_fast_triton::lmhsa_core_fwd",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float? eps, Tensor query_weight, Tensor? query_bias, Tensor keys_values,"
    " Tensor table, Tensor out_weight, Tensor? out_bias, Tensor? row_scale, float scale, bool shortcut) -> (Tensor, Tensor)",
)
torch.library.define(
    "cmt_fast_triton::lmhsa_core_bwd",
    "(Tensor grad, Tensor x, Tensor? norm_weight, Tensor? norm_bias, float? eps, Tensor query_weight, Tensor? query_bias,"
    " Tensor keys_values, Tensor table, Tensor out_weight, Tensor? row_scale, Tensor lse, float scale, bool[7] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
implement("lmhsa_core_fwd", "cmt_fast.ops.lmhsa.triton_train_launch:lmhsa_core_fwd")
implement("lmhsa_core_bwd", "cmt_fast.ops.lmhsa.triton_train_launch:lmhsa_core_bwd")

lmhsa_core_fwd = torch.ops.cmt_fast_triton.lmhsa_core_fwd.default
lmhsa_core_bwd = torch.ops.cmt_fast_triton.lmhsa_core_bwd.default


@torch.library.register_fake("cmt_fast_triton::lmhsa_core_fwd")
def _(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    query_weight: Tensor,
    query_bias: Tensor | None,
    keys_values: Tensor,
    table: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    row_scale: Tensor | None,
    scale: float,
    shortcut: bool,
) -> tuple[Tensor, Tensor]:
    """z = [x +] row_scale * (o Wo^T + bo), with o_h = softmax(scale * q_h k_h^T + table_h) v_h, q = y Wq^T + bq, y = LN(x).

    x (B, N, C), the stream, in any dtype; norm_weight, norm_bias (C,) or None, eps None without a norm at all (y = x); query_weight (h d_qk, C),
    keys_values (B, M, h d_qk + h d_v: k (h, d_qk), v (h, d_v)) and out_weight (C, h d_v) in the dtype of the products, in which y, q, o and
    the branch are rounded too; query_bias (h d_qk,), out_bias (C,), table (h, N, M) and row_scale (B,), stochastic depth's factor of an image,
    in any dtype, or None (not the table). Any strides.

    Returns:
        z (B, N, C), in the dtype of x with the shortcut, of the products without; lse (B, h, N) float32, the logarithms of the sums of the
        exponentials of the logits, for the backward pass. Both contiguous.
    """
    b, n, _ = x.shape
    z = torch.empty_like(x if shortcut else x.to(out_weight.dtype), memory_format=torch.contiguous_format)
    return z, x.new_empty(b, len(table), n, dtype=torch.float32)


@torch.library.register_fake("cmt_fast_triton::lmhsa_core_bwd")
def _(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    query_weight: Tensor,
    query_bias: Tensor | None,
    keys_values: Tensor,
    table: Tensor,
    out_weight: Tensor,
    row_scale: Tensor | None,
    lse: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the branch of ``lmhsa_core_fwd``; the shortcut's and LayerNorm's are left to the caller.

    grad (B, N, C), of z, any dtype and strides; the arguments of the forward pass and its lse.

    Returns:
        Contiguous, each of no elements (first dimension 0) where ``needs`` has False: the gradients of y (B, N, C) by way of the queries,
        of keys_values, both in the dtype of the products; of the table, float32; of query_weight, in its dtype; of query_bias, float32; of out_weight,
        in its dtype; of out_bias, float32.
    """

    def empty(needed: bool, like: Tensor, dtype: torch.dtype) -> Tensor:
        return like.new_empty(like.shape[0] if needed else 0, *like.shape[1:], dtype=dtype)

    dtype = query_weight.dtype
    return (
        empty(needs[0], x, dtype),
        empty(needs[1], keys_values, dtype),
        empty(needs[2], table, torch.float32),
        empty(needs[3], query_weight, dtype),
        empty(needs[4], query_weight[:, 0], torch.float32),
        empty(needs[5], out_weight, dtype),
        empty(needs[6], out_weight[:, 0], torch.float32),
    )
