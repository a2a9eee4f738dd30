"""Schema and fake implementation of the Triton attention: all that tracing needs, Triton itself not imported."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.register import implement

torch.library.define(
    "cmt_fast_triton::reduced_kv_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, bool base2) -> Tensor",
)
torch.library.define(
    "cmt_fast_triton::reduced_kv_attention_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale) -> (Tensor, Tensor)",
)
torch.library.define(
    "cmt_fast_triton::reduced_kv_attention_bwd",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor lse, Tensor? out, float scale, bool[4] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
implement("reduced_kv_attention", "cmt_fast.ops.attention.triton_launch:reduced_kv_attention")
implement("reduced_kv_attention_fwd", "cmt_fast.ops.attention.triton_train_launch:reduced_kv_attention_fwd")
implement("reduced_kv_attention_bwd", "cmt_fast.ops.attention.triton_train_launch:reduced_kv_attention_bwd")

reduced_kv_attention_triton = torch.ops.cmt_fast_triton.reduced_kv_attention.default
reduced_kv_attention_fwd = torch.ops.cmt_fast_triton.reduced_kv_attention_fwd.default
reduced_kv_attention_bwd = torch.ops.cmt_fast_triton.reduced_kv_attention_bwd.default


@torch.library.register_fake("cmt_fast_triton::reduced_kv_attention")
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, base2: bool) -> Tensor:
    """q (B, h, N, d_qk), k (B, h, M, d_qk), v (B, h, M, d_v), bias (h, N, M), any strides -> (B, h, N, d_v), a transpose of a
    contiguous (B, N, h, d_v), so that the output projection takes it without a copy. ``base2``: weights are 2^logit / sum.
    """
    b, h, n, _ = q.shape
    return q.new_empty(b, n, h, v.shape[3]).transpose(1, 2)


@torch.library.register_fake("cmt_fast_triton::reduced_kv_attention_fwd")
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """As the inference operator without base2, and lse (B, h, N) float32: the logarithms of the sums of the exponentials of the logits."""
    b, h, n, _ = q.shape
    return q.new_empty(b, n, h, v.shape[3]).transpose(1, 2), q.new_empty(b, h, n, dtype=torch.float32)


@torch.library.register_fake("cmt_fast_triton::reduced_kv_attention_bwd")
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    out: Tensor | None,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v (B, h, n, d), transposes of contiguous (B, n, h, d), and of bias (h, N, M), in their dtypes; first dimension 0
    where ``needs`` has False.

    grad (B, h, N, d_v) in any strides; ``out``, the output of the forward pass, only where the keys stream (``configs.holds_all_keys``).
    """

    def empty(need: bool, x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        return x.new_empty(b if need else 0, n, h, d).transpose(1, 2)

    h, n, m = q.shape[1], q.shape[2], k.shape[2]
    table = q if bias is None else bias
    return (
        *(empty(need, x) for need, x in zip(needs, (q, k, v))),  # type: ignore[return-value]
        table.new_empty(h if needs[3] else 0, n, m),
    )
