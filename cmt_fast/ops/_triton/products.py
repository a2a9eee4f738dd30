"""How matrix products of float32 are made."""

from __future__ import annotations

import torch


def precision_of(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 obeys ``torch.backends.cuda.matmul.allow_tf32``; others do not look at it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def is_exact(dtype: torch.dtype) -> bool:
    """Whether products are float32 without TF32, which tensor cores do not make."""
    return dtype == torch.float32 and precision_of(dtype) == "ieee"
