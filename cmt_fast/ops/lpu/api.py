"""Public local perception unit: validate, choose a backend, call."""

from __future__ import annotations

from torch import Tensor, nn

from cmt_fast.backend import select
from cmt_fast.ops.checks import check_conv_channels, check_dtype, check_map, check_modules, not_plain
from cmt_fast.ops.depthwise.autograd import depthwise_conv3x3
from cmt_fast.ops.depthwise.native import native_reasons
from cmt_fast.ops.depthwise.reasons import conv3x3_reasons
from cmt_fast.ops.lpu.reasons import lpu_reasons
from cmt_fast.ops.lpu.reference import lpu_reference


def lpu(x: Tensor, conv: nn.Module, *, backend: str | None = None) -> Tensor:
    """The local perception unit, first sub-layer of a CMT block: ``conv(x) + x`` (paper, "LPU").

    Args:
        x: (B, H, W, C), floating point.
        conv: ``nn.Conv2d(C, C, 3, padding=1, groups=C)``, or any module that maps (B, C, H, W) to the same shape.
        backend: see :func:`cmt_fast.use_backend`.

    Returns:
        (B, H, W, C).

    Raises:
        ValueError: on a wrong shape of ``x``, or if ``conv`` does not take or does not return that shape.
        TypeError: on a wrong dtype, or if ``conv`` is no module.
        BackendError: if ``backend`` names one that cannot run this call.
    """
    check_map(x)
    check_modules(conv=conv)
    check_conv_channels("conv", conv, x)
    if isinstance(conv, nn.Conv2d) and not not_plain("conv", conv, nn.Conv2d):  # others may convert what they take
        check_dtype("conv", conv.weight, "x", x)
    candidates = {
        "triton": lambda: lpu_reasons(x, conv, conv3x3_reasons),
        "native": lambda: lpu_reasons(x, conv, native_reasons),
    }
    chosen = select("lpu", candidates, backend, device=x.device)
    if chosen == "reference":
        return lpu_reference(x, conv)
    assert isinstance(conv, nn.Conv2d)  # or there were reasons against it
    return depthwise_conv3x3(x, conv.weight, conv.bias, True, chosen)
