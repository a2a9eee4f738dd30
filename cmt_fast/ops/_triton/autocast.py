"""What autocast makes of the operands of a product: kernels that take their place follow it."""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which PyTorch would multiply ``x`` now: its own, or under autocast autocast's, which leaves float64 alone."""
    device = x.device.type
    mixed = device != "meta" and torch.is_autocast_enabled(device)  # which knows no meta device
    return torch.get_autocast_dtype(device) if mixed and x.dtype != torch.float64 else x.dtype
