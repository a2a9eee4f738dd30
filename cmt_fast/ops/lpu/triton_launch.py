"""Launching the local perception unit's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.device import DeviceLimits, device_limits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops.lpu.configs import lpu_config
from cmt_fast.ops.lpu.triton_kernels import lpu_kernel


def lpu(x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: bool) -> Tensor:
    """Depthwise 3x3 of x (B, H, W, C) by weight (C, 1, 3, 3), plus x if ``shortcut``: any strides -> contiguous."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if y.numel():
        lpu_launch(x, weight.contiguous(), bias, y, shortcut, device_limits(x.device)).run()
    return y


def lpu_reduce(
    x: Tensor, taps: Tensor, bias: Tensor, reduction: Tensor | None, k: int, channels: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The step :class:`cmt_fast.inference.program.LPU` of x (B, H, W, C), any strides -> (B, H, W, C), (B, H // k, W // k, C)."""
    x = x.contiguous()
    b, h, w, c = x.shape
    y, reduced = torch.empty_like(x), torch.empty(b, h // k, w // k, c, dtype=x.dtype, device=x.device)
    if y.numel():
        lpu_reduce_launch(x, taps, bias, reduction, y, reduced, k, channels, eps, device_limits(x.device)).run()
    return y, reduced


def lpu_launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, shortcut: bool, limits: DeviceLimits
) -> Launch:
    """x and y (B, H, W, C), weight (C, 1, 3, 3), bias (C,) or None, all contiguous."""
    constants = dict(TAP_STRIDE=1, CHANNEL_STRIDE=9, SHORTCUT=shortcut)
    return _launch(x, weight, bias, None, y, None, 1, x.shape[-1], 0.0, constants, limits)


def lpu_reduce_launch(
    x: Tensor,
    taps: Tensor,
    bias: Tensor,
    reduction: Tensor | None,
    y: Tensor,
    reduced: Tensor,
    k: int,
    channels: int,
    eps: float,
    limits: DeviceLimits,
) -> Launch:
    """x and y (B, H, W, C), taps (9, C) with the shortcut in them, bias (C,), reduction (k * k, C) or None for k = 1,
    reduced (B, H // k, W // k, C), all contiguous."""
    constants = dict(TAP_STRIDE=x.shape[-1], CHANNEL_STRIDE=1, SHORTCUT=False)
    return _launch(x, taps, bias, reduction, y, reduced, k, channels, eps, constants, limits)


def _launch(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    reduction: Tensor | None,
    y: Tensor,
    reduced: Tensor | None,
    k: int,
    channels: int,
    eps: float,
    constants: dict[str, int | bool],
    limits: DeviceLimits,
) -> Launch:
    images, height, width, c = x.shape
    norm = reduced is not None
    config = lpu_config(images, height, width, c, k, norm, x.element_size(), limits)
    strips = -(-height // (k * config.windows))
    tiles = -(-images * (-(-width // k) * k) // (2 * config.pairs)) * -(-c // config.block_c)
    windows = -(-height // k) / strips
    inputs, outputs = (x, taps, bias, reduction), (y, reduced)
    return Launch(
        kernel=lpu_kernel,
        grid=(strips * tiles,),
        arguments=dict(
            x=x,
            taps=taps,
            bias=bias,
            reduction=reduction,
            y=y,
            reduced=reduced,
            images=images,
            height=height,
            width=width,
            eps=eps,
        ),
        constants=dict(
            C=c,
            CHANNELS=channels,
            NORM=norm,
            K=k,
            WINDOWS=config.windows,
            SPLIT=bool(-(-width // k) * k % 2),
            PAIRS=config.pairs,
            BLOCK_C=config.block_c,
            **constants,
        ),
        num_warps=config.num_warps,
        num_stages=1,  # the rows of a strip are loaded as they come: staged copies would read each three times from L2
        reads=sum(t.nbytes for t in inputs if t is not None),
        writes=sum(t.nbytes for t in outputs if t is not None),
        flops=0,
        elements=y.numel(),
        loops=tuple(n for n, limit in ((windows, config.windows), (k, k)) if limit > 1),
    )
