"""Launching the kernels of the IRFFN of a packed model."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.device import DeviceLimits, device_limits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.linear_launch import linear_launch
from cmt_fast.ops._triton.products import is_exact, precision_of
from cmt_fast.ops.irffn.configs import depthwise_config, expand_config, project_config
from cmt_fast.ops.irffn.triton_kernels import depthwise_gelu_kernel, depthwise_project_kernel, expand_kernel


def expand(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, channels: int, eps: float) -> Tensor:
    """The step :class:`cmt_fast.inference.program.Expand` of x (B, H, W, C) -> (B, H, W, R). Any strides."""
    x, weight, bias, scale, shift = (t.contiguous() for t in (x, weight, bias, scale, shift))
    out = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype, device=x.device)
    if out.numel():
        expand_launch(x, weight, bias, scale, shift, out, channels, eps, device_limits(x.device)).run()
    return out


def depthwise_project(
    hidden: Tensor, taps: Tensor, bias: Tensor, weight: Tensor, out_bias: Tensor, shortcut: Tensor
) -> Tensor:
    """The step :class:`cmt_fast.inference.program.DepthwiseProject` of hidden (B, H, W, R) and the shortcut (B, H, W, C)
    -> (B, H, W, C). Any strides."""
    hidden, taps, bias = hidden.contiguous(), taps.contiguous(), bias.contiguous()
    weight, out_bias, shortcut = weight.contiguous(), out_bias.contiguous(), shortcut.contiguous()
    out = torch.empty_like(shortcut)
    if out.numel():
        limits = device_limits(hidden.device)
        for launch in depthwise_project_launches(hidden, taps, bias, weight, out_bias, shortcut, out, limits):
            launch.run()
    return out


def expand_launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    channels: int,
    eps: float,
    limits: DeviceLimits,
) -> Launch:
    """Arguments as of :func:`expand`, and out (B, H, W, R), all contiguous."""
    hidden, width = weight.shape
    rows = out.numel() // hidden
    config = expand_config(rows, width, hidden, x.element_size(), is_exact(x.dtype), limits)
    tiles, chunks = -(-rows // config.block_n), -(-hidden // config.block_r)
    splits = -(-chunks // config.chunks)
    norm_steps = -(-channels // min(config.block_c, 256))
    steps = (norm_steps, chunks / splits) if config.held else (norm_steps, -(-width // config.block_c))
    return Launch(
        kernel=expand_kernel,
        grid=(tiles * splits,),
        arguments=dict(x=x, weight=weight, bias=bias, scale=scale, shift=shift, out=out, rows=rows, eps=eps),
        constants=dict(
            C=width,
            CHANNELS=channels,
            R=hidden,
            EXACT=x.dtype == torch.float32,
            HELD=config.held,
            CHUNKS=config.chunks,
            BLOCK_N=config.block_n,
            BLOCK_C=config.block_c,
            BLOCK_REST=config.block_rest,
            BLOCK_R=config.block_r,
            PRECISION=precision_of(x.dtype),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        reads=sum(t.nbytes for t in (x, weight, bias, scale, shift)),
        writes=out.nbytes,
        flops=2 * rows * width * hidden,
        elements=out.numel(),
        loops=tuple(n for n in steps if n > 1),  # the compiler unrolls a loop of one
    )


def depthwise_project_launches(
    hidden: Tensor,
    taps: Tensor,
    bias: Tensor,
    weight: Tensor,
    out_bias: Tensor,
    shortcut: Tensor,
    out: Tensor,
    limits: DeviceLimits,
) -> list[Launch]:
    """One launch, or the two of :func:`project_config`. Arguments as of :func:`depthwise_project`, and out (B, H, W, C), all contiguous."""
    images, height, width, r = hidden.shape
    c = len(weight)
    config = project_config(images, height, width, c, r, hidden.element_size(), limits)
    if config is None:
        g = torch.empty_like(hidden)
        convolve = depthwise_gelu_launch(hidden, taps, bias, g, limits)
        return [convolve, linear_launch(g, weight, out_bias, shortcut, out, None, 0.0, limits)]
    inputs = dict(hidden=hidden, taps=taps, bias=bias, weight=weight, out_bias=out_bias, shortcut=shortcut)
    tiles = -(-_quads(hidden) // config.quads) * -(-c // (config.block_c + config.block_rest))
    steps = -(-r // config.block_r)
    return [
        Launch(
            kernel=depthwise_project_kernel,
            grid=(tiles,),
            arguments=dict(**inputs, out=out, images=images, height=height, width=width),
            constants=dict(
                C=c,
                R=r,
                EXACT=hidden.dtype == torch.float32,
                QUADS=config.quads,
                BLOCK_C=config.block_c,
                BLOCK_REST=config.block_rest,
                BLOCK_R=config.block_r,
                PRECISION=precision_of(hidden.dtype),
            ),
            num_warps=config.num_warps,
            num_stages=1,  # plain loads, which find their neighbours in L1: staged copies would fetch each of the 16 from L2
            reads=sum(t.nbytes for t in inputs.values()),
            writes=out.nbytes,
            flops=2 * out.numel() * r,
            elements=hidden.numel(),
            loops=(steps,) if steps > 1 else (),
        )
    ]


def depthwise_gelu_launch(hidden: Tensor, taps: Tensor, bias: Tensor, out: Tensor, limits: DeviceLimits) -> Launch:
    """out = GELU(depthwise 3x3 of hidden (B, H, W, R) + bias), all contiguous."""
    images, height, width, r = hidden.shape
    config = depthwise_config(images, height, width, r, limits)
    chunks = -(-r // config.block_r)
    splits = -(-chunks // config.chunks)
    return Launch(
        kernel=depthwise_gelu_kernel,
        grid=(-(-_quads(hidden) // config.quads) * splits,),
        arguments=dict(hidden=hidden, taps=taps, bias=bias, out=out, images=images, height=height, width=width),
        constants=dict(
            R=r,
            EXACT=hidden.dtype == torch.float32,
            CHUNKS=config.chunks,
            QUADS=config.quads,
            BLOCK_R=config.block_r,
        ),
        num_warps=config.num_warps,
        num_stages=1,
        reads=hidden.nbytes + taps.nbytes + bias.nbytes,
        writes=out.nbytes,
        flops=0,
        elements=hidden.numel(),
        loops=(chunks / splits,) if chunks > splits else (),
    )


def _quads(x: Tensor) -> int:
    """Squares of 2 x 2 pixels of a map (B, H, W, channels)."""
    images, height, width, _ = x.shape
    return images * -(-height // 2) * -(-width // 2)
