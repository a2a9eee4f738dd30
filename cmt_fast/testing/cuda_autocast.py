"""CUDA's autocast without a GPU: on tensors without memory for a trace, on a CPU for the numbers of a training run."""

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


class CudaAutocast(TorchFunctionMode):
    """What ``torch.autocast("cuda", dtype)`` does, for tensors on the ``meta`` device or a CPU, whose own autocast has other lists.

    Parameters are converted once while it is on, as by autocast's cache. Our own operations follow it, too
    (:func:`cmt_fast.ops.autocast.autocast_dtype`). On a CPU a product is made in float32 of the rounded operands and then rounded, in both
    directions: so tensor cores do, and few CPUs multiply 16 bits fast.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._parameters: dict[Tensor, Tensor] = {}

    def __enter__(self) -> CudaAutocast:
        autocast.imitated_dtype = self.dtype
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        autocast.imitated_dtype = None
        self._parameters.clear()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        kwargs = kwargs or {}
        if name in _LOW:
            return self._product(func, *tree_map(self._low, (args, kwargs)))
        if name in _FLOAT32:
            args, kwargs = tree_map(_float32, (args, kwargs))
        return func(*args, **kwargs)

    def _product(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        if args[0].device.type != "cpu" or args[0].dtype != self.dtype:
            return func(*args, **kwargs)
        args, kwargs = tree_map(_float32, (args, kwargs))
        return func(*args, **kwargs).to(self.dtype)

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
