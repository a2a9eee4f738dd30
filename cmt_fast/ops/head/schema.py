"""Schemas and fake implementations of the head's kernels: all that tracing needs, nothing compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.register import implement

torch.library.define("cmt_fast_triton::head_features", "(Tensor x, Tensor weight, Tensor bias, bool pool) -> Tensor")
torch.library.define("cmt_fast_triton::head_linear", "(Tensor x, Tensor weight, Tensor bias) -> Tensor")
implement("head_features", "cmt_fast.ops.head.triton_launch:head_features")
implement("head_linear", "cmt_fast.ops.head.triton_launch:head_linear")

head_features_triton = torch.ops.cmt_fast_triton.head_features.default
head_linear_triton = torch.ops.cmt_fast_triton.head_linear.default


@torch.library.register_fake("cmt_fast_triton::head_features")
def _(x: Tensor, weight: Tensor, bias: Tensor, pool: bool) -> Tensor:
    """swish(x weight^T + bias): x (B, H, W, C), any strides; weight (F, C), bias (F,) -> (B, H, W, F), with ``pool`` its mean (B, F)."""
    b, h, w, _ = x.shape
    return x.new_empty((b, weight.shape[0]) if pool else (b, h, w, weight.shape[0]))


@torch.library.register_fake("cmt_fast_triton::head_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weight^T + bias: x (..., F), any strides; weight (classes, F), bias (classes,) -> (..., classes)."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])
