"""Launching the local perception unit's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.device import DeviceLimits, device_limits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops.lpu.configs import lpu_config
from cmt_fast.ops.lpu.triton_kernels import lpu_kernel


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
    images, height, width, c = x.shape
    config = lpu_config(images, height, width, c, k, x.element_size(), limits)
    columns = -(-width // k) * k
    strips = -(-height // (k * config.windows))
    windows = -(-height // k) / strips
    inputs = (x, taps, bias, reduction)
    return Launch(
        kernel=lpu_kernel,
        grid=(strips * -(-images * columns // (2 * config.pairs)),),
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
            K=k,
            WINDOWS=config.windows,
            SPLIT=bool(columns % 2),
            PAIRS=config.pairs,
            BLOCK_C=config.block_c,
        ),
        num_warps=config.num_warps,
        num_stages=1,  # the rows of a strip are loaded as they come: staged copies would read each three times from L2
        reads=sum(t.nbytes for t in inputs if t is not None),
        writes=y.nbytes + reduced.nbytes,
        flops=0,
        elements=y.numel(),
        loops=tuple(n for n, limit in ((windows, config.windows), (k, k)) if limit > 1),
    )
