"""LayerNorm with the dtype of its result: validate, choose a backend, call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmt_fast.backend import select
from cmt_fast.ops.checks import check_modules
from cmt_fast.ops.layer_norm.fused import layer_norm_fused, layer_norm_reasons
from cmt_fast.ops.layer_norm.reference import layer_norm_reference


def layer_norm(x: Tensor, norm: nn.Module, dtype: torch.dtype | None = None, *, backend: str | None = None) -> Tensor:
    """``norm(x).to(dtype)``, which under autocast passes over no float32 map (paper, "patch aggregation").

    Args:
        x: (..., C), floating point.
        norm: LayerNorm over C.
        dtype: of the result; None for the one that PyTorch's LayerNorm returns, float32 under a GPU's autocast.
        backend: see :func:`cmt_fast.use_backend`.

    Returns:
        (..., C).

    Raises:
        TypeError: if ``norm`` is no module.
        BackendError: if ``backend`` names one that cannot run this call.
    """
    check_modules(norm=norm)
    candidates = {"triton": lambda: layer_norm_reasons(x, norm)}
    if select("layer_norm", candidates, backend, device=x.device) == "triton":
        assert isinstance(norm, nn.LayerNorm)  # or there were reasons against it
        return layer_norm_fused(x, norm, dtype)
    return layer_norm_reference(x, norm, dtype)
