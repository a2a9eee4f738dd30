"""When the Triton kernels of the attention sub-layer can run a packed step, and why they cannot."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from cmt_fast.ops._triton.device import DeviceLimits, device_limits
from cmt_fast.ops._triton.products import is_exact
from cmt_fast.ops._triton.reasons import call_reasons
from cmt_fast.ops.attention.configs import MAX_HEAD_DIM
from cmt_fast.ops.lmhsa.configs import absorbed_config


def absorbed_attention_reasons(x: Tensor, keys_values: Tensor, table: Tensor, out_bias: Tensor) -> list[str]:
    """Reasons against ``cmt_fast_triton::absorbed_attention``; an empty list if it can run."""
    reasons = call_reasons(x, keys_values, table, out_bias) + _dtype_reasons(x, (keys_values, table), (out_bias,))
    width, limits = x.shape[-1], device_limits(x.device)
    _, tokens, keys = table.shape
    if not _absorbed_fits(x.shape[0], tokens, keys, width, x.element_size(), is_exact(x.dtype), limits):
        reasons.append(
            f"absorbed attention over {width} channels in {x.dtype} does not fit into {limits.shared_memory} bytes of shared "
            "memory: pack the model with absorb=()"
        )
    return reasons


@lru_cache
def _absorbed_fits(
    images: int, tokens: int, keys: int, width: int, itemsize: int, exact: bool, limits: DeviceLimits
) -> bool:
    """Whether there is a tile: the rule says so, whatever was measured."""
    return absorbed_config.rule(images, tokens, keys, width, itemsize, exact, limits) is not None


def projected_attention_reasons(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    keys_values: Tensor,
    table: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
) -> list[str]:
    """Reasons against ``cmt_fast_triton::projected_attention``; an empty list if it can run."""
    matrices, biases = (query_weight, keys_values, table, out_weight), (query_bias, out_bias)
    reasons = call_reasons(x, *matrices, *biases) + _dtype_reasons(x, matrices, biases)
    head_dim = max(query_weight.shape[0], out_weight.shape[1]) // table.shape[0]
    if head_dim > MAX_HEAD_DIM:
        reasons.append(f"heads must have at most {MAX_HEAD_DIM} channels, got {head_dim}")
    return reasons


def _dtype_reasons(x: Tensor, matrices: tuple[Tensor, ...], biases: tuple[Tensor, ...]) -> list[str]:
    reasons = []
    if any(t.dtype != x.dtype for t in matrices):
        reasons.append(f"keys, values, table and weights must have the dtype of the map, {x.dtype}")
    if any(t.dtype != torch.float32 for t in biases):
        reasons.append("biases must be float32")
    return reasons
