"""Schemas and fake implementations of the kernels around the attention's core in training: all that tracing needs, nothing compiled.

How many partial sums there are follows from shapes alone (``reduce_configs.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.register import implement
from cmt_fast.ops.lmhsa.reduce_configs import reduce_config

torch.library.define(
    "cmt_fast_triton::norm_reduce",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float? eps, Tensor? taps, Tensor? bias, int k, ScalarType dtype, bool moments)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define("cmt_fast_triton::normalise", "(Tensor x, Tensor statistics) -> Tensor")
torch.library.define(
    "cmt_fast_triton::norm_reduce_backward",
    "(Tensor x, Tensor? grad, Tensor? query_grad, Tensor? reduced_grad, Tensor? reduced, Tensor? statistics, Tensor? sums,"
    " Tensor? norm_weight, Tensor? norm_bias, float? eps, Tensor? taps, int k, bool[3] needs) -> (Tensor, Tensor, Tensor)",
)
implement("norm_reduce", "cmt_fast.ops.lmhsa.triton_reduce_launch:norm_reduce")
implement("normalise", "cmt_fast.ops.lmhsa.triton_reduce_launch:normalise")
implement("norm_reduce_backward", "cmt_fast.ops.lmhsa.triton_reduce_launch:norm_reduce_backward")

norm_reduce_triton = torch.ops.cmt_fast_triton.norm_reduce.default
normalise_triton = torch.ops.cmt_fast_triton.normalise.default
norm_reduce_backward_triton = torch.ops.cmt_fast_triton.norm_reduce_backward.default


@torch.library.register_fake("cmt_fast_triton::norm_reduce")
def _(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    taps: Tensor | None,
    bias: Tensor | None,
    k: int,
    dtype: torch.dtype,
    moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise k x k with stride k of LN(x), and with ``moments`` what BatchNorm's statistics are merged of.

    x (B, H, W, C), any strides; norm_weight, norm_bias (C,) or None, eps None without a norm; taps (k * k, C), None for k = 1; bias (C,) or None.

    Returns:
        reduced (B, H // k, W // k, C) in ``dtype``; partials (P, 2, C) and counts (P,), float32, P = 0 without ``moments``. All contiguous.
    """
    b, h, w, c = x.shape
    programs = reduce_config(b * (h // k) * (w // k), c).programs if moments else 0
    partials = x.new_empty(programs, 2, c, dtype=torch.float32)
    return x.new_empty(b, h // k, w // k, c, dtype=dtype), partials, partials.new_empty(programs)


@torch.library.register_fake("cmt_fast_triton::normalise")
def _(x: Tensor, statistics: Tensor) -> Tensor:
    """BN(x) of x (..., C) by the statistics (6, C), in the dtype of x, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("cmt_fast_triton::norm_reduce_backward")
def _(
    x: Tensor,
    grad: Tensor | None,
    query_grad: Tensor | None,
    reduced_grad: Tensor | None,
    reduced: Tensor | None,
    statistics: Tensor | None,
    sums: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    taps: Tensor | None,
    k: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradients of y = LN(x) to that of x and those of the parameters on the way.

    x (B, H, W, C); grad, of the output, which the shortcut passes on, or None; query_grad, of y by way of the queries, both like x, the second None if only the taps' are needed;
    reduced_grad (B, H // k, W // k, C), of BatchNorm's output (k = 1: of y by way of keys and values), or None; reduced, its input,
    statistics (6, C) and sums (2, C), for k > 1; others as of ``norm_reduce``.

    Returns:
        Contiguous, each of no elements (first dimension 0) where ``needs`` has False: the gradients of x, in its dtype; of the norm's weight and bias
        (2, C), float32; of the taps and, in the last row, of the convolution's bias (k * k + 1, C), float32.
    """
    b, h, w, c = x.shape
    return (
        x.new_empty(b if needs[0] else 0, h, w, c),
        x.new_empty(2 if needs[1] else 0, c, dtype=torch.float32),
        x.new_empty(k * k + 1 if needs[2] else 0, c, dtype=torch.float32),
    )
