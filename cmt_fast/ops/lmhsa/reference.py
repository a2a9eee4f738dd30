"""The mathematics of lightweight multi-head self-attention, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cmt_fast.ops.attention.reference import reduced_kv_attention_reference
from cmt_fast.ops.layout import nchw, nhwc


def lmhsa_reference(
    x: Tensor,
    relative_pos: Tensor,
    *,
    q: nn.Module,
    k: nn.Module,
    v: nn.Module,
    proj: nn.Module,
    num_heads: int,
    scale: float,
    reduction: nn.Module | None,
    norm: nn.Module | None,
    attn_drop: Callable[[Tensor], Tensor] | None,
    proj_drop: Callable[[Tensor], Tensor] | None,
    drop_path: Callable[[Tensor], Tensor] | None,
    shortcut: bool,
) -> Tensor:
    """Z = Y + drop_path(LMHSA(LN(Y))) (paper, "LMHSA"); x (B, H, W, C) -> (B, H, W, C)."""
    height, width = x.shape[1:3]

    def heads(tokens: Tensor) -> Tensor:  # (B, n, h * d) -> (B, h, n, d)
        return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    y = x if norm is None else norm(x)
    tokens = y.flatten(1, 2)  # (B, N, C)
    reduced = tokens if reduction is None else nhwc(reduction(nchw(y))).flatten(1, 2)  # (B, M, C)
    # One column would broadcast silently. Not asked of symbolic sizes: an exported graph serves every size.
    if not torch.compiler.is_compiling() and relative_pos.shape[2] != reduced.shape[1]:
        raise ValueError(
            f"relative_pos must have one column for each of the {reduced.shape[1]} keys, got {tuple(relative_pos.shape)}"
        )
    out = reduced_kv_attention_reference(
        heads(q(tokens)), heads(k(reduced)), heads(v(reduced)), relative_pos, scale, attn_drop
    )
    z = proj(out.transpose(1, 2).flatten(2))  # (B, N, C)
    if proj_drop is not None:
        z = proj_drop(z)
    if drop_path is not None:
        z = drop_path(z)
    z = z.unflatten(1, (height, width))
    return x + z if shortcut else z
