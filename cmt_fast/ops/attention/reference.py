"""The mathematics of attention with reduced keys and values, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

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
