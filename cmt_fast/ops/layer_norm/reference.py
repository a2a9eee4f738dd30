"""LayerNorm in plain PyTorch: the mathematics."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def layer_norm_reference(x: Tensor, norm: nn.Module, dtype: torch.dtype | None) -> Tensor:
    """norm(x) in ``dtype``, or in the one that it has: (..., C) -> (..., C)."""
    y = norm(x)
    return y if dtype is None else y.to(dtype)
