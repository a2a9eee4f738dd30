"""GELU, BatchNorm and a convolution as one operation: validate, choose a backend, call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cmt_fast.backend import select
from cmt_fast.ops.activated_conv.fused import activated_conv_fused, activated_conv_reasons
from cmt_fast.ops.activated_conv.reference import activated_conv_reference
from cmt_fast.ops.checks import check_conv_channels, check_map, check_modules


def activated_conv(
    x: Tensor,
    *,
    act: Callable[[Tensor], Tensor],
    bn: nn.Module,
    conv: nn.Module,
    backend: str | None = None,
) -> Tensor:
    """``conv(bn(act(x)))``, a step of the stem (paper, "stem"); for the backward pass the kernels keep x alone.

    Args:
        x: (B, H, W, C), floating point: what a convolution returned.
        act: activation, the exact GELU.
        bn: BatchNorm over C.
        conv: convolution C -> C'. Both modules take (B, channels, H, W).
        backend: see :func:`cmt_fast.use_backend`.

    Returns:
        (B, H', W', C').

    Raises:
        ValueError: on a wrong shape of ``x``, or if ``conv`` is a convolution of other channels.
        TypeError: if ``x`` is not floating point, or a part is no module.
        BackendError: if ``backend`` names one that cannot run this call.
    """
    check_map(x)
    check_modules(bn=bn, conv=conv)
    check_conv_channels("conv", conv, x)
    parts: dict[str, Any] = dict(act=act, bn=bn, conv=conv)
    candidates = {"triton": lambda: activated_conv_reasons(x, **parts)}
    if select("activated_conv", candidates, backend, device=x.device) == "triton":
        return activated_conv_fused(x, **parts)
    return activated_conv_reference(x, **parts)
