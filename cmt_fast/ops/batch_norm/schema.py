"""Schemas and fake implementations of what lies between two kernels of a BatchNorm: all that tracing needs, nothing compiled.

The statistics (6, C) float32 hold mean, unbiased variance, 1 / sqrt(variance + eps), scale, bias, and the share 1 / n of a pixel: see
``ops/_triton/batch_norm.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.register import implement

torch.library.define("cmt_fast_triton::merge_moments", "(Tensor partials, Tensor counts) -> (Tensor, Tensor)")
torch.library.define(
    "cmt_fast_triton::batch_norm_statistics",
    "(Tensor partials, Tensor counts, Tensor? weight, Tensor? bias, float eps) -> Tensor",
)
torch.library.define(
    "cmt_fast_triton::batch_norm_gradient_sums", "(Tensor grad, Tensor x, Tensor statistics) -> Tensor"
)
torch.library.define("cmt_fast_triton::add_partials", "(Tensor partials) -> Tensor")
implement("merge_moments", "cmt_fast.ops._triton.statistics:merge_moments")
implement("batch_norm_statistics", "cmt_fast.ops._triton.statistics:batch_norm_statistics")
implement("batch_norm_gradient_sums", "cmt_fast.ops._triton.statistics:gradient_sums")
implement("add_partials", "cmt_fast.ops._triton.statistics:add_partials")

merge_moments_triton = torch.ops.cmt_fast_triton.merge_moments.default
batch_norm_statistics_triton = torch.ops.cmt_fast_triton.batch_norm_statistics.default
batch_norm_gradient_sums_triton = torch.ops.cmt_fast_triton.batch_norm_gradient_sums.default
add_partials_triton = torch.ops.cmt_fast_triton.add_partials.default


@torch.library.register_fake("cmt_fast_triton::merge_moments")
def _(partials: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Moments (P, 2, C) float32: mean and sum of squared distances from it, of counts (P,) float32 values -> (1, 2, C), (1,)."""
    return partials.new_empty(1, *partials.shape[1:]), counts.new_empty(1)


@torch.library.register_fake("cmt_fast_triton::batch_norm_statistics")
def _(partials: Tensor, counts: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Moments (P, 2, C), counts (P,), weight and bias (C,) -> the statistics (6, C) of everything."""
    return partials.new_empty(6, partials.shape[2])


@torch.library.register_fake("cmt_fast_triton::batch_norm_gradient_sums")
def _(grad: Tensor, x: Tensor, statistics: Tensor) -> Tensor:
    """The gradient of the output and the input, (..., C) -> (2, C) float32: the gradients of bias and weight."""
    return statistics.new_empty(2, x.shape[-1])


@torch.library.register_fake("cmt_fast_triton::add_partials")
def _(partials: Tensor) -> Tensor:
    """(P, ...) float32 -> (...): the sum over the first dimension, in its order."""
    return partials.new_empty(partials.shape[1:])
