"""When the Triton kernels of the depthwise convolutions can run a call, and why they cannot."""

from __future__ import annotations

from torch import Tensor

from cmt_fast.ops._triton.reasons import DTYPES, call_reasons
from cmt_fast.ops.depthwise import configs


def conv3x3_reasons(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    """Reasons against the Triton kernels of the 3x3 convolution; an empty list if they can run."""
    return _reasons(x, weight, bias) + configs.conv3x3_reasons(x.shape)


def reduce_reasons(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    """Reasons against the Triton kernels of the reduction; an empty list if they can run."""
    return _reasons(x, weight, bias) + configs.reduce_reasons(x.shape, weight.shape[-1])


def _reasons(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    reasons = call_reasons(x, weight, bias, gradients=True, autocast=True)
    if weight.dtype not in DTYPES or (bias is not None and bias.dtype != weight.dtype):
        wanted = "weight and bias must both be bfloat16, float16 or float32"
        reasons.append(f"{wanted}, got {weight.dtype}" + ("" if bias is None else f" and {bias.dtype}"))
    return reasons
