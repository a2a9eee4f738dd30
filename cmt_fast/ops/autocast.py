"""What autocast, if it is on, makes of operands: what takes the place of PyTorch's own operations follows it."""

from __future__ import annotations

import torch
from torch import Tensor

#: CUDA autocast's dtype for tensors on any device, while :mod:`cmt_fast.testing.cuda_autocast` imitates it; else None.
imitated_dtype: torch.dtype | None = None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype where ``x`` is, or None where it is off."""
    device = x.device.type
    if imitated_dtype is not None or device == "meta":  # which autocast does not know
        return imitated_dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which PyTorch would multiply ``x`` now: its own, or under autocast autocast's, which leaves float64 alone."""
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x) or x.dtype


def norm_dtype(x: Tensor) -> torch.dtype:
    """The dtype that PyTorch's LayerNorm of ``x`` has now: float32 under a GPU's autocast, which a CPU's does not ask for."""
    return torch.float32 if autocast_dtype(x) is not None and x.device.type != "cpu" else x.dtype
