"""The mathematics of the inverted residual feed-forward network, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from cmt_fast.ops.layout import nchw, nhwc


def irffn_reference(
    x: Tensor,
    *,
    expand: nn.Module,
    bn1: nn.Module,
    dw: nn.Module,
    bn2: nn.Module,
    project: nn.Module,
    bn3: nn.Module,
    act1: Callable[[Tensor], Tensor],
    act2: Callable[[Tensor], Tensor],
    norm: nn.Module | None,
    drop: Callable[[Tensor], Tensor] | None,
    drop_path: Callable[[Tensor], Tensor] | None,
    shortcut: bool,
) -> Tensor:
    """X = Z + drop_path(IRFFN(LN(Z))) (paper, "IRFFN"); x (B, H, W, C) -> (B, H, W, C).

    The activation (GELU) comes before each BatchNorm, and the zero padding of ``dw`` after the first one.
    """
    y = nchw(x if norm is None else norm(x))
    y = bn1(act1(expand(y)))  # (B, R, H, W)
    if drop is not None:
        y = drop(y)
    y = dw(y) + y  # one statement each: the map before it is freed as soon as it is not needed
    y = bn2(act2(y))
    y = bn3(project(y))  # (B, C, H, W)
    if drop is not None:
        y = drop(y)
    if drop_path is not None:
        y = drop_path(y)
    y = nhwc(y)
    return x + y if shortcut else y
