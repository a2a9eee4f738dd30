"""Public depthwise convolutions: validate, choose a backend, call."""

from __future__ import annotations

from torch import Tensor

from cmt_fast.backend import select
from cmt_fast.ops.checks import check_dtype, check_map, check_same, check_vector, shape_of
from cmt_fast.ops.depthwise import autograd
from cmt_fast.ops.depthwise.native import native_reasons
from cmt_fast.ops.depthwise.reasons import conv3x3_reasons, reduce_reasons
from cmt_fast.ops.depthwise.reference import depthwise_conv3x3_reference, depthwise_reduce_reference


def depthwise_conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, shortcut: bool = False, backend: str | None = None
) -> Tensor:
    """Depthwise 3x3 convolution of an NHWC map, stride 1, zero padding 1, with an optional shortcut.

    ``y = conv(x) + bias`` or, with ``shortcut=True``, ``y = conv(x) + bias + x``: the LPU (paper, "LPU") and the
    middle of the IRFFN.

    Args:
        x: (B, H, W, C), floating point, any strides.
        weight: (C, 1, 3, 3), the layout of ``nn.Conv2d(C, C, 3, groups=C)``, in the dtype of ``x`` unless autocast is on.
        bias: (C,) or None, in the dtype of ``x`` likewise.
        shortcut: add ``x``.
        backend: see :func:`cmt_fast.use_backend`; None takes the process-wide setting.

    Returns:
        (B, H, W, C) in the dtype of a convolution of the inputs.

    Raises:
        ValueError, TypeError: on a wrong shape, dtype or device.
        BackendError: if ``backend`` names one that cannot run this call.
    """
    check_map(x)
    _check_filter(x, weight, bias)
    if not isinstance(shortcut, bool):
        raise TypeError(f"shortcut must be True or False, got {type(shortcut).__name__}")
    if tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"weight must have shape ({x.shape[-1]}, 1, 3, 3), got {shape_of(weight)}")
    candidates = {
        "triton": lambda: conv3x3_reasons(x, weight, bias),
        "native": lambda: native_reasons(x, weight, bias),
    }
    chosen = select("depthwise_conv3x3", candidates, backend, device=x.device)
    if chosen == "reference":
        return depthwise_conv3x3_reference(x, weight, bias, shortcut)
    return autograd.depthwise_conv3x3(x, weight, bias, shortcut, chosen)


def depthwise_reduce(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Depthwise k x k convolution with stride k: the reduction of keys and values (paper, "LMHSA").

    Args:
        x: (B, H, W, C), floating point, any strides. Rows and columns beyond a multiple of k are not read.
        weight: (C, 1, k, k), in the dtype of ``x`` unless autocast is on.
        bias: (C,) or None, in the dtype of ``x`` likewise.
        backend: see :func:`cmt_fast.use_backend`.

    Returns:
        (B, H // k, W // k, C).

    Raises:
        ValueError, TypeError: on a wrong shape, dtype or device, or a map smaller than k x k.
        BackendError: if ``backend`` names one that cannot run this call.
    """
    check_map(x)
    _check_filter(x, weight, bias)
    k = weight.shape[-1]
    if weight.shape[-2] != k or k < 1 or min(x.shape[1:3]) < k:
        raise ValueError(
            f"weight must have shape (C, 1, k, k) with 1 <= k no larger than the map, got weight {shape_of(weight)} and x {shape_of(x)}"
        )
    candidates = {"triton": lambda: reduce_reasons(x, weight, bias)}
    if select("depthwise_reduce", candidates, backend, device=x.device) == "triton":
        return autograd.depthwise_reduce_triton(x, weight, bias)
    return depthwise_reduce_reference(x, weight, bias)


def _check_filter(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    channels = x.shape[-1]
    if not isinstance(weight, Tensor) or weight.dim() != 4 or weight.shape[0] != channels or weight.shape[1] != 1:
        raise ValueError(
            f"weight must have shape (C, 1, k, k) with C = {channels} channels of x, got {shape_of(weight)}"
        )
    check_vector("bias", bias, channels)
    check_same("weight", weight, "x", x)
    check_same("bias", bias, "x", x)
    check_dtype("weight", weight, "x", x)
    check_dtype("bias", bias, "x", x)
