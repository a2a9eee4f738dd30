"""Launching the kernels of the depthwise convolutions' gradients.

How the sums over the batch are cut depends on shapes alone, and their parts are added in order: a run repeats bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.device import device_limits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.statistics import add_partials
from cmt_fast.ops._triton.strips import strip_programs
from cmt_fast.ops.depthwise.configs import WARPS, conv3x3_backward_config, reduce_backward_config
from cmt_fast.ops.depthwise.triton_launch import conv3x3_launch
from cmt_fast.ops.depthwise.triton_train_kernels import conv3x3_backward_kernel, reduce_backward_kernel


def conv3x3_backward(
    grad: Tensor, x: Tensor, weight: Tensor, shortcut: bool, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """grad and x (B, H, W, C), any strides -> gradients of x, weight and bias; first dimension 0 where one is not needed."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    dx = torch.empty_like(x) if need_x else None
    partials: Tensor | None = None
    if len(x) and (need_weight or need_bias):
        launch = conv3x3_backward_launch(grad, x, weight, dx, shortcut, need_weight, need_bias)
        launch.run()
        partials = launch.arguments["partials"]  # type: ignore[assignment]
    elif len(x) and dx is not None:
        conv3x3_launch(grad, weight, None, dx, shortcut, True, device_limits(x.device)).run()
    return _gradients(x, weight, dx, partials, need_weight, need_bias)


def reduce_backward(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (B, H // k, W // k, C), x (B, H, W, C), any strides -> as ``conv3x3_backward``."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    dx = torch.empty_like(x) if need_x else None
    partials: Tensor | None = None
    if len(x) and (need_x or need_weight or need_bias):
        launch = reduce_backward_launch(grad, x, weight, dx, need_weight, need_bias)
        launch.run()
        partials = launch.arguments["partials"]  # type: ignore[assignment]
    return _gradients(x, weight, dx, partials, need_weight, need_bias)


def conv3x3_backward_launch(
    grad: Tensor, x: Tensor, weight: Tensor, dx: Tensor | None, shortcut: bool, need_weight: bool, need_bias: bool
) -> Launch:
    """grad, x and dx (B, H, W, C), weight (C, 1, 3, 3), all contiguous, dx None if not needed; new partial sums."""
    images, height, width, c = x.shape
    config = conv3x3_backward_config(images, height, width, c)
    programs = strip_programs(images, height, width, config.rows, config.pairs)
    partials = _partials(x, programs, 9 * need_weight + need_bias)
    return Launch(
        kernel=conv3x3_backward_kernel,
        grid=(programs * -(-c // config.block_c),),
        arguments=dict(
            grad=grad,
            x=x,
            weight=weight,
            dx=dx,
            partials=partials,
            images=images,
            height=height,
            width=width,
        ),
        constants=dict(
            C=c,
            WEIGHT=need_weight,
            BIAS=need_bias,
            SHORTCUT=shortcut,
            SPLIT=bool(width % 2),
            ROWS=config.rows,
            PAIRS=config.pairs,
            BLOCK_C=config.block_c,
        ),
        num_warps=WARPS,
        num_stages=1,  # as in conv3x3_launch
        reads=grad.nbytes + need_weight * x.nbytes + weight.nbytes,
        writes=sum(t.nbytes for t in (dx, partials) if t is not None),
        flops=0,
        elements=x.numel(),
        loops=(height / -(-height // config.rows),),
    )


def reduce_backward_launch(
    grad: Tensor, x: Tensor, weight: Tensor, dx: Tensor | None, need_weight: bool, need_bias: bool
) -> Launch:
    """grad (B, H // k, W // k, C), x and dx (B, H, W, C), weight (C, 1, k, k), all contiguous, dx None if not needed; new partial sums."""
    images, height, width, c = x.shape
    k = weight.shape[-1]
    windows = images * -(-height // k) * -(-width // k)
    config = reduce_backward_config(windows, k, c)
    tiles = -(-windows // config.windows)
    programs = -(-tiles // config.tiles)
    partials = _partials(x, programs, k * k * need_weight + need_bias)
    return Launch(
        kernel=reduce_backward_kernel,
        grid=(programs * k * -(-c // config.block_c),),
        arguments=dict(
            grad=grad,
            x=x,
            weight=weight,
            dx=dx,
            partials=partials,
            windows=windows,
            height=height,
            width=width,
        ),
        constants=dict(
            C=c,
            K=k,
            WEIGHT=need_weight,
            BIAS=need_bias,
            TILES=config.tiles,
            WINDOWS=config.windows,
            BLOCK_K=config.block_k,
            BLOCK_C=config.block_c,
        ),
        num_warps=WARPS,
        num_stages=1,
        reads=grad.nbytes + need_weight * x.nbytes + weight.nbytes,
        writes=sum(t.nbytes for t in (dx, partials) if t is not None),
        flops=0,
        elements=x.numel(),
        loops=(tiles / programs,),
    )


def _partials(x: Tensor, programs: int, width: int) -> Tensor | None:
    """Memory for the sums of every program, ``width`` a channel; None if there are none."""
    return torch.empty(programs, width * x.shape[-1], dtype=torch.float32, device=x.device) if width else None


def _gradients(
    x: Tensor, weight: Tensor, dx: Tensor | None, partials: Tensor | None, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What an operator returns: tensors in the dtype of their variable, empty where one is not needed."""
    taps, channels = weight.numel() * need_weight, len(weight) * need_bias
    # Without partial sums there is no image, or none was asked for.
    sums = weight.new_zeros(taps + channels) if partials is None else add_partials(partials).to(weight.dtype)
    dweight = sums[:taps].view(-1, *weight.shape[1:])
    return x.new_empty(0, *x.shape[1:]) if dx is None else dx, dweight, sums[taps:].clone()
