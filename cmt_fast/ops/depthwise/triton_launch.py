"""Launching the depthwise convolutions' kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.device import DeviceLimits, device_limits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.strips import strip_programs
from cmt_fast.ops.depthwise.configs import WARPS, conv3x3_config, reduce_config
from cmt_fast.ops.depthwise.triton_kernels import conv3x3_kernel, reduce_kernel


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: bool) -> Tensor:
    """Depthwise 3x3 of x (B, H, W, C) by weight (C, 1, 3, 3), plus x if ``shortcut``: any strides -> contiguous."""
    x = x.contiguous()
    bias = bias if bias is None else bias.contiguous()
    y = torch.empty_like(x)
    if y.numel():
        conv3x3_launch(x, weight.contiguous(), bias, y, shortcut, False, device_limits(x.device)).run()
    return y


def reduce(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise k x k with stride k of x (B, H, W, C) by weight (C, 1, k, k), any strides -> (B, H // k, W // k, C)."""
    x = x.contiguous()
    bias = bias if bias is None else bias.contiguous()
    (b, h, w, c), k = x.shape, weight.shape[-1]
    y = torch.empty(b, h // k, w // k, c, dtype=x.dtype, device=x.device)
    if y.numel():
        reduce_launch(x, weight.contiguous(), bias, y, device_limits(x.device)).run()
    return y


def conv3x3_launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, shortcut: bool, turn: bool, limits: DeviceLimits
) -> Launch:
    """x and y (B, H, W, C), weight (C, 1, 3, 3), bias (C,) or None, all contiguous; ``turn``: by 180 degrees."""
    images, height, width, c = x.shape
    config = conv3x3_config(images, height, width, c, limits)
    return Launch(
        kernel=conv3x3_kernel,
        grid=(strip_programs(images, height, width, config.rows, config.pairs) * -(-c // config.block_c),),
        arguments=dict(x=x, weight=weight, bias=bias, y=y, images=images, height=height, width=width),
        constants=dict(
            C=c,
            SHORTCUT=shortcut,
            TURN=turn,
            SPLIT=bool(width % 2),
            ROWS=config.rows,
            PAIRS=config.pairs,
            BLOCK_C=config.block_c,
        ),
        num_warps=WARPS,
        num_stages=1,  # the rows of a strip are loaded as they come: staged copies would read each three times from L2
        reads=sum(t.nbytes for t in (x, weight, bias) if t is not None),
        writes=y.nbytes,
        flops=0,
        elements=y.numel(),
        loops=(height / -(-height // config.rows),),
    )


def reduce_launch(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, limits: DeviceLimits) -> Launch:
    """x (B, H, W, C), weight (C, 1, k, k), bias (C,) or None, y (B, H // k, W // k, C), all contiguous."""
    _, height, width, c = x.shape
    k, windows = weight.shape[-1], y.shape[:3].numel()
    config = reduce_config(windows, k, c, limits)
    return Launch(
        kernel=reduce_kernel,
        grid=(-(-windows // config.windows) * -(-c // config.block_c),),
        arguments=dict(x=x, weight=weight, bias=bias, y=y, windows=windows, height=height, width=width),
        constants=dict(C=c, K=k, WINDOWS=config.windows, BLOCK_K=config.block_k, BLOCK_C=config.block_c),
        num_warps=WARPS,
        num_stages=1,
        reads=sum(t.nbytes for t in (x, weight, bias) if t is not None),
        writes=y.nbytes,
        flops=0,
        elements=x.numel(),
        loops=(k,) if k > 1 else (),
    )
