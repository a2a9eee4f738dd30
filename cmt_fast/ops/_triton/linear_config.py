"""Tiles of a linear layer, by shape, dtype and device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.tiling import LEAST_BLOCK, around, block, neighbours
from cmt_fast.ops._triton.tunable import tunable

#: Sums that a thread holds: twice as many were compiled, and spill.
_SUMS = 128


@dataclass(frozen=True)
class LinearConfig:
    """How :func:`linear_kernel` is launched: rows, inputs and outputs of a tile, warps, stages of the loop over inputs."""

    block_n: int
    block_c: int
    block_out: int
    num_warps: int
    num_stages: int


def linear_candidates(
    rule: LinearConfig, rows: int, width: int, out: int, itemsize: int, exact: bool, limits: DeviceLimits
) -> Iterator[LinearConfig]:
    """Other tiles that fit into shared memory; arguments as of :func:`linear_config`."""
    for config in neighbours(
        rule,
        block_n=around(rule.block_n, LEAST_BLOCK, 256),
        block_out=around(rule.block_out, LEAST_BLOCK, 256),
        num_warps=(4, 8),
        num_stages=(2, 3, 4),
    ):
        stage = (config.block_n + config.block_out) * config.block_c * itemsize
        sums = config.block_n * config.block_out / (32 * config.num_warps)
        if config.num_stages * stage <= limits.shared_memory and sums <= _SUMS:
            yield config


@tunable("cmt_fast.ops._triton.linear:linear_kernel", linear_candidates)
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
