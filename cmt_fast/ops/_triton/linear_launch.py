"""Launching a linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.linear import linear_kernel
from cmt_fast.ops._triton.products import is_exact, precision_of
from cmt_fast.ops._triton.tiling import LEAST_BLOCK, around, block, neighbours
from cmt_fast.ops._triton.tunable import tunable

#: Sums that a thread holds: twice as many were compiled, and spill.
_SUMS = 128


@dataclass(frozen=True)
class LinearConfig:
    """How :func:`linear_kernel` is launched: rows, inputs and outputs of a tile, warps, stages of the loop over inputs."""

    block_n: int
    block_c: int
    block_out: int
    num_warps: int
    num_stages: int


def linear_candidates(
    rule: LinearConfig, rows: int, width: int, out: int, itemsize: int, exact: bool, limits: DeviceLimits
) -> Iterator[LinearConfig]:
    """Other tiles that fit into shared memory; arguments as of :func:`linear_config`."""
    for config in neighbours(
        rule,
        block_n=around(rule.block_n, LEAST_BLOCK, 256),
        block_out=around(rule.block_out, LEAST_BLOCK, 256),
        num_warps=(4, 8),
        num_stages=(2, 3, 4),
    ):
        stage = (config.block_n + config.block_out) * config.block_c * itemsize
        sums = config.block_n * config.block_out / (32 * config.num_warps)
        if config.num_stages * stage <= limits.shared_memory and sums <= _SUMS:
            yield config


@tunable("cmt_fast.ops._triton.linear:linear_kernel", linear_candidates)
def linear_config(rows: int, width: int, out: int, itemsize: int, exact: bool, limits: DeviceLimits) -> LinearConfig:
    """For :func:`linear_kernel`: small enough tiles for every architecture, smaller where the grid would not fill the device."""
    most = 64 if exact else 128
    block_n, block_out = min(most, block(rows)), min(most, block(out))
    while -(-rows // block_n) * -(-out // block_out) < limits.multiprocessors and max(block_n, block_out) > 32:
        if block_n >= block_out:
            block_n //= 2
        else:
            block_out //= 2
    num_warps = 8 if exact or block_n * block_out > 8192 else 4
    return LinearConfig(block_n, min(block(width), 128 // itemsize), block_out, num_warps, num_stages=3)


def linear_launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shortcut: Tensor | None,
    out: Tensor,
    channels: int | None,
    eps: float,
    limits: DeviceLimits,
) -> Launch:
    """out = LN(x) weight^T + bias (+ shortcut), without the LayerNorm if ``channels``, which it counts, is None.

    x (rows, C), weight (out, C), bias (out,), shortcut (rows, out) or None, out (rows, out), all contiguous; rows may be several dimensions.
    """
    width_out, width = weight.shape
    rows = out.numel() // width_out
    config = linear_config(rows, width, width_out, x.element_size(), is_exact(x.dtype), limits)
    steps = -(-width // config.block_c)
    norm_steps = () if channels is None else (-(-channels // config.block_c),)
    return Launch(
        kernel=linear_kernel,
        grid=(-(-rows // config.block_n) * -(-width_out // config.block_out),),
        arguments=dict(x=x, weight=weight, bias=bias, shortcut=shortcut, out=out, rows=rows, eps=eps),
        constants=dict(
            C=width,
            CHANNELS=width if channels is None else channels,
            OUT=width_out,
            NORM=channels is not None,
            BLOCK_N=config.block_n,
            BLOCK_C=config.block_c,
            BLOCK_OUT=config.block_out,
            PRECISION=precision_of(x.dtype),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        reads=sum(t.nbytes for t in (x, weight, bias, shortcut) if t is not None),
        writes=out.nbytes,
        flops=2 * rows * width * width_out,
        elements=out.numel(),
        loops=tuple(n for n in (*norm_steps, steps) if n > 1),  # the compiler unrolls a loop of one
    )
