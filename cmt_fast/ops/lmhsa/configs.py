"""Tiles of the attention sub-layer's kernels, by shape, dtype and architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.tiling import LEAST_BLOCK, block, fill

#: Architectures whose tensor cores read operands from shared memory, not from registers: these have room for a larger tile.
_OPERANDS_IN_SHARED_MEMORY = (90, 100)


@dataclass(frozen=True)
class FusedConfig:
    """How a fused attention kernel is launched: tokens and keys of a tile, warps, stages of its innermost loop."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class LinearConfig:
    """How :func:`linear_kernel` is launched: rows, inputs and outputs of a tile, warps, stages of the loop over inputs."""

    block_n: int
    block_c: int
    block_out: int
    num_warps: int
    num_stages: int


@lru_cache
def absorbed_config(
    images: int, tokens: int, keys: int, width: int, itemsize: int, exact: bool, limits: DeviceLimits
) -> FusedConfig | None:
    """For :func:`absorbed_attention_kernel`; None if even the smallest tile does not fit into shared memory.

    Args:
        width: channels, padding included. A program holds all of them, twice where keys stream through.
        itemsize: bytes of an element of the stream.
        exact: products are float32 without TF32. Ordinary instructions make them, and want smaller tiles.
    """
    wide = block(width)
    one_tile = keys <= 64 and not exact
    if exact:
        held, keys_held, num_warps = (4096, 32, 8) if wide <= 64 else (2048, 32 if wide <= 128 else 16, 8)
    else:
        largest = 16384 if limits.arch in _OPERANDS_IN_SHARED_MEMORY else 8192
        held = largest if one_tile else 4096
        keys_held, num_warps = 64, 4 if wide <= 64 else 8
    most = max(LEAST_BLOCK, min(128 if one_tile else 64, held // wide))
    for block_m in _halved(min(keys_held, block(keys))):
        for block_n in _halved(fill(most, tokens, images, limits)):
            tile = block_m * wide
            for num_stages in (1,) if keys <= block_m else (2, 1):
                if _fits(block_n, wide, block_m, [tile, tile], num_stages, itemsize, limits):
                    return FusedConfig(block_n, block_m, num_warps, num_stages)
    return None


@lru_cache
def projected_config(
    images: int,
    tokens: int,
    keys: int,
    width: int,
    key_dim: int,
    value_dim: int,
    itemsize: int,
    exact: bool,
    limits: DeviceLimits,
) -> FusedConfig | None:
    """For :func:`projected_attention_kernel`; None where three kernels (query, attention, output) are better.

    These are better beyond 256 channels, where a tile of few tokens would read all weights again and again, and for exact
    float32 products, which spill here. Arguments as in :func:`absorbed_config`.
    """
    wide = block(width)
    if exact or wide > 256:
        return None
    block_m = min(64, block(keys))
    key, value = block(key_dim), block(value_dim)
    for block_n in _halved(fill(64 if itemsize == 2 else 32, tokens, images, limits)):
        if keys <= block_m:
            tiles, around = [wide * key, block_m * key, block_m * value, wide * value], 0
        else:  # the innermost loop is that over keys
            tiles, around = [block_m * key, block_m * value], wide * max(key, value) * itemsize
        for num_stages in (2, 1):
            if _fits(block_n, wide, block_m, tiles, num_stages, itemsize, limits, around):
                return FusedConfig(block_n, block_m, 8, num_stages)
    return None


@lru_cache
def linear_config(rows: int, width: int, out: int, itemsize: int, exact: bool, limits: DeviceLimits) -> LinearConfig:
    """For :func:`linear_kernel`: small enough tiles for every architecture, smaller where the grid would not fill the device."""
    most = 64 if exact else 128
    block_n, block_out = min(most, block(rows)), min(most, block(out))
    while -(-rows // block_n) * -(-out // block_out) < limits.multiprocessors and max(block_n, block_out) > 32:
        if block_n >= block_out:
            block_n //= 2
        else:
            block_out //= 2
    num_warps = 8 if exact or block_n * block_out > 8192 else 4
    return LinearConfig(block_n, min(block(width), 128 // itemsize), block_out, num_warps, num_stages=3)


def _halved(size: int) -> Sequence[int]:
    """``size``, its half, ... down to the least block."""
    return [size >> i for i in range(size.bit_length()) if size >> i >= LEAST_BLOCK]


def _fits(
    block_n: int,
    wide: int,
    block_m: int,
    tiles: Sequence[int],
    num_stages: int,
    itemsize: int,
    limits: DeviceLimits,
    around: int = 0,
) -> bool:
    """Whether shared memory holds the normalised tokens, the logits (in float32: an upper bound), the largest of the loop's
    tiles or, pipelined, all of them for each stage, and ``around`` bytes of what surrounds that loop."""
    loop = max(tiles) if num_stages == 1 else num_stages * sum(tiles)
    return (block_n * wide + loop) * itemsize + block_n * block_m * 4 + around <= limits.shared_memory
