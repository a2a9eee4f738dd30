"""Schemas and fake implementations of the kernels around the convolution: all that tracing needs, nothing compiled.

x, t, grad (B, H, W, C), any strides; statistics n (6, C) and sums of BatchNorm's gradient (2, C), float32, as in ``ops/batch_norm/schema.py``.
What is returned is contiguous. t = BatchNorm(GELU(x)); formulas: docs/math.md, section 8, with t for BN1(a1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.register import implement
from cmt_fast.ops.activated_conv.train_configs import row_tiles

_SCHEMAS = {
    "moments": "(Tensor x) -> (Tensor, Tensor)",
    "normalise": "(Tensor x, Tensor n) -> Tensor",
    "sums": "(Tensor grad, Tensor x, Tensor n, bool normalised) -> (Tensor, Tensor)",
    "gradient": "(Tensor grad, Tensor x, Tensor n, Tensor? sums) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"cmt_fast_triton::activated_conv_{_name}", _schema)
    implement(f"activated_conv_{_name}", f"cmt_fast.ops.activated_conv.triton_train_launch:{_name}")

_ops = torch.ops.cmt_fast_triton
moments = _ops.activated_conv_moments.default
normalise = _ops.activated_conv_normalise.default
sums = _ops.activated_conv_sums.default
gradient = _ops.activated_conv_gradient.default


@torch.library.register_fake("cmt_fast_triton::activated_conv_moments")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    """Moments (P, 2, C) and counts (P,), float32, of the tiles of GELU(x)."""
    c = x.shape[3]
    partials = x.new_empty(row_tiles(x.shape[0] * x.shape[1] * x.shape[2], c), 2, c, dtype=torch.float32)
    return partials, partials.new_empty(partials.shape[0])


@torch.library.register_fake("cmt_fast_triton::activated_conv_normalise")
def _(x: Tensor, n: Tensor) -> Tensor:
    """t, in the dtype of x."""
    return x.new_empty(x.shape)


@torch.library.register_fake("cmt_fast_triton::activated_conv_sums")
def _(grad: Tensor, x: Tensor, n: Tensor, normalised: bool) -> tuple[Tensor, Tensor]:
    """The sums (2, C) of BatchNorm's gradient, of the gradient of t; and t, or no image of it without ``normalised``."""
    return n.new_empty(2, x.shape[3]), x.new_empty(x.shape[0] if normalised else 0, *x.shape[1:])


@torch.library.register_fake("cmt_fast_triton::activated_conv_gradient")
def _(grad: Tensor, x: Tensor, n: Tensor, sums: Tensor | None) -> Tensor:
    """The gradient of x from that of t; sums None where the statistics are frozen."""
    return x.new_empty(x.shape)
