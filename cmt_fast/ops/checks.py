"""Input checks of the public functions: what was expected, what came, what to do. The same for every backend."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmt_fast.ops.autocast import autocast_dtype

#: Classes whose forward is a BatchNorm over maps and nothing else, and those that multiply each image's branch by a factor that they draw:
#: ``cmt_fast.modules`` adds its own. Kernels may take the place of these.
PLAIN_BATCH_NORMS: list[type[nn.Module]] = [nn.BatchNorm2d, nn.SyncBatchNorm]
PLAIN_DROP_PATHS: list[type[nn.Module]] = []
#: Classes whose forward is a 1x1 convolution, if that is the size of their kernel, and nothing else; likewise.
PLAIN_POINTWISE: list[type[nn.Module]] = [nn.Conv2d]


def shape_of(x: object) -> str:
    """How an argument is named in a message: a tensor by its shape, anything else by its type."""
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__


def check_map(x: Tensor, name: str = "x") -> None:
    """Require a floating-point (B, H, W, C) map."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        raise ValueError(
            f"{name} must be a 4-D tensor (B, H, W, C), got {shape_of(x)}; tokens (B, N, C) become a map by x.unflatten(1, (H, W))"
        )
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} must have at least one row, column and channel, got {shape_of(x)}")


def check_same(name: str, tensor: Tensor | None, other_name: str, other: Tensor) -> None:
    """Require ``tensor`` (if given) to be on the device of ``other``."""
    if tensor is not None and tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} but {other_name} is on {other.device}; move one of them")


def check_dtype(name: str, tensor: Tensor | None, other_name: str, other: Tensor) -> None:
    """Require ``tensor`` (if given) to have the dtype of ``other``; autocast may mix floating-point dtypes."""
    if tensor is None or tensor.dtype == other.dtype:
        return
    if not (tensor.is_floating_point() and autocast_dtype(other) is not None):
        raise TypeError(
            f"{name} is {tensor.dtype} but {other_name} is {other.dtype}: convert one of them with .to(), or use autocast"
        )


def check_vector(name: str, tensor: Tensor | None, length: int) -> None:
    """Require a 1-D tensor of ``length`` elements, or ``None``."""
    if tensor is not None and (not isinstance(tensor, Tensor) or tuple(tensor.shape) != (length,)):
        raise ValueError(f"{name} must have shape ({length},), got {shape_of(tensor)}")


def check_modules(**modules: nn.Module) -> None:
    """Require every argument to be a module."""
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a module, got {type(module).__name__}")


def check_conv_channels(name: str, conv: nn.Module, x: Tensor) -> None:
    """Require ``conv`` to take the channels of the map ``x`` (B, H, W, C), if it is a convolution: others tell no number."""
    if isinstance(conv, nn.Conv2d) and conv.in_channels != x.shape[-1]:
        raise ValueError(f"{name} takes {conv.in_channels} channels but x has {x.shape[-1]}, got x {shape_of(x)}")


def check_grid(name: str, grid: tuple[int, int]) -> None:
    """Require two positive whole numbers. Not asked while tracing, where a grid holds symbols."""
    if torch.compiler.is_compiling():
        return
    if (
        not isinstance(grid, (tuple, list))
        or len(grid) != 2
        or not all(hasattr(side, "__index__") for side in grid)
        or any(side < 1 for side in grid if not isinstance(side, (Tensor, torch.SymInt)))
    ):
        raise ValueError(f"{name} must be (H, W) of positive whole numbers, got {grid!r}")


def not_plain(name: str, module: nn.Module | None, *kinds: type[nn.Module]) -> list[str]:
    """Reasons why a fused kernel may not read the parameters of ``module``, of one of ``kinds``, and skip its ``forward``.

    A subclass, an adapter or a hook changes what calling the module does; only the reference, which calls it, honours that.
    """
    if module is None:
        return []
    reasons = []
    if type(module) not in kinds:
        names = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds))
        reasons.append(f"{name} is a {type(module).__name__}, not a plain {names}")
    if "forward" in vars(module):
        reasons.append(f"the forward of {name} was replaced, and only the reference calls it")
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        reasons.append(f"{name} has hooks, which only the reference calls")
    return reasons


def second_derivative_error(name: str) -> RuntimeError:
    """For the backward pass of a fused function whose gradients cannot be differentiated, where they would have to be."""
    return RuntimeError(
        f"the fused {name} can be differentiated once, but create_graph=True was asked for: run the model with "
        'cmt_fast.use_backend("reference")'
    )
