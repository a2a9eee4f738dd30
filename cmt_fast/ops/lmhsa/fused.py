"""The attention sub-layer of modules by the Triton kernels, in training and wherever gradients are needed: when it can run, and its call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cmt_fast.ops._triton.reasons import DTYPES, call_reasons
from cmt_fast.ops.attention.configs import MAX_HEAD_DIM
from cmt_fast.ops.autocast import autocast_dtype, product_dtype
from cmt_fast.ops.batch_norm.training import batch_norm_plan, batch_norm_reasons, update_running
from cmt_fast.ops.checks import not_plain
from cmt_fast.ops.lmhsa.autograd import LMHSAFunction
from cmt_fast.ops.lmhsa.reduce_configs import MAX_CHANNELS
from cmt_fast.ops.parts import Part, drop_path_factors, drop_path_reasons, dropout_reasons


def lmhsa_reasons(
    x: Tensor,
    table: Tensor,
    *,
    q: nn.Module,
    k: nn.Module,
    v: nn.Module,
    proj: nn.Module,
    num_heads: int,
    reduction: nn.Module | None,
    norm: nn.Module | None,
    attn_drop: Part,
    proj_drop: Part,
    drop_path: Part,
) -> list[str]:
    """Reasons why the kernels cannot do what these parts do to x (B, H, W, C); an empty list if they can."""
    channels = x.shape[-1]
    linears = dict(q=q, k=k, v=v, proj=proj)
    reasons = [reason for name, part in linears.items() for reason in not_plain(name, part, nn.Linear)]
    reasons += not_plain("norm", norm, nn.LayerNorm)
    reasons += dropout_reasons("attn_drop", attn_drop) + dropout_reasons("proj_drop", proj_drop)
    reasons += drop_path_reasons(drop_path)
    if reduction is not None:
        reasons += _reduction_reasons(reduction, channels)
    if reasons:
        return reasons

    assert isinstance(q, nn.Linear) and isinstance(k, nn.Linear) and isinstance(v, nn.Linear)
    assert isinstance(proj, nn.Linear)
    if {q.in_features, k.in_features, v.in_features, proj.out_features} != {channels}:
        reasons.append(f"q, k and v must take, and proj must make, the {channels} channels of x")
    if q.out_features != k.out_features or v.out_features != proj.in_features:
        reasons.append("q must be as wide as k, and v as proj takes")
    if (k.bias is None) != (v.bias is None):
        reasons.append("k and v must both have a bias, or none")
    if (widest := max(k.out_features, v.out_features) // num_heads) > MAX_HEAD_DIM:
        reasons.append(f"heads must have at most {MAX_HEAD_DIM} channels, got {widest}")
    if channels > MAX_CHANNELS:
        reasons.append(f"x must have at most {MAX_CHANNELS} channels, got {channels}")
    if isinstance(norm, nn.LayerNorm) and (tuple(norm.normalized_shape) != (channels,) or norm.eps <= 0):
        reasons.append(f"norm must be LayerNorm({channels}) with a positive eps, got {norm}")
    step = 1 if reduction is None else reduction[0].stride[0]  # type: ignore[index]
    if x.shape[0] == 0 or table.shape[2] != (x.shape[1] // step) * (x.shape[2] // step):
        reasons.append(
            f"x must hold an image, and the table a column a key, got {tuple(x.shape)} and {tuple(table.shape)}"
        )
    parameters = [p for part in (*linears.values(), norm, reduction) if part is not None for p in part.parameters()]
    return (
        reasons
        + call_reasons(x, table, *parameters, gradients=True, autocast=True)
        + _dtype_reasons(x, table, parameters)
    )


def lmhsa_fused(
    x: Tensor,
    table: Tensor,
    *,
    q: nn.Linear,
    k: nn.Linear,
    v: nn.Linear,
    proj: nn.Linear,
    scale: float,
    reduction: Sequence[nn.Module] | None,
    norm: nn.LayerNorm | None,
    attn_drop: Part,
    proj_drop: Part,
    drop_path: Part,
    shortcut: bool,
) -> Tensor:
    """What :func:`cmt_fast.functional.lmhsa` does, by the kernels; nothing may speak against it (:func:`lmhsa_reasons`)."""
    dtype = product_dtype(x)
    factors = drop_path_factors(drop_path, x, dtype)
    conv: Any = None
    bn: Any = None
    plan = None
    if reduction is not None:
        conv, bn = reduction
        height, width = (side // conv.stride[0] for side in x.shape[1:3])
        plan = batch_norm_plan(bn, (len(x), x.shape[3], height, width))
    z, statistics = LMHSAFunction.apply(
        x,
        table,
        factors,
        *_parameters(norm),
        *_parameters(q),
        *_parameters(k),
        *_parameters(v),
        *_parameters(proj),
        *_parameters(conv),
        *_parameters(bn),
        plan and plan.mean,
        plan and plan.variance,
        dtype,
        norm and norm.eps,
        plan.eps if plan else 0.0,
        plan and plan.group,
        scale,
        shortcut,
    )
    if plan is not None and plan.mean is None:
        update_running(bn, statistics)
    return z


def _parameters(part: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a part that may be missing."""
    return (None, None) if part is None else (part.weight, part.bias)  # type: ignore[return-value]


def _reduction_reasons(reduction: nn.Module, channels: int) -> list[str]:
    reasons = not_plain("reduction", reduction, nn.Sequential)
    if reasons or len(list(reduction.children())) != 2:
        return reasons or ["reduction must be a depthwise convolution and a BatchNorm"]
    parts: Any = reduction
    conv, bn = parts
    reasons = not_plain("reduction's convolution", conv, nn.Conv2d)
    reasons += batch_norm_reasons("reduction's norm", bn, channels)
    if not reasons:
        k = conv.kernel_size[0]
        settings = (tuple(conv.weight.shape), conv.stride, conv.padding, conv.dilation)
        if settings != ((channels, 1, k, k), (k, k), (0, 0), (1, 1)) or k == 1:
            reasons.append(
                f"reduction's convolution must be Conv2d({channels}, {channels}, k, stride=k, groups={channels}) with k > 1, got {conv}"
            )
    return reasons


def _dtype_reasons(x: Tensor, table: Tensor, parameters: Sequence[Tensor]) -> list[str]:
    low = product_dtype(x)
    if low == x.dtype and all(p.dtype == x.dtype for p in parameters):
        return []
    mixed = autocast_dtype(x) is not None
    dtypes = {x.dtype, *(p.dtype for p in parameters)}
    if mixed and low in DTYPES and dtypes <= {torch.float32, low}:
        return []
    names = ", ".join(sorted(str(dtype) for dtype in dtypes))
    return [f"x and the parameters must have one dtype, or under autocast float32 or autocast's, got {names}"]
