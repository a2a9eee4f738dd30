"""When the Triton kernels of the IRFFN can run a packed step, and why they cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.reasons import call_reasons
from cmt_fast.ops.irffn.configs import map_reasons


def expand_reasons(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> list[str]:
    """Reasons against ``cmt_fast_triton::expand``; an empty list if it can run."""
    vectors = (bias, scale, shift)
    return call_reasons(x, weight, *vectors) + _dtype_reasons(x, (weight,), vectors)


def depthwise_project_reasons(
    hidden: Tensor, taps: Tensor, bias: Tensor, weight: Tensor, out_bias: Tensor, shortcut: Tensor
) -> list[str]:
    """Reasons against ``cmt_fast_triton::depthwise_project``; an empty list if it can run."""
    vectors = (taps, bias, out_bias)
    reasons = call_reasons(hidden, weight, shortcut, *vectors) + _dtype_reasons(hidden, (weight, shortcut), vectors)
    return reasons + map_reasons(hidden.shape[1], hidden.shape[2], max(weight.shape))


def _dtype_reasons(x: Tensor, others: tuple[Tensor, ...], vectors: tuple[Tensor, ...]) -> list[str]:
    reasons = []
    if any(t.dtype != x.dtype for t in others):
        reasons.append(f"weight and shortcut must have the dtype of the map, {x.dtype}")
    if any(t.dtype != torch.float32 for t in vectors):
        reasons.append("taps, biases, scale and shift must be float32")
    return reasons
