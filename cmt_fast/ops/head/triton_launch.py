"""Launching the kernels of the head."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.device import DeviceLimits, device_limits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.linear_launch import linear_launch
from cmt_fast.ops._triton.products import is_exact, precision_of
from cmt_fast.ops.head.configs import features_config
from cmt_fast.ops.head.triton_kernels import features_kernel


def head_features(x: Tensor, weight: Tensor, bias: Tensor, pool: bool) -> Tensor:
    """swish(x weight^T + bias) of x (B, H, W, C), any strides, weight (F, C), bias (F,) -> (B, H, W, F), with ``pool`` its mean (B, F)."""
    x = x.contiguous()
    b, h, w, _ = x.shape
    y = torch.empty((b, len(weight)) if pool else (b, h, w, len(weight)), dtype=x.dtype, device=x.device)
    if y.numel():
        features_launch(x, weight, bias, y, device_limits(x.device)).run()
    return y


def head_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weight^T + bias of x (..., F), any strides, weight (classes, F), bias (classes,) -> (..., classes)."""
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype, device=x.device)
    if y.numel():
        linear_launch(x, weight, bias, None, y, None, 0.0, device_limits(x.device)).run()
    return y


def features_launch(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, limits: DeviceLimits) -> Launch:
    """x (B, H, W, C), weight (F, C), bias (F,), y (B, F) for the mean, or (B, H, W, F), all contiguous."""
    images, height, width, c = x.shape
    pixels, features = height * width, len(weight)
    config = features_config(images, pixels, c, features, x.element_size(), is_exact(x.dtype), limits)
    loops = (-(-pixels // config.block_n), -(-c // config.block_c))
    return Launch(
        kernel=features_kernel,
        grid=(-(-images // config.images) * -(-features // config.block_f),),
        arguments=dict(x=x, weight=weight, bias=bias, y=y, images=images, pixels=pixels),
        constants=dict(
            C=c,
            F=features,
            POOL=y.dim() == 2,
            IMAGES=config.images,
            BLOCK_N=config.block_n,
            BLOCK_C=config.block_c,
            BLOCK_F=config.block_f,
            PRECISION=precision_of(x.dtype),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        reads=sum(t.nbytes for t in (x, weight, bias)),
        writes=y.nbytes,
        flops=2 * images * pixels * c * features,
        elements=images * pixels * features,
        loops=loops,
    )
