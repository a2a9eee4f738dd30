"""Public inverted residual feed-forward network: validate, choose a backend, call."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from cmt_fast.backend import select
from cmt_fast.ops.checks import check_map
from cmt_fast.ops.irffn.reference import irffn_reference


def irffn(
    x: Tensor,
    *,
    expand: nn.Module,
    bn1: nn.Module,
    dw: nn.Module,
    bn2: nn.Module,
    project: nn.Module,
    bn3: nn.Module,
    norm: nn.Module | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
    drop_path: Callable[[Tensor], Tensor] | None = None,
    shortcut: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Inverted residual feed-forward network, third sub-layer of a CMT block (paper, "IRFFN").

    ``h = bn1(gelu(expand(norm(x))))``; ``h = bn2(gelu(dw(h) + h))``; returns ``x + drop_path(bn3(project(h)))``.

    Args:
        x: (B, H, W, C), floating point.
        expand: 1x1 convolution C -> R; project: 1x1 convolution R -> C.
        dw: depthwise 3x3 convolution of R channels with zero padding 1.
        bn1, bn2: BatchNorm over R; bn3: BatchNorm over C. All of these modules take (B, channels, H, W).
        norm: LayerNorm over C; None skips it.
        drop, drop_path: dropout of the hidden map and the output, and stochastic depth; None skips them.
        shortcut: add ``x``; False returns the branch alone.
        backend: see :func:`cmt_fast.use_backend`.

    Returns:
        (B, H, W, C).

    Raises:
        ValueError, TypeError: on a wrong shape or dtype of ``x``.
        BackendError: if ``backend`` names one that cannot run this call.
    """
    check_map(x)
    select("irffn", {}, backend, device=x.device)
    return irffn_reference(
        x,
        expand=expand,
        bn1=bn1,
        dw=dw,
        bn2=bn2,
        project=project,
        bn3=bn3,
        norm=norm,
        drop=drop,
        drop_path=drop_path,
        shortcut=shortcut,
    )
