"""The mathematics of attention with reduced keys and values, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def reduced_kv_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias) v.

    q (B, h, N, d_qk), k (B, h, M, d_qk), v (B, h, M, d_v), bias (h, N, M) -> (B, h, N, d_v).
    ``dropout`` is applied to the attention weights (B, h, N, M).
    """
    logits = (q @ k.transpose(-2, -1)) * scale
    if bias is not None:
        logits = logits + bias
    weights = logits.softmax(dim=-1)
    if dropout is not None:
        weights = dropout(weights)
    return weights @ v


def reduced_kv_attention_reference_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k, v and bias, given that of the output: grad (B, h, N, d_v). Differentiable again.

    Formulas: docs/math.md, section 4. A bias in a wider dtype than q's, as autocast has it, makes the whole computation as wide.
    """
    wide = q.dtype if bias is None else torch.promote_types(q.dtype, bias.dtype)
    dout, q_, k_, v_ = (t.to(wide) for t in (grad, q, k, v))
    logits = (q_ @ k_.transpose(-2, -1)) * scale
    if bias is not None:
        logits = logits + bias
    weights = logits.softmax(dim=-1)
    dweights = dout @ v_.transpose(-2, -1)
    dlogits = weights * (dweights - (weights * dweights).sum(dim=-1, keepdim=True))
    return (
        (dlogits @ k_ * scale).to(q.dtype),
        (dlogits.transpose(-2, -1) @ q_ * scale).to(k.dtype),
        (weights.transpose(-2, -1) @ dout).to(v.dtype),
        None if bias is None else dlogits.sum(dim=0).to(bias.dtype),
    )
