"""Tiles of the attention kernel, by shape, dtype and architecture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.tiling import LEAST_BLOCK, around, block, fill, neighbours
from cmt_fast.ops._triton.tunable import tunable

#: The widest head that a tile holds on every architecture.
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class AttentionConfig:
    """How :func:`reduced_kv_attention_kernel` is launched: queries and keys of a tile, warps, stages of the loop over keys."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int


def attention_candidates(
    rule: AttentionConfig,
    images: int,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    itemsize: int,
    exact: bool,
    limits: DeviceLimits,
) -> Iterator[AttentionConfig]:
    """Other tiles that fit into shared memory; arguments as of :func:`attention_config`."""
    wide = block(head_dim)
    for config in neighbours(
        rule,
        block_n=around(rule.block_n, LEAST_BLOCK, 256),
        block_m=around(rule.block_m, LEAST_BLOCK, block(keys)),
        num_warps=around(rule.num_warps, 2, 8),
        num_stages=(1, 2, 3),
    ):
        streams = keys > config.block_m
        tiles = wide * (config.block_n + 2 * config.block_m * config.num_stages) * itemsize
        if (streams or config.num_stages == 1) and tiles + config.block_n * config.block_m * 4 <= limits.shared_memory:
            yield config


@tunable("cmt_fast.ops.attention.triton_kernels:reduced_kv_attention_kernel", attention_candidates)
def attention_config(
    images: int,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    itemsize: int,
    exact: bool,
    limits: DeviceLimits,
) -> AttentionConfig:
    """The largest tile that the compiler keeps in registers, smaller where the grid would not fill the device.

    Args:
        head_dim: the wider of q's and v's.
        itemsize: bytes of an element of q.
        exact: products are float32 without TF32. Ordinary instructions make them, and want smaller tiles.
    """
    wide = block(head_dim)
    if exact:
        block_m, queries_held, num_warps = (32 if wide <= 64 else 16), 4096 // wide, 8
    elif keys <= 64:
        block_m, queries_held, num_warps = 64, 8192 // wide, 4
    else:
        block_m, queries_held, num_warps = (64, 4096 // wide, 4) if wide <= 64 else (32, 4096 // wide, 8)
    if head_dim % 8:  # rows of heads start anywhere: their addresses take registers too
        queries_held //= 2
    block_m = min(block_m, block(keys))
    block_n = fill(max(16, min(128, queries_held)), queries, images * heads, limits)
    return AttentionConfig(block_n, block_m, num_warps, num_stages=1 if keys <= block_m else 2)
