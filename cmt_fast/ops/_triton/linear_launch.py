"""Launching a linear layer."""

from __future__ import annotations

from torch import Tensor

from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.linear import linear_kernel
from cmt_fast.ops._triton.linear_config import linear_config
from cmt_fast.ops._triton.products import is_exact, precision_of


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
