"""CUDA's autocast on tensors without memory, where PyTorch has none: so that a trace needs no GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from cmt_fast.ops import autocast

#: Of PyTorch's lists (documentation of torch.amp, "CUDA Op-Specific Behavior") what a CMT, fused or not, and its loss call.
_LOW = {"conv2d", "linear", "matmul", "__matmul__"}
_FLOAT32 = {"layer_norm", "softmax", "cross_entropy"}


class MetaAutocast(TorchFunctionMode):
    """What ``torch.autocast("cuda", dtype)`` does, for tensors on the ``meta`` device.

    Parameters are converted once while it is on, as by autocast's cache. Our own operations follow it, too
    (:func:`cmt_fast.ops.autocast.autocast_dtype`).
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._parameters: dict[Tensor, Tensor] = {}

    def __enter__(self) -> MetaAutocast:
        autocast.meta_dtype = self.dtype
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        autocast.meta_dtype = None
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _LOW:
            args, kwargs = tree_map(self._low, (args, kwargs))
        elif name in _FLOAT32:
            args, kwargs = tree_map(_float32, (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _low(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(self.dtype)
        if x not in self._parameters:
            self._parameters[x] = x.to(self.dtype)
        return self._parameters[x]


def _float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
