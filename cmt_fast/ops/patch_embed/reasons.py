"""When the Triton kernel of the patch embedding can run a packed step, and why it cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.device import device_limits
from cmt_fast.ops._triton.products import is_exact
from cmt_fast.ops._triton.reasons import call_reasons
from cmt_fast.ops.patch_embed.configs import patch_config


def patch_embed_reasons(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> list[str]:
    """Reasons against ``cmt_fast_triton::patch_embed``; an empty list if it can run."""
    reasons = call_reasons(x, weight, bias, scale, shift)
    if weight.dtype != x.dtype:
        reasons.append(f"the weight must have the dtype of the map, {x.dtype}")
    if any(t.dtype != torch.float32 for t in (bias, scale, shift)):
        reasons.append("bias, scale and shift must be float32")
    tokens = x.shape[0] * (x.shape[1] // 2) * (x.shape[2] // 2)
    return reasons + tile_reasons(tokens, weight)


def tile_reasons(tokens: int, weight: Tensor) -> list[str]:
    """Reasons why no tile of the kernel fits a product of so many tokens by ``weight`` (C, 4 C_in)."""
    reasons, limits = [], device_limits(weight.device)
    channels, inputs = weight.shape
    if tokens >= 2**31:
        reasons.append(f"there must be less than 2^31 tokens, got {tokens}")
    if patch_config(tokens, inputs, channels, weight.element_size(), is_exact(weight.dtype), limits) is None:
        reasons.append(
            f"{channels} channels in {weight.dtype} do not fit into {limits.shared_memory} bytes of shared memory"
        )
    return reasons
