"""When the compiled library can run a packed model, and why it cannot."""

from __future__ import annotations

import torch

from cmt_fast.backend import machine_reasons

#: Element types that csrc/cpu/packed has loops for.
DTYPES = (torch.float32, torch.bfloat16)


def native_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Reasons why the compiled library cannot run a packed model on ``device`` in ``dtype``; an empty list if it can."""
    reasons = machine_reasons("native")
    if device.type != "cpu":
        reasons.append(f"the compiled library runs on the CPU only, got {device}")
    if dtype not in DTYPES:
        reasons.append(f"dtype must be float32 or bfloat16, got {dtype}")
    return reasons
