"""Tiles of the attention kernel, by shape, dtype and architecture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from cmt_fast.ops._triton.device import OPERANDS_IN_SHARED_MEMORY, DeviceLimits
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


#: Keys that one tile of the backward pass holds.
FEW_KEYS = 64

#: Of such a tile and of a row of it: the other tiles have as many, and 99 KB of shared memory have to be enough for all.
_TILE_BYTES, _ROW_BYTES = 16 << 10, 512

#: Programs that the backward pass is cut into where there are fewer images and heads, and queries of which one is worth a program.
_PROGRAMS, _LEAST_QUERIES = 256, 256


@dataclass(frozen=True)
class BackwardConfig:
    """How :func:`attention_backward_kernel` is launched: ``parts`` of ``part_queries`` each write partial sums of dk and dv."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int
    parts: int
    part_queries: int


def holds_all_keys(keys: int, head_dim: int, itemsize: int) -> bool:
    """Whether one tile of the backward pass holds all keys, and its gradients need no output of the forward pass.

    Args:
        head_dim: the wider of q's and v's.
        itemsize: bytes of an element of q.
    """
    row = block(head_dim) * itemsize
    return keys <= FEW_KEYS and row <= _ROW_BYTES and block(keys) * row <= _TILE_BYTES


def query_parts(programs: int, queries: int, block_n: int) -> tuple[int, int]:
    """Parts that the queries are cut into, and queries of a part: by shape alone, so that every GPU adds the same sums.

    Args:
        programs: that there are without a cut.
        block_n: what a part is a multiple of.
    """
    parts = min(-(-_PROGRAMS // programs), -(-queries // _LEAST_QUERIES))
    part_queries = block_n * -(-queries // (parts * block_n))
    return -(-queries // part_queries), part_queries


@lru_cache
def backward_config(
    images: int, heads: int, queries: int, keys: int, head_dim: int, itemsize: int, exact: bool, limits: DeviceLimits
) -> BackwardConfig:
    """For :func:`attention_backward_kernel`; arguments as of :func:`attention_config`; itemsize: bytes of an element of q."""
    block_n, block_m, num_warps = _backward_tile(head_dim, itemsize, exact, limits)
    if holds_all_keys(keys, head_dim, itemsize):
        block_m = FEW_KEYS
    block_n, block_m = min(block_n, block(queries)), min(block_m, block(keys))
    parts, part_queries = query_parts(images * heads * -(-keys // block_m), queries, block_n)
    return BackwardConfig(block_n, block_m, num_warps, 2 if itemsize == 2 else 1, parts, part_queries)


@lru_cache
def query_gradient_config(
    queries: int, keys: int, head_dim: int, itemsize: int, exact: bool, limits: DeviceLimits
) -> AttentionConfig:
    """For :func:`query_gradient_kernel`; arguments as of :func:`backward_config`."""
    block_n, block_m, num_warps = _backward_tile(head_dim, itemsize, exact, limits)
    return AttentionConfig(min(block_n, block(queries)), min(block_m, block(keys)), num_warps, num_stages=1)


def _backward_tile(head_dim: int, itemsize: int, exact: bool, limits: DeviceLimits) -> tuple[int, int, int]:
    """Queries, keys and warps of a tile."""
    wide = block(head_dim)
    if exact:
        return 16, 32 if wide <= 64 else 16, 8
    if wide <= 64:  # unaligned heads take registers for their addresses
        roomy = itemsize == 2 and head_dim % 8 == 0 and limits.arch in OPERANDS_IN_SHARED_MEMORY
        return 64 if roomy else 32, 64, 4
    return (32, 32, 8) if itemsize == 2 else (16, 16, 8)
