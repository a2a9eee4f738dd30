"""Why no Triton kernel can run a call, whatever the operation; each operation adds what its own kernels need."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmt_fast.backend import interpreting, machine_reasons
from cmt_fast.ops._triton.launch import records
from cmt_fast.ops.tracing import tracing_reasons

#: Of the stream. Sums, statistics and softmax are float32 in all of them.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def device_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Reasons against every kernel on ``device`` with a stream of ``dtype``; an empty list if there are none."""
    if not _takes(device):
        return [f"Triton kernels run on CUDA tensors, got {device.type}"]
    reasons = [] if device.type == "meta" else machine_reasons("triton")
    if device.type == "cuda" and not reasons and torch.cuda.get_device_capability(device) < (8, 0):
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        reasons.append(f"the kernels need compute capability 8.0 or newer, got {capability}")
    if dtype not in DTYPES:
        reasons.append(f"dtype must be bfloat16, float16 or float32, got {dtype}")
    return reasons


def _takes(device: torch.device) -> bool:
    return device.type == "cuda" or (device.type == "cpu" and interpreting()) or records(device)


def call_reasons(x: Tensor, *others: Tensor | None, gradients: bool = False, autocast: bool = False) -> list[str]:
    """Reasons against a call of a kernel with these tensors; an empty list if there are none.

    Args:
        x: the stream, whose dtype decides.
        others: the other tensors of the call.
        gradients: the operation has kernels for its gradients too.
        autocast: the operation chooses its dtypes as PyTorch's own would.
    """
    tensors = [x, *(t for t in others if t is not None)]
    devices = {t.device.type for t in tensors}
    if len(devices) > 1 or not _takes(x.device):
        return [f"Triton kernels run on CUDA tensors, got {', '.join(sorted(devices))}"]
    reasons = device_reasons(x.device, x.dtype)
    if not gradients and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        reasons.append("gradients are needed, and this version's Triton kernels are for inference only")
    if any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
        reasons.append(f"tensor subclasses need plain PyTorch, got {', '.join(type(t).__name__ for t in tensors)}")
    if x.device.type == "meta":  # recorded, by a dispatch mode; autocast knows no such device
        return reasons
    if not autocast and torch.is_autocast_enabled(x.device.type):
        reasons.append("autocast is on, and chooses dtypes by PyTorch's own operations")
    return reasons + tracing_reasons()
