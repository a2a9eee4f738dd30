"""When kernels can take the place of the local perception unit, alone or with LayerNorm and reduction, and why they cannot."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cmt_fast.ops._triton.reasons import call_reasons
from cmt_fast.ops.checks import not_plain
from cmt_fast.ops.lpu.configs import tile_reasons


def lpu_reasons(
    x: Tensor, conv: nn.Module, of_kernel: Callable[[Tensor, Tensor, Tensor | None], list[str]]
) -> list[str]:
    """Reasons why no kernel may do what ``conv`` does, and then those of one kernel, of x, weight and bias."""
    reasons = not_plain("conv", conv, nn.Conv2d)
    if not isinstance(conv, nn.Conv2d):
        return reasons
    channels = x.shape[-1]
    if (
        tuple(conv.weight.shape) != (channels, 1, 3, 3)
        or (conv.stride, conv.padding, conv.dilation) != ((1, 1), (1, 1), (1, 1))
        or conv.padding_mode != "zeros"
    ):
        reasons.append(f"conv must be Conv2d({channels}, {channels}, 3, padding=1, groups={channels}), got {conv}")
    return reasons + of_kernel(x, conv.weight, conv.bias)


def lpu_reduce_reasons(x: Tensor, taps: Tensor, bias: Tensor, reduction: Tensor | None, k: int) -> list[str]:
    """Reasons against ``cmt_fast_triton::lpu_reduce``; an empty list if it can run."""
    reasons = call_reasons(x, taps, bias, reduction) + tile_reasons(x.shape, k)
    if any(t.dtype != torch.float32 for t in (taps, bias, reduction) if t is not None):
        reasons.append("taps, bias and reduction must be float32")
    return reasons
