"""When the Triton kernel of the local perception unit with LayerNorm and reduction can run a call, and why it cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.reasons import call_reasons
from cmt_fast.ops.lpu.configs import tile_reasons


def lpu_reduce_reasons(x: Tensor, taps: Tensor, bias: Tensor, reduction: Tensor | None, k: int) -> list[str]:
    """Reasons against ``cmt_fast_triton::lpu_reduce``; an empty list if it can run."""
    reasons = call_reasons(x, taps, bias, reduction) + tile_reasons(x.shape, k)
    if any(t.dtype != torch.float32 for t in (taps, bias, reduction) if t is not None):
        reasons.append("taps, bias and reduction must be float32")
    return reasons
