"""Tiles of the patch embedding, by shape, dtype and device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.tiling import LEAST_BLOCK, block, fill

#: Results of a tile: 64 in each thread of 16 warps, as many as its LayerNorm leaves room for.
_MAX_TILE = 64 * 32 * 16


@dataclass(frozen=True)
class PatchConfig:
    """How :func:`patch_embed_kernel` is launched: tokens and inputs of a tile, channels, warps, stages of the loop over inputs."""

    block_n: int
    block_k: int
    block_c: int
    num_warps: int
    num_stages: int


@lru_cache
def patch_config(
    tokens: int, inputs: int, channels: int, itemsize: int, exact: bool, limits: DeviceLimits
) -> PatchConfig | None:
    """The tile for a product (tokens, inputs) by (inputs, channels); None if even the smallest does not fit into shared memory.

    Args:
        itemsize: bytes of an element of the maps.
        exact: products are float32 without TF32.
    """
    block_c = block(channels)
    held = _MAX_TILE // 2 if exact else _MAX_TILE
    block_n = fill(max(LEAST_BLOCK, min(128, held // block_c)), tokens, 1, limits)
    num_warps = min(16, max(4, block_n * block_c // 2048))
    for block_k, num_stages in ((64, 3), (64, 2), (32, 3), (32, 2), (16, 2), (16, 1)):
        block_k = min(block_k, block(inputs), 16 if exact else 64)
        if (block_n + block_c) * block_k * itemsize * num_stages <= limits.shared_memory:
            return PatchConfig(block_n, block_k, block_c, num_warps, num_stages)
    return None
