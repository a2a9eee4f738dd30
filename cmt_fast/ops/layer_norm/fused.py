"""LayerNorm of a module by the Triton kernels, in training and wherever else: when they can run, and their call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmt_fast.ops._triton.reasons import call_reasons
from cmt_fast.ops.autocast import norm_dtype
from cmt_fast.ops.checks import not_plain
from cmt_fast.ops.layer_norm.autograd import LayerNormFunction
from cmt_fast.ops.lmhsa.reduce_configs import MAX_CHANNELS
from cmt_fast.ops.parts import dtype_reasons


def layer_norm_reasons(x: Tensor, norm: nn.Module) -> list[str]:
    """Reasons why the kernels cannot do what ``norm`` does to x (..., C); an empty list if they can."""
    reasons = not_plain("norm", norm, nn.LayerNorm)
    if reasons:
        return reasons
    assert isinstance(norm, nn.LayerNorm)
    c = x.shape[-1]
    if tuple(norm.normalized_shape) != (c,) or norm.eps <= 0:
        reasons.append(f"norm must be LayerNorm({c}) with a positive eps, got {norm}")
    if c > MAX_CHANNELS:
        reasons.append(f"x must have at most {MAX_CHANNELS} channels, got {c}")
    if 0 in x.shape:
        reasons.append(f"x must hold something, got {tuple(x.shape)}")
    norms = list(norm.parameters())
    return reasons + call_reasons(x, *norms, gradients=True, autocast=True) + dtype_reasons(x, weights=(), norms=norms)


def layer_norm_fused(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype | None) -> Tensor:
    """What :func:`layer_norm` does, by the kernels; nothing may speak against it (:func:`layer_norm_reasons`)."""
    return LayerNormFunction.apply(x, norm.weight, norm.bias, norm.eps, dtype or norm_dtype(x))
