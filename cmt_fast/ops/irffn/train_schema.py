"""Schemas and fake implementations of the IRFFN's training kernels: all that tracing needs, nothing compiled.

x, out, grad (B, H, W, C), h, u, dt, du (B, H, W, R), y, dy (B, H, W, C); statistics n1, n2 (6, R), n3 (6, C) and sums of BatchNorm's gradients
s1, s2 (2, R), s3 (2, C), float32, as in ``ops/batch_norm/schema.py``. Of maps and weights any strides; what is returned is contiguous. With
``moments`` a map comes with its tiles' moments, (P, 2, channels) and (P,), else with those of no tile. Formulas: docs/math.md, section 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.register import implement
from cmt_fast.ops.irffn.train_configs import product_programs, strip_programs

_SCHEMAS = {
    "expand": "(Tensor x, Tensor weight, Tensor bias, float eps, bool moments) -> (Tensor, Tensor, Tensor)",
    "dw": "(Tensor h, Tensor n1, Tensor weight, Tensor? bias, bool moments) -> (Tensor, Tensor, Tensor)",
    "project": "(Tensor u, Tensor n2, Tensor weight, Tensor? bias, bool moments) -> (Tensor, Tensor, Tensor)",
    "output": "(Tensor y, Tensor n3, Tensor? factor, Tensor? shortcut) -> Tensor",
    "output_sums": "(Tensor grad, Tensor y, Tensor n3, Tensor? factor) -> Tensor",
    "output_gradient": "(Tensor grad, Tensor y, Tensor n3, Tensor s3, Tensor? factor) -> Tensor",
    "project_weight": "(Tensor grad, Tensor y, Tensor n3, Tensor s3, Tensor? factor, Tensor u, Tensor n2, Tensor weight,"
    " Tensor? gamma, Tensor? beta) -> (Tensor, Tensor, Tensor, Tensor)",
    "project_input": "(Tensor dy, Tensor weight, Tensor u, Tensor n2, Tensor? s2) -> Tensor",
    "dw_gradient": "(Tensor du, Tensor h, Tensor n1, Tensor weight) -> (Tensor, Tensor)",
    "expand_input": "(Tensor dt, Tensor h, Tensor n1, Tensor s1, Tensor weight, Tensor x, Tensor? shortcut, float eps)"
    " -> (Tensor, Tensor)",
    "expand_weight": "(Tensor dt, Tensor h, Tensor n1, Tensor s1, Tensor x, Tensor moments, Tensor weight, Tensor? gamma,"
    " Tensor? beta) -> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"cmt_fast_triton::irffn_{_name}", _schema)
    implement(f"irffn_{_name}", f"cmt_fast.ops.irffn.triton_train_launch:{_name}")

_ops = torch.ops.cmt_fast_triton
expand = _ops.irffn_expand.default
dw = _ops.irffn_dw.default
project = _ops.irffn_project.default
output = _ops.irffn_output.default
output_sums = _ops.irffn_output_sums.default
output_gradient = _ops.irffn_output_gradient.default
project_weight = _ops.irffn_project_weight.default
project_input = _ops.irffn_project_input.default
dw_gradient = _ops.irffn_dw_gradient.default
expand_input = _ops.irffn_expand_input.default
expand_weight = _ops.irffn_expand_weight.default


@torch.library.register_fake("cmt_fast_triton::irffn_expand")
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, moments: bool) -> tuple[Tensor, Tensor, Tensor]:
    """h = LayerNorm(x) weight^T + bias in the dtype of weight (R, C), LayerNorm's affine in weight and bias (R,) float32; moments of GELU(h)."""
    r, c = weight.shape
    h = x.new_empty(*x.shape[:3], r, dtype=weight.dtype)
    return h, *_moments(h, product_programs(h.numel() // r, c, r, weight.dtype, expands=True), moments)


@torch.library.register_fake("cmt_fast_triton::irffn_dw")
def _(h: Tensor, n1: Tensor, weight: Tensor, bias: Tensor | None, moments: bool) -> tuple[Tensor, Tensor, Tensor]:
    """u = t + its depthwise 3x3, t = BN1(GELU(h)), weight (R, 1, 3, 3), bias (R,); moments of GELU(u)."""
    u = torch.empty_like(h, memory_format=torch.contiguous_format)
    return u, *_moments(u, strip_programs(*h.shape), moments)


@torch.library.register_fake("cmt_fast_triton::irffn_project")
def _(u: Tensor, n2: Tensor, weight: Tensor, bias: Tensor | None, moments: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y = BN2(GELU(u)) weight^T + bias, weight (C, R) in the dtype of u, bias (C,); moments of y."""
    c, r = weight.shape
    y = u.new_empty(*u.shape[:3], c)
    return y, *_moments(y, product_programs(y.numel() // c, r, c, weight.dtype), moments)


@torch.library.register_fake("cmt_fast_triton::irffn_output")
def _(y: Tensor, n3: Tensor, factor: Tensor | None, shortcut: Tensor | None) -> Tensor:
    """shortcut + factor * BN3(y), factor (B,), shortcut (B, H, W, C); in the wider dtype of y and shortcut."""
    dtype = y.dtype if shortcut is None else torch.promote_types(y.dtype, shortcut.dtype)
    return y.new_empty(y.shape, dtype=dtype)


@torch.library.register_fake("cmt_fast_triton::irffn_output_sums")
def _(grad: Tensor, y: Tensor, n3: Tensor, factor: Tensor | None) -> Tensor:
    """The sums (2, C) of BN3's gradient, grad being that of ``output``."""
    return n3.new_empty(2, y.shape[3])


@torch.library.register_fake("cmt_fast_triton::irffn_output_gradient")
def _(grad: Tensor, y: Tensor, n3: Tensor, s3: Tensor, factor: Tensor | None) -> Tensor:
    """The gradient dy of y, grad being that of ``output``."""
    return y.new_empty(y.shape)


@torch.library.register_fake("cmt_fast_triton::irffn_project_weight")
def _(
    grad: Tensor,
    y: Tensor,
    n3: Tensor,
    s3: Tensor,
    factor: Tensor | None,
    u: Tensor,
    n2: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy, as ``output_gradient`` makes it; gradients of weight (C, R) and bias (C,) in the dtype of weight, and the sums (2, R) of BN2's
    gradient; gamma, beta (R,) are BN2's."""
    return y.new_empty(y.shape), *_weight_gradient(n2, weight)


@torch.library.register_fake("cmt_fast_triton::irffn_project_input")
def _(dy: Tensor, weight: Tensor, u: Tensor, n2: Tensor, s2: Tensor | None) -> Tensor:
    """The gradient du of u, weight (C, R) being in its dtype; s2 None where BN2's statistics are frozen."""
    return u.new_empty(u.shape)


@torch.library.register_fake("cmt_fast_triton::irffn_dw_gradient")
def _(du: Tensor, h: Tensor, n1: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient dt of BN1's output; (12 R,): the sums (2, R) of BN1's gradient, the gradients of the bias (R,) and of the taps (R, 9)."""
    return h.new_empty(h.shape), n1.new_empty(12 * h.shape[3])


@torch.library.register_fake("cmt_fast_triton::irffn_expand_input")
def _(
    dt: Tensor, h: Tensor, n1: Tensor, s1: Tensor, weight: Tensor, x: Tensor, shortcut: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradient of x, plus ``shortcut``, the one that passes by; and LayerNorm's moments (pixels, 2). weight as ``expand`` takes it."""
    b, height, width, _ = x.shape
    return x.new_empty(x.shape), n1.new_empty(b * height * width, 2)


@torch.library.register_fake("cmt_fast_triton::irffn_expand_weight")
def _(
    dt: Tensor,
    h: Tensor,
    n1: Tensor,
    s1: Tensor,
    x: Tensor,
    moments: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight (R, C) and bias (R,), and of LayerNorm's bias and weight, (2, C); weight, gamma and beta (C,) are the parameters."""
    return _weight_gradient(n1, weight)


def _moments(map_: Tensor, programs: int, wanted: bool) -> tuple[Tensor, Tensor]:
    programs = programs if wanted else 0
    return (
        map_.new_empty(programs, 2, map_.shape[3], dtype=torch.float32),
        map_.new_empty(programs, dtype=torch.float32),
    )


def _weight_gradient(statistics: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out, in_ = weight.shape
    return weight.new_empty(out, in_), weight.new_empty(out), statistics.new_empty(2, in_)
