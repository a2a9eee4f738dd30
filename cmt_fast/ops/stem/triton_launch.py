"""Launching the convolutions of the stem."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.device import DeviceLimits, device_limits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.products import precision_of
from cmt_fast.ops.stem.configs import conv_config
from cmt_fast.ops.stem.triton_kernels import conv3x3_kernel


def stem(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
) -> Tensor:
    """The step :class:`cmt_fast.inference.program.Stem` of x (B, in_chans, H, W), any strides -> (B, ceil(H / 2), ceil(W / 2), S)."""
    b, _, h, w = x.shape
    limits = device_limits(x.device)
    maps = [torch.empty(b, -(-h // 2), -(-w // 2), len(bias1), dtype=weight1.dtype, device=x.device) for _ in range(2)]
    if maps[0].numel():
        conv_launch(x, weight1, bias1, scale1, shift1, maps[0], 2, limits).run()
        conv_launch(maps[0].permute(0, 3, 1, 2), weight2, bias2, scale2, shift2, maps[1], 1, limits).run()
        conv_launch(maps[1].permute(0, 3, 1, 2), weight3, bias3, None, None, maps[0], 1, limits).run()
    return maps[0]


def conv_launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    y: Tensor,
    stride: int,
    limits: DeviceLimits,
) -> Launch:
    """y (B, ceil(H / stride), ceil(W / stride), S) = GELU of a 3x3 convolution, and an affine after it unless it is None.

    x (B, C, H, W), any strides; weight (S, 3, 3, C), bias, scale and shift (S,), and y contiguous.
    """
    images, channels, height, width = x.shape
    _, down, across, outputs = y.shape
    config = conv_config(images, down, across, channels, outputs, limits)
    image, channel, row, column = x.stride()
    dense = x.is_contiguous(memory_format=torch.channels_last) and channel == 1
    names = ("image_stride", "row_stride", "column_stride", "channel_stride")
    inputs = (x, weight, bias, scale, shift)
    return Launch(
        kernel=conv3x3_kernel,
        grid=(images * -(-down // config.block_h) * -(-across // config.block_w),),
        arguments=dict(
            x=x,
            weight=weight,
            bias=bias,
            scale=scale,
            shift=shift,
            y=y,
            height=height,
            width=width,
            **dict(zip(names, [None] * 4 if dense else [image, row, column, channel])),
        ),
        constants=dict(
            C=channels,
            S=outputs,
            STRIDE=stride,
            BLOCK_H=config.block_h,
            BLOCK_W=config.block_w,
            BLOCK_K=config.block_k,
            BLOCK_S=config.block_s,
            EXACT=y.dtype == torch.float32,
            PRECISION=precision_of(y.dtype),
        ),
        num_warps=config.num_warps,
        num_stages=1,  # staged copies would read every tap from L2
        reads=sum(t.nbytes for t in inputs if t is not None),
        writes=y.nbytes,
        flops=2 * 9 * channels * y.numel(),
        elements=y.numel(),
    )
