"""When the Triton kernel of the local perception unit can run a call, and why it cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.reasons import call_reasons
from cmt_fast.ops.lpu.configs import tile_reasons


def lpu_reasons(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    """Reasons against ``cmt_fast_triton::lpu``; an empty list if it can run."""
    reasons = call_reasons(x, weight, bias) + tile_reasons(x.shape, 1, norm=False)
    if any(t.dtype != x.dtype for t in (weight, bias) if t is not None):
        reasons.append("x, weight and bias must have one dtype")
    return reasons


def lpu_reduce_reasons(x: Tensor, taps: Tensor, bias: Tensor, reduction: Tensor | None, k: int) -> list[str]:
    """Reasons against ``cmt_fast_triton::lpu_reduce``; an empty list if it can run."""
    reasons = call_reasons(x, taps, bias, reduction) + tile_reasons(x.shape, k, norm=True)
    if any(t.dtype != torch.float32 for t in (taps, bias, reduction) if t is not None):
        reasons.append("taps, bias and reduction must be float32")
    return reasons
