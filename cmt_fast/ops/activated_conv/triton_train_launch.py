"""Launching the training kernels around the convolution.

Maps are contiguous (B, H, W, C) in one dtype; statistics (6, C) and sums (2, C) are float32: see ``ops/batch_norm/schema.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.statistics import add_partials
from cmt_fast.ops.activated_conv.train_configs import NUM_WARPS, row_tiles, tile_blocks
from cmt_fast.ops.activated_conv.triton_train_kernels import (
    activation_gradient_kernel,
    activation_moments_kernel,
    activation_norm_kernel,
)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Moments (P, 2, C) and counts (P,) of the tiles of GELU(x)."""
    x = x.contiguous()
    partials = new_partials(x)
    counts = partials.new_empty(len(partials))
    moments_launch(x, partials, counts).run()
    return partials, counts


def normalise(x: Tensor, n: Tensor) -> Tensor:
    """t = BatchNorm(GELU(x)), in the dtype of x."""
    x = x.contiguous()
    t = torch.empty_like(x)
    norm_launch(x, n, None, t, None).run()
    return t


def sums(grad: Tensor, x: Tensor, n: Tensor, normalised: bool) -> tuple[Tensor, Tensor]:
    """The sums (2, C) of BatchNorm's gradient, of the gradient of t; and t, or no image of it."""
    grad, x = grad.contiguous(), x.contiguous()
    t, partials = x.new_empty(len(x) if normalised else 0, *x.shape[1:]), new_partials(x)
    norm_launch(x, n, grad, t if normalised else None, partials).run()
    return add_partials(partials), t


def gradient(grad: Tensor, x: Tensor, n: Tensor, sums: Tensor | None) -> Tensor:
    """The gradient of x from that of t."""
    grad, x = grad.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    gradient_launch(grad, x, n, sums, dx).run()
    return dx


def moments_launch(x: Tensor, partials: Tensor, counts: Tensor) -> Launch:
    return _launch(activation_moments_kernel, x, dict(x=x), dict(partials=partials, counts=counts))


def norm_launch(x: Tensor, n: Tensor, grad: Tensor | None, t: Tensor | None, partials: Tensor | None) -> Launch:
    return _launch(activation_norm_kernel, x, dict(x=x, n=n, grad=grad), dict(t=t, partials=partials))


def gradient_launch(grad: Tensor, x: Tensor, n: Tensor, sums: Tensor | None, dx: Tensor) -> Launch:
    return _launch(activation_gradient_kernel, x, dict(grad=grad, x=x, n=n, sums=sums), dict(dx=dx))


def new_partials(x: Tensor) -> Tensor:
    """Memory for two numbers a channel of each tile of x."""
    c = x.shape[3]
    return x.new_empty(row_tiles(x.numel() // c, c), 2, c, dtype=torch.float32)


def _launch(kernel: Any, x: Tensor, reads: Mapping[str, Tensor | None], writes: Mapping[str, Tensor | None]) -> Launch:
    """A kernel on tiles of maps like x."""
    c = x.shape[3]
    rows = x.numel() // c
    block_n, block_c = tile_blocks(c)
    return Launch(
        kernel=kernel,
        grid=(row_tiles(rows, c) * -(-c // block_c),),
        arguments={**reads, **writes, "rows": rows},
        constants=dict(C=c, EXACT=x.dtype == torch.float32, BLOCK_N=block_n, BLOCK_C=block_c),
        num_warps=NUM_WARPS,
        num_stages=1,
        reads=sum(t.nbytes for t in reads.values() if t is not None),
        writes=sum(t.nbytes for t in writes.values() if t is not None),
        flops=0,
        elements=x.numel(),
    )
