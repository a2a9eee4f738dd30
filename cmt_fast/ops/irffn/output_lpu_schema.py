"""Schemas and fake implementations of the end of an IRFFN with the LPU of the block after it: all that tracing needs, nothing compiled.

y, shortcut, lpu, grad, dout (B, H, W, C), statistics n3 (6, C) float32 as in ``ops/batch_norm/schema.py``, factor (B,), weight (C, 1, 3, 3), bias (C,). Of maps
and the weight any strides; what is returned is contiguous. Formulas: docs/math.md, section 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.register import implement

_SCHEMAS = {
    "output_lpu": "(Tensor y, Tensor n3, Tensor? factor, Tensor shortcut, Tensor weight, Tensor? bias) -> Tensor",
    "output_lpu_gradient": "(Tensor grad, Tensor y, Tensor n3, Tensor? factor, Tensor shortcut, Tensor weight, bool need_out,"
    " bool need_weight, bool need_bias) -> (Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"cmt_fast_triton::irffn_{_name}", _schema)
    implement(f"irffn_{_name}", f"cmt_fast.ops.irffn.triton_output_lpu_launch:{_name}")

output_lpu = torch.ops.cmt_fast_triton.irffn_output_lpu.default
output_lpu_gradient = torch.ops.cmt_fast_triton.irffn_output_lpu_gradient.default


@torch.library.register_fake("cmt_fast_triton::irffn_output_lpu")
def _(y: Tensor, n3: Tensor, factor: Tensor | None, shortcut: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """out + its depthwise 3x3 + bias, where out = shortcut + factor * BN3(y); in the wider dtype of y and shortcut, as out is."""
    return y.new_empty(y.shape, dtype=torch.promote_types(y.dtype, shortcut.dtype))


@torch.library.register_fake("cmt_fast_triton::irffn_output_lpu_gradient")
def _(
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
    """The gradient dout of out, and ((2 + 9 + 1) C,) float32: the sums (2, C) of BN3's gradient, the gradients of weight (C, 9) and bias (C,). What is not
    needed is missing: with dout, which has no image then, those sums."""
    images, height, width, c = y.shape
    dout = grad.new_empty(images if need_out else 0, height, width, c)
    return dout, n3.new_empty((2 * need_out + 9 * need_weight + need_bias) * c)
