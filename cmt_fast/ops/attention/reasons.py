"""When the Triton kernel can run attention with reduced keys and values, and why it cannot."""

from __future__ import annotations

from torch import Tensor

from cmt_fast.ops._triton.reasons import DTYPES, call_reasons
from cmt_fast.ops.attention.configs import MAX_HEAD_DIM
from cmt_fast.ops.autocast import product_dtype


def triton_reasons(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float) -> list[str]:
    """Reasons why the kernel cannot run this call; an empty list if it can."""
    reasons = call_reasons(q, k, v, bias, gradients=True, autocast=True)
    dtypes = [product_dtype(t) for t in (q, k, v)]
    if len(set(dtypes)) > 1:
        reasons.append(f"q, k and v must have one dtype, got {', '.join(map(str, dtypes))}")
    if bias is not None and bias.dtype not in DTYPES:
        reasons.append(f"bias must be bfloat16, float16 or float32, got {bias.dtype}")
    if not 1 <= min(q.shape[3], v.shape[3]) <= max(q.shape[3], v.shape[3]) <= MAX_HEAD_DIM:
        reasons.append(f"head dims must be 1 to {MAX_HEAD_DIM}, got {q.shape[3]} of q and k, {v.shape[3]} of v")
    if dropout_p > 0:
        reasons.append("dropout of attention weights needs plain PyTorch")
    return reasons
