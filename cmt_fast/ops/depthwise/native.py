"""When the compiled depthwise convolution can run a call, and why it cannot."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmt_fast import _native
from cmt_fast.ops.tracing import tracing_reasons

#: Element types that csrc/cpu/depthwise.cpp has loops for.
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def native_reasons(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    """Reasons why the compiled library cannot run this call; an empty list if it can."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    reasons = _native.reasons()
    if any(t.device.type != "cpu" for t in tensors):
        reasons.append(f"the compiled library runs on the CPU only, got {', '.join(str(t.device) for t in tensors)}")
    if x.dtype not in DTYPES:
        reasons.append(f"dtype must be float32, float64 or bfloat16, got {x.dtype}")
    if any(t.dtype != x.dtype for t in tensors):
        reasons.append(f"x, weight and bias must have one dtype, got {', '.join(str(t.dtype) for t in tensors)}")
    if any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
        reasons.append(f"tensor subclasses need plain PyTorch, got {', '.join(type(t).__name__ for t in tensors)}")
    if torch.is_autocast_enabled("cpu"):
        reasons.append("autocast is on, and chooses dtypes by PyTorch's own operations")
    return reasons + tracing_reasons()
