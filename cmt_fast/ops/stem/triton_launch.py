"""Launching the convolutions of the stem."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.device import DeviceLimits, device_limits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.products import is_exact, precision_of
from cmt_fast.ops._triton.tiling import block
from cmt_fast.ops.layout import nchw
from cmt_fast.ops.patch_embed.schema import patch_embed_triton
from cmt_fast.ops.stem.configs import conv_config, conv_embed_config
from cmt_fast.ops.stem.triton_kernels import conv3x3_embed_kernel, conv3x3_kernel


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
    x = _two_convolutions(x, weight1, bias1, scale1, shift1, weight2, bias2, scale2, shift2)
    return _third_convolution(x, weight3, bias3)


def stem_embed(
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
    embed_weight: Tensor,
    embed_bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    channels: int,
    eps: float,
) -> Tensor:
    """:func:`stem`, then the step :class:`cmt_fast.inference.program.PatchEmbed` -> (B, ceil(H / 2) // 2, ceil(W / 2) // 2, C): the third
    convolution and the embedding in one kernel, or in two where that would not fit."""
    x = _two_convolutions(x, weight1, bias1, scale1, shift1, weight2, bias2, scale2, shift2)
    embedding = (embed_weight, embed_bias, scale, shift)
    b, h, w, _ = x.shape
    y = torch.empty(b, h // 2, w // 2, len(embed_weight), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    fused = conv_embed_launch(x, weight3, bias3, *embedding, y, channels, eps, device_limits(x.device))
    if fused is None:
        return patch_embed_triton(_third_convolution(x, weight3, bias3), *embedding, channels, eps)
    fused.run()
    return y


def _two_convolutions(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
) -> Tensor:
    b, _, h, w = x.shape
    limits = device_limits(x.device)
    y1 = torch.empty(b, -(-h // 2), -(-w // 2), len(bias1), dtype=weight1.dtype, device=x.device)
    y2 = torch.empty_like(y1)
    if y1.numel():
        conv_launch(x, weight1, bias1, scale1, shift1, y1, 2, limits).run()
        conv_launch(nchw(y1), weight2, bias2, scale2, shift2, y2, 1, limits).run()
    return y2


def _third_convolution(x: Tensor, weight3: Tensor, bias3: Tensor) -> Tensor:
    y = torch.empty_like(x)
    if y.numel():
        conv_launch(nchw(x), weight3, bias3, None, None, y, 1, device_limits(x.device)).run()
    return y


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


def conv_embed_launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    embed_weight: Tensor,
    embed_bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    y: Tensor,
    channels: int,
    eps: float,
    limits: DeviceLimits,
) -> Launch | None:
    """y (B, H // 2, W // 2, C) = the patch embedding of GELU of a 3x3 convolution; None where two kernels are better (:func:`conv_embed_config`).

    x (B, H, W, S), weight (S, 3, 3, S), bias (S,), embed_weight (C, 4 S), embed_bias, scale and shift (C,), and y contiguous.
    """
    images, height, width, s = x.shape
    _, down, across, c = y.shape
    config = conv_embed_config(images, down, across, s, c, is_exact(x.dtype), limits)
    if config is None:
        return None
    inputs = dict(
        x=x,
        weight=weight,
        bias=bias,
        embed_weight=embed_weight,
        embed_bias=embed_bias,
        scale=scale,
        shift=shift,
    )
    return Launch(
        kernel=conv3x3_embed_kernel,
        grid=(images * -(-down // config.block_h) * -(-across // config.block_w),),
        arguments=dict(**inputs, y=y, height=height, width=width, eps=eps),
        constants=dict(
            S=s,
            C=c,
            CHANNELS=channels,
            BLOCK_H=config.block_h,
            BLOCK_W=config.block_w,
            BLOCK_K=config.block_k,
            BLOCK_S=config.block_s,
            BLOCK_C=block(c),
            EXACT=x.dtype == torch.float32,
            PRECISION=precision_of(x.dtype),
        ),
        num_warps=config.num_warps,
        num_stages=1,  # as above
        reads=sum(t.nbytes for t in inputs.values()),
        writes=y.nbytes,
        flops=2 * 4 * (y.numel() // c) * s * (9 * s + c),
        elements=y.numel(),
        loops=(4,),
    )
