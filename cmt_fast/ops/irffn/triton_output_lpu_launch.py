"""Launching the kernels of the end of an IRFFN with the LPU of the block after it; tensors as in ``output_lpu_schema.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.statistics import add_partials
from cmt_fast.ops._triton.strips import strip_programs
from cmt_fast.ops.depthwise.configs import WARPS, conv3x3_backward_config
from cmt_fast.ops.irffn.triton_output_lpu_kernels import output_lpu_gradient_kernel, output_lpu_kernel


def output_lpu(
    y: Tensor, n3: Tensor, factor: Tensor | None, shortcut: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """out + its depthwise 3x3 by weight + bias, where out = shortcut + factor * BatchNorm(y)."""
    y, shortcut, weight = y.contiguous(), shortcut.contiguous(), weight.contiguous()
    lpu = torch.empty_like(y, dtype=torch.promote_types(y.dtype, shortcut.dtype))
    output_lpu_launch(y, n3, factor, shortcut, weight, bias, lpu).run()
    return lpu


def output_lpu_gradient(
    grad: Tensor,
    y: Tensor,
    n3: Tensor,
    factor: Tensor | None,
    shortcut: Tensor,
    weight: Tensor,
    need_out: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of out, and those of BN3's affine part and of the LPU's parameters; at least one must be needed."""
    grad, y, shortcut, weight = grad.contiguous(), y.contiguous(), shortcut.contiguous(), weight.contiguous()
    dout = torch.empty_like(grad) if need_out else None
    launch = output_lpu_gradient_launch(grad, y, n3, factor, shortcut, weight, dout, need_weight, need_bias)
    launch.run()
    sums = add_partials(launch.arguments["partials"])  # type: ignore[arg-type]
    return grad.new_empty(0, *grad.shape[1:]) if dout is None else dout, sums


def output_lpu_launch(
    y: Tensor, n3: Tensor, factor: Tensor | None, shortcut: Tensor, weight: Tensor, bias: Tensor | None, lpu: Tensor
) -> Launch:
    """All maps contiguous."""
    reads = dict(y=y, n3=n3, factor=factor, shortcut=shortcut, weight=weight, bias=bias)
    return _launch(output_lpu_kernel, y, reads, dict(lpu=lpu))


def output_lpu_gradient_launch(
    grad: Tensor,
    y: Tensor,
    n3: Tensor,
    factor: Tensor | None,
    shortcut: Tensor,
    weight: Tensor,
    dout: Tensor | None,
    need_weight: bool,
    need_bias: bool,
) -> Launch:
    """All maps contiguous, dout None if not needed; new partial sums."""
    sums = (2 * (dout is not None) + 9 * need_weight + need_bias) * y.shape[3]
    reads = dict(grad=grad, y=y, n3=n3, factor=factor, shortcut=shortcut if need_weight else None, weight=weight)
    writes = dict(dout=dout, partials=y.new_empty(_programs(y), sums, dtype=torch.float32))
    return _launch(output_lpu_gradient_kernel, y, reads, writes, WEIGHT=need_weight, BIAS=need_bias)


def _programs(y: Tensor) -> int:
    """How many strips there are for each tile of channels of maps like y (B, H, W, C), each with sums of its own."""
    images, height, width, c = y.shape
    config = conv3x3_backward_config(images, height, width, c)
    return strip_programs(images, height, width, config.rows, config.pairs)


def _launch(
    kernel: Any,
    y: Tensor,
    reads: Mapping[str, Tensor | None],
    writes: Mapping[str, Tensor | None],
    **constants: bool,
) -> Launch:
    """A kernel that slides down maps like y, cut as the LPU's own gradients are."""
    images, height, width, c = y.shape
    config = conv3x3_backward_config(images, height, width, c)
    return Launch(
        kernel=kernel,
        grid=(_programs(y) * -(-c // config.block_c),),
        arguments={**reads, **writes, "images": images, "height": height, "width": width},
        constants=dict(
            C=c,
            **constants,
            SPLIT=bool(width % 2),
            ROWS=config.rows,
            PAIRS=config.pairs,
            BLOCK_C=config.block_c,
        ),
        num_warps=WARPS,
        num_stages=1,  # as in ``conv3x3_launch``
        reads=sum(t.nbytes for t in reads.values() if t is not None),
        writes=sum(t.nbytes for t in writes.values() if t is not None),
        flops=0,
        elements=y.numel(),
        loops=(height / -(-height // config.rows),),
    )
