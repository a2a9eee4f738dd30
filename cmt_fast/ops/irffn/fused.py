"""The feed-forward network of modules by the Triton kernels, in training and wherever else: when it can run, and its call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cmt_fast.ops._triton.reasons import call_reasons
from cmt_fast.ops.autocast import product_dtype
from cmt_fast.ops.batch_norm.training import batch_norm_plan, batch_norm_reasons, update_running
from cmt_fast.ops.checks import PLAIN_POINTWISE, not_plain
from cmt_fast.ops.depthwise.reasons import conv3x3_reasons
from cmt_fast.ops.irffn.autograd import IRFFNFunction, Options
from cmt_fast.ops.irffn.train_configs import tile_reasons
from cmt_fast.ops.lpu.reasons import lpu_reasons
from cmt_fast.ops.parts import (
    Part,
    drop_path_factors,
    drop_path_reasons,
    dropout_reasons,
    dtype_reasons,
    gelu_reasons,
)


def irffn_reasons(
    x: Tensor,
    *,
    expand: nn.Module,
    bn1: nn.Module,
    dw: nn.Module,
    bn2: nn.Module,
    project: nn.Module,
    bn3: nn.Module,
    act1: Part,
    act2: Part,
    norm: nn.Module | None,
    drop: Part,
    drop_path: Part,
) -> list[str]:
    """Reasons why the kernels cannot do what these parts do to x (B, H, W, C); an empty list if they can."""
    c = x.shape[3]
    reasons = not_plain("expand", expand, *PLAIN_POINTWISE) + not_plain("project", project, *PLAIN_POINTWISE)
    reasons += not_plain("dw", dw, nn.Conv2d) + not_plain("norm", norm, nn.LayerNorm)
    reasons += gelu_reasons("act1", act1) + gelu_reasons("act2", act2)
    reasons += dropout_reasons("drop", drop) + drop_path_reasons(drop_path)
    if norm is None:
        reasons.append("norm is None, and the kernels begin with a LayerNorm")
    if reasons:
        return reasons

    assert isinstance(expand, nn.Conv2d) and isinstance(dw, nn.Conv2d) and isinstance(project, nn.Conv2d)
    assert isinstance(norm, nn.LayerNorm)
    r = expand.out_channels
    reasons += batch_norm_reasons("bn1", bn1, r) + batch_norm_reasons("bn2", bn2, r) + batch_norm_reasons("bn3", bn3, c)
    reasons += _conv_reasons("expand", expand, c, r, 1, 1)
    reasons += _conv_reasons("dw", dw, r, r, 3, r)
    reasons += _conv_reasons("project", project, r, c, 1, 1)
    if tuple(norm.normalized_shape) != (c,) or norm.eps <= 0:
        reasons.append(f"norm must be LayerNorm({c}) with a positive eps, got {norm}")
    if x.shape[0] == 0:  # len() would fix the batch of an export
        reasons.append("x holds no image")
    reasons += tile_reasons(x.shape, r)
    norms = [p for part in (norm, bn1, bn2, bn3) for p in part.parameters()]
    weights = [p for part in (expand, dw, project) for p in part.parameters()]
    return (
        reasons
        + call_reasons(x, *norms, *weights, gradients=True, autocast=True)
        + dtype_reasons(x, weights=weights, norms=norms)
    )


def irffn_lpu_reasons(x: Tensor, conv: nn.Module, *, shortcut: bool, **parts: Any) -> list[str]:
    """Reasons why the kernels cannot do what these parts do to x (B, H, W, C), and then the LPU with ``conv``; first those that are found soonest."""
    if not shortcut:
        return ["the kernels of an IRFFN with an LPU add x"]
    reasons = lpu_reasons(x, conv, conv3x3_reasons)
    return reasons or dtype_reasons(x, weights=list(conv.parameters()), norms=[]) or irffn_reasons(x, **parts)


def irffn_fused(
    x: Tensor,
    *,
    expand: nn.Conv2d,
    bn1: Any,
    dw: nn.Conv2d,
    bn2: Any,
    project: nn.Conv2d,
    bn3: Any,
    act1: Part,
    act2: Part,
    norm: nn.LayerNorm,
    drop: Part,
    drop_path: Part,
    shortcut: bool,
    recompute: bool,
    lpu: nn.Conv2d | None = None,
) -> Tensor:
    """What :func:`cmt_fast.functional.irffn` does, or ``irffn_lpu`` with ``lpu``, by the kernels; nothing may speak against it (``irffn_reasons``)."""
    b, height, width, c = x.shape
    dtype, norms = product_dtype(x), (bn1, bn2, bn3)
    r = len(dw.weight)
    plan1, plan2, plan3 = plans = [
        batch_norm_plan(bn, (b, channels, height, width)) for bn, channels in zip(norms, (r, r, c))
    ]
    options = Options(
        dtype,
        (norm.eps, plan1.eps, plan2.eps, plan3.eps),
        (plan1.group, plan2.group, plan3.group),
        shortcut,
        recompute,
    )
    parts = (norm, expand, bn1, dw, bn2, project, bn3, lpu)  # in the order of ``Parameters``
    parameters = [p for part in parts for p in ((None, None) if part is None else (part.weight, part.bias))]
    running = [buffer for plan in plans for buffer in (plan.mean, plan.variance)]
    factor = drop_path_factors(drop_path, x, dtype)
    out, *statistics = IRFFNFunction.apply(x.contiguous(), factor, *running, options, *parameters)
    for bn, plan, batch in zip(norms, plans, statistics):
        if plan.mean is None:
            update_running(bn, batch)
    return out


def _conv_reasons(name: str, conv: nn.Conv2d, inputs: int, outputs: int, size: int, groups: int) -> list[str]:
    """Whether ``conv`` is a convolution of these sizes that keeps the size of a map; its bias may be missing."""
    wanted = ((outputs, inputs // groups, size, size), (1, 1), (size // 2, size // 2), (1, 1), "zeros")
    if (tuple(conv.weight.shape), conv.stride, conv.padding, conv.dilation, conv.padding_mode) == wanted:
        return []
    arguments = f"{inputs}, {outputs}, {size}, padding={size // 2}, groups={groups}"
    return [f"{name} must be Conv2d({arguments}), got {conv}"]
