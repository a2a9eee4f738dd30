"""Tiles of the attention sub-layer's fused kernels, by shape, dtype and architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from cmt_fast.ops._triton.device import OPERANDS_IN_SHARED_MEMORY, DeviceLimits
from cmt_fast.ops._triton.tiling import LEAST_BLOCK, around, block, fill, neighbours
from cmt_fast.ops._triton.tunable import tunable
from cmt_fast.ops.attention.configs import BackwardConfig, holds_all_keys, query_parts

#: Sums that a thread of a fused kernel holds: twice as many were compiled, and spill.
_SUMS = 64


@dataclass(frozen=True)
class FusedConfig:
    """How a fused attention kernel is launched: tokens and keys of a tile, warps, stages of its innermost loop."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int


def absorbed_candidates(
    rule: FusedConfig,
    images: int,
    tokens: int,
    keys: int,
    width: int,
    itemsize: int,
    exact: bool,
    limits: DeviceLimits,
) -> Iterator[FusedConfig]:
    """Other tiles that fit into shared memory; arguments as of :func:`absorbed_config`."""
    for config in _fused_neighbours(rule, keys, width):
        tile = config.block_m * block(width)
        if _fits(config, width, [tile, tile], itemsize, limits):
            yield config


@tunable("cmt_fast.ops.lmhsa.triton_kernels:absorbed_attention_kernel", absorbed_candidates)
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
        largest = 16384 if limits.arch in OPERANDS_IN_SHARED_MEMORY else 8192
        held = largest if one_tile else 4096
        keys_held, num_warps = 64, 4 if wide <= 64 else 8
    most = max(LEAST_BLOCK, min(128 if one_tile else 64, held // wide))
    for block_m in _halved(min(keys_held, block(keys))):
        for block_n in _halved(fill(most, tokens, images, limits)):
            tile = block_m * wide
            for num_stages in (1,) if keys <= block_m else (2, 1):
                config = FusedConfig(block_n, block_m, num_warps, num_stages)
                if _fits(config, width, [tile, tile], itemsize, limits):
                    return config
    return None


def projected_candidates(
    rule: FusedConfig,
    images: int,
    tokens: int,
    keys: int,
    width: int,
    key_dim: int,
    value_dim: int,
    itemsize: int,
    exact: bool,
    limits: DeviceLimits,
) -> Iterator[FusedConfig]:
    """Other tiles that fit into shared memory; arguments as of :func:`projected_config`."""
    for config in _fused_neighbours(rule, keys, width):
        if _projected_fits(config, keys, width, key_dim, value_dim, itemsize, limits):
            yield config


@tunable("cmt_fast.ops.lmhsa.triton_kernels:projected_attention_kernel", projected_candidates)
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
    if exact or block(width) > 256:
        return None
    block_m = min(64, block(keys))
    for block_n in _halved(fill(64 if itemsize == 2 else 32, tokens, images, limits)):
        for num_stages in (2, 1):
            config = FusedConfig(block_n, block_m, 8, num_stages)
            if _projected_fits(config, keys, width, key_dim, value_dim, itemsize, limits):
                return config
    return None


@lru_cache
def core_forward_config(
    images: int,
    heads: int,
    tokens: int,
    keys: int,
    width: int,
    key_dim: int,
    value_dim: int,
    itemsize: int,
    exact: bool,
    limits: DeviceLimits,
) -> FusedConfig | None:
    """For :func:`core_forward_kernel`; None where products and the primitive's kernels are better: as :func:`projected_config`, and where keys stream.

    Args:
        width: channels, which a program holds all of.
        itemsize: bytes of an element of the products.
    """
    if not _core_fits(keys, width, key_dim, value_dim, itemsize):
        return None
    config = projected_config.rule(images, tokens, keys, width, key_dim, value_dim, itemsize, exact, limits)
    if config is not None and block(width) <= 128 and limits.arch in OPERANDS_IN_SHARED_MEMORY:
        return replace(config, num_warps=4, num_stages=1)  # 64 rows are work for four warps
    return config


@lru_cache
def core_backward_config(
    images: int,
    heads: int,
    tokens: int,
    keys: int,
    width: int,
    key_dim: int,
    value_dim: int,
    itemsize: int,
    exact: bool,
    limits: DeviceLimits,
) -> BackwardConfig | None:
    """For :func:`core_backward_kernel`; None where products and the primitive's kernels are better. Arguments as of :func:`core_forward_config`."""
    if not _core_fits(keys, width, key_dim, value_dim, itemsize):
        return None
    roomy = limits.arch in OPERANDS_IN_SHARED_MEMORY
    if not roomy and max(key_dim, value_dim) > 64:  # hundreds of registers spill
        return None
    largest = (64 if block(width) <= 64 else 128) if roomy else 32
    block_n = min(largest, block(tokens))
    parts, part_tokens = query_parts(images * heads, tokens, block_n)
    return BackwardConfig(block_n, block(keys), 8 if block_n == 128 else 4, 1, parts, part_tokens)


def _core_fits(keys: int, width: int, key_dim: int, value_dim: int, itemsize: int) -> bool:
    """Whether the fused kernels of a training step hold all channels and keys: 16-bit products, at most 256 channels."""
    return itemsize == 2 and block(width) <= 256 and holds_all_keys(keys, max(key_dim, value_dim), itemsize)


def _halved(size: int) -> Sequence[int]:
    """``size``, its half, ... down to the least block."""
    return [size >> i for i in range(size.bit_length()) if size >> i >= LEAST_BLOCK]


def _fused_neighbours(rule: FusedConfig, keys: int, width: int) -> Iterator[FusedConfig]:
    """Without those whose sums over the heads take more registers than a thread has beside them."""

    def sums(config: FusedConfig) -> float:
        return config.block_n * block(width) / (32 * config.num_warps)

    values = dict(
        block_n=around(rule.block_n, LEAST_BLOCK, 256),
        block_m=around(rule.block_m, LEAST_BLOCK, block(keys)),
        num_warps=(4, 8),
        num_stages=(1, 2),
    )
    return (config for config in neighbours(rule, **values) if sums(config) <= max(_SUMS, sums(rule)))


def _projected_fits(
    config: FusedConfig, keys: int, width: int, key_dim: int, value_dim: int, itemsize: int, limits: DeviceLimits
) -> bool:
    wide, key, value = block(width), block(key_dim), block(value_dim)
    tiles, outside = [config.block_m * key, config.block_m * value], 0
    if keys <= config.block_m:
        tiles += [wide * key, wide * value]
    else:  # the innermost loop is that over keys
        outside = wide * max(key, value) * itemsize
    return _fits(config, width, tiles, itemsize, limits, outside)


def _fits(
    config: FusedConfig, width: int, tiles: Sequence[int], itemsize: int, limits: DeviceLimits, outside: int = 0
) -> bool:
    """Whether shared memory holds the normalised tokens, the logits (in float32: an upper bound), the largest of the loop's
    tiles or, pipelined, all of them for each stage, and ``outside`` bytes of what surrounds that loop."""
    loop = max(tiles) if config.num_stages == 1 else config.num_stages * sum(tiles)
    held = (config.block_n * block(width) + loop) * itemsize + config.block_n * config.block_m * 4
    return held + outside <= limits.shared_memory
