"""Public inverted residual feed-forward network, alone and with the LPU that follows: validate, choose a backend, call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cmt_fast.backend import joins, select
from cmt_fast.ops.checks import check_conv_channels, check_map, check_modules
from cmt_fast.ops.irffn.fused import irffn_fused, irffn_lpu_reasons, irffn_reasons
from cmt_fast.ops.irffn.reference import irffn_reference
from cmt_fast.ops.lpu.api import lpu


def irffn(
    x: Tensor,
    *,
    expand: nn.Module,
    bn1: nn.Module,
    dw: nn.Module,
    bn2: nn.Module,
    project: nn.Module,
    bn3: nn.Module,
    act1: Callable[[Tensor], Tensor] = F.gelu,
    act2: Callable[[Tensor], Tensor] = F.gelu,
    norm: nn.Module | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
    drop_path: Callable[[Tensor], Tensor] | None = None,
    shortcut: bool = True,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Inverted residual feed-forward network, third sub-layer of a CMT block (paper, "IRFFN").

    ``h = bn1(act1(expand(norm(x))))``; ``h = bn2(act2(dw(h) + h))``; returns ``x + drop_path(bn3(project(h)))``.

    Args:
        x: (B, H, W, C), floating point.
        expand: 1x1 convolution C -> R; project: 1x1 convolution R -> C.
        dw: depthwise 3x3 convolution of R channels with zero padding 1.
        bn1, bn2: BatchNorm over R; bn3: BatchNorm over C. All of these modules take (B, channels, H, W).
        act1, act2: activations, the exact GELU.
        norm: LayerNorm over C; None skips it.
        drop, drop_path: dropout of the hidden map and the output, and stochastic depth; None skips them.
        shortcut: add ``x``; False returns the branch alone.
        recompute: let the kernels keep no expanded map for the backward pass, but make it again, bit for bit: 40 % less memory for 7 %
            more memory traffic. The reference keeps what PyTorch keeps.
        backend: see :func:`cmt_fast.use_backend`.

    Returns:
        (B, H, W, C).

    Raises:
        ValueError: on a wrong shape of ``x``, or if ``expand`` is a convolution of other channels.
        TypeError: if ``x`` is not floating point, or a part is no module.
        BackendError: if ``backend`` names one that cannot run this call.
    """
    check_map(x)
    check_modules(expand=expand, bn1=bn1, dw=dw, bn2=bn2, project=project, bn3=bn3)
    check_conv_channels("expand", expand, x)
    parts: dict[str, Any] = dict(
        expand=expand,
        bn1=bn1,
        dw=dw,
        bn2=bn2,
        project=project,
        bn3=bn3,
        act1=act1,
        act2=act2,
        norm=norm,
        drop=drop,
        drop_path=drop_path,
    )
    candidates = {"triton": lambda: irffn_reasons(x, **parts)}
    if select("irffn", candidates, backend, device=x.device) == "triton":
        return irffn_fused(x, shortcut=shortcut, recompute=recompute, **parts)
    return irffn_reference(x, shortcut=shortcut, **parts)


def irffn_lpu(
    x: Tensor,
    conv: nn.Module,
    *,
    expand: nn.Module,
    bn1: nn.Module,
    dw: nn.Module,
    bn2: nn.Module,
    project: nn.Module,
    bn3: nn.Module,
    act1: Callable[[Tensor], Tensor] = F.gelu,
    act2: Callable[[Tensor], Tensor] = F.gelu,
    norm: nn.Module | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
    drop_path: Callable[[Tensor], Tensor] | None = None,
    shortcut: bool = True,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The IRFFN of a block and the LPU of the next one: ``lpu(irffn(x, ...), conv)``.

    Between two blocks nothing else reads the sum that ends the first. The kernels make it where they read it: it is not written, nor kept for
    the backward pass. Where they cannot run this is those two calls, each with a backend and reasons of its own.

    Args:
        x: (B, H, W, C), floating point.
        conv: the LPU's, as :func:`cmt_fast.functional.lpu` takes it.
        expand, bn1, dw, bn2, project, bn3, act1, act2, norm, drop, drop_path, shortcut, recompute, backend: of :func:`cmt_fast.functional.irffn`.

    Returns:
        (B, H, W, C).

    Raises:
        ValueError, TypeError, BackendError: as those two calls.
    """
    check_map(x)
    check_modules(conv=conv, expand=expand, bn1=bn1, dw=dw, bn2=bn2, project=project, bn3=bn3)
    parts: dict[str, Any] = dict(
        expand=expand,
        bn1=bn1,
        dw=dw,
        bn2=bn2,
        project=project,
        bn3=bn3,
        act1=act1,
        act2=act2,
        norm=norm,
        drop=drop,
        drop_path=drop_path,
        shortcut=shortcut,
    )
    if joins("irffn_lpu", lambda: irffn_lpu_reasons(x, conv, **parts), backend):
        assert isinstance(conv, nn.Conv2d)  # or there were reasons against it
        return irffn_fused(x, recompute=recompute, lpu=conv, **parts)
    return lpu(irffn(x, recompute=recompute, backend=backend, **parts), conv, backend=backend)
