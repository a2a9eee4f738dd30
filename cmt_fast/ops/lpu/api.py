"""Public local perception unit: validate, choose a backend, call."""

from __future__ import annotations

from torch import Tensor, nn

from cmt_fast.backend import select
from cmt_fast.ops.checks import check_map
from cmt_fast.ops.lpu.reference import lpu_reference


def lpu(x: Tensor, conv: nn.Module, *, backend: str | None = None) -> Tensor:
    """The local perception unit, first sub-layer of a CMT block: ``conv(x) + x`` (paper section 3.1).

    Args:
        x: (B, H, W, C), floating point.
        conv: ``nn.Conv2d(C, C, 3, padding=1, groups=C)``, or any module that maps (B, C, H, W) to the same shape.
        backend: see :func:`cmt_fast.use_backend`.

    Returns:
        (B, H, W, C).

    Raises:
        ValueError, TypeError: on a wrong shape or dtype of ``x``.
        BackendError: if ``backend`` names one that cannot run this call.
    """
    check_map(x)
    select("lpu", {}, backend, device=x.device)
    return lpu_reference(x, conv)
