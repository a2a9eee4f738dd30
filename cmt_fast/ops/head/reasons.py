"""When the Triton kernels of the head can run a packed step, and why they cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.reasons import call_reasons


def head_reasons(x: Tensor, weights: tuple[Tensor | None, ...], biases: tuple[Tensor | None, ...]) -> list[str]:
    """Reasons against ``cmt_fast_triton::head_features`` and ``head_linear``; an empty list if both can run."""
    reasons = call_reasons(x, *weights, *biases)
    if any(t.dtype != x.dtype for t in weights if t is not None):
        reasons.append(f"the weights must have the dtype of the map, {x.dtype}")
    if any(t.dtype != torch.float32 for t in biases if t is not None):
        reasons.append("biases must be float32")
    return reasons
