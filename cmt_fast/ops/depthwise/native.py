"""When the compiled depthwise convolution can run a call, and why it cannot."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from cmt_fast import _native

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
    return reasons + _tracing_reasons()


def _tracing_reasons() -> list[str]:
    """Reasons of what watches or transforms the call: it must see PyTorch's own operations."""
    # The flag behind torch.compiler.is_exporting(), which torch.compile takes for always true before torch 2.13.
    exporting = torch.compiler._is_exporting_flag
    eager = not torch.compiler.is_compiling()  # torch.compile has a dispatch mode of its own while it traces
    reasons = []
    if exporting or torch.jit.is_tracing():
        reasons.append("the model is being exported, and must not depend on the compiled library")
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        reasons.append("a torch.func transform or forward-mode differentiation is active, which needs plain PyTorch")
    if eager and torch._C._len_torch_dispatch_stack() > 0:
        reasons.append("a torch dispatch mode is active (a FLOP counter, fake tensors), which must see plain PyTorch")
    return reasons
