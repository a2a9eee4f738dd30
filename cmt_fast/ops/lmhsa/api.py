"""Public lightweight multi-head self-attention: validate, choose a backend, call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cmt_fast.backend import select
from cmt_fast.ops.checks import check_map, check_modules, check_same, shape_of
from cmt_fast.ops.lmhsa.fused import lmhsa_fused, lmhsa_reasons
from cmt_fast.ops.lmhsa.reference import lmhsa_reference


def lmhsa(
    x: Tensor,
    relative_pos: Tensor,
    *,
    q: nn.Module,
    k: nn.Module,
    v: nn.Module,
    proj: nn.Module,
    num_heads: int,
    scale: float,
    reduction: nn.Module | None = None,
    norm: nn.Module | None = None,
    attn_drop: Callable[[Tensor], Tensor] | None = None,
    proj_drop: Callable[[Tensor], Tensor] | None = None,
    drop_path: Callable[[Tensor], Tensor] | None = None,
    shortcut: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Lightweight multi-head self-attention, second sub-layer of a CMT block (paper, "LMHSA").

    ``y = norm(x)``; queries from every token of ``y``, keys and values from ``reduction(y)``;
    ``z = proj(softmax(scale * q k^T + relative_pos) v)``; returns ``x + drop_path(z)``.

    Args:
        x: (B, H, W, C), floating point.
        relative_pos: (num_heads, N, M), the dense learned bias: N = H * W queries, M keys after the reduction.
        q, k: ``nn.Linear(C, d_qk * num_heads)``; v: ``nn.Linear(C, C)``; proj: ``nn.Linear(C, C)``.
        num_heads: heads h; q's and v's widths are divided by it.
        scale: factor of the logits, ``head_dim ** -0.5`` in the paper.
        reduction: maps (B, C, H, W) to (B, C, H // k, W // k): depthwise k x k convolution and BatchNorm; None for k = 1.
        norm: LayerNorm over C; None skips it.
        attn_drop, proj_drop, drop_path: dropout of the weights, of the output, and stochastic depth; None skips them.
        shortcut: add ``x``; False returns the branch alone.
        backend: see :func:`cmt_fast.use_backend`.

    Returns:
        (B, H, W, C).

    Raises:
        ValueError: on a wrong shape or device, or if ``num_heads`` does not divide the width of a linear q, k or v.
        TypeError: if ``x`` or ``relative_pos`` is not floating point, or a part is no module.
        BackendError: if ``backend`` names one that cannot run this call.
    """
    check_map(x)
    check_modules(q=q, k=k, v=v, proj=proj)
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    for name, linear in (("q", q), ("k", k), ("v", v)):
        if isinstance(linear, nn.Linear) and linear.out_features % num_heads:
            raise ValueError(
                f"num_heads must divide the width of {name}, got num_heads {num_heads} and width {linear.out_features}"
            )
    tokens = x.shape[1] * x.shape[2]
    if (
        not isinstance(relative_pos, Tensor)
        or relative_pos.dim() != 3
        or tuple(relative_pos.shape[:2]) != (num_heads, tokens)
    ):
        raise ValueError(
            f"relative_pos must have shape (num_heads, H * W, keys) = ({num_heads}, {tokens}, keys), got {shape_of(relative_pos)}"
        )
    if not relative_pos.is_floating_point():
        raise TypeError(f"relative_pos must be floating point, got {relative_pos.dtype}")
    check_same("relative_pos", relative_pos, "x", x)
    parts: dict[str, Any] = dict(
        q=q,
        k=k,
        v=v,
        proj=proj,
        reduction=reduction,
        norm=norm,
        attn_drop=attn_drop,
        proj_drop=proj_drop,
        drop_path=drop_path,
    )
    candidates = {"triton": lambda: lmhsa_reasons(x, relative_pos, num_heads=num_heads, **parts)}
    if select("lmhsa", candidates, backend, device=x.device) == "triton":
        return lmhsa_fused(x, relative_pos, scale=scale, shortcut=shortcut, **parts)
    return lmhsa_reference(x, relative_pos, num_heads=num_heads, scale=scale, shortcut=shortcut, **parts)
