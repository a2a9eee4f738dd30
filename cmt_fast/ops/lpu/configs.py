"""Tiles of the local perception unit, by a rule from shape, dtype and device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.strips import map_reasons, strip_length
from cmt_fast.ops._triton.tiling import around, neighbours, power_of_two
from cmt_fast.ops._triton.tunable import tunable

#: Elements of a tile that a thread holds: a pair of columns by 8 channels of 16 bits. Two unfinished rows of y, the next row of x and nine
#: taps for them fill 215 to 240 registers, so a multiprocessor runs 8 warps.
ELEMENTS = 16
MAX_WARPS = WARPS_AT_ONCE = 8
#: Elements of the largest tile; beyond it a thread's registers spill to memory.
MAX_TILE = 2 * ELEMENTS * 32 * MAX_WARPS


@dataclass(frozen=True)
class LPUConfig:
    """The tile of a program: see ``lpu_kernel``."""

    windows: int
    pairs: int
    block_c: int
    num_warps: int


def tile_reasons(x_shape: Sequence[int], k: int) -> list[str]:
    """Reasons why no tile of the kernel fits x (B, H, W, C) and a reduction by k; an empty list if one does."""
    reasons = []
    if k & (k - 1):
        reasons.append(f"k must be a power of two, got {k}")
    if (size := k * power_of_two(x_shape[-1])) > MAX_TILE:
        reasons.append(f"k times the channels, rounded up to a power of two, must be at most {MAX_TILE}, got {size}")
    return reasons + map_reasons(x_shape, k, MAX_TILE)


def lpu_candidates(
    rule: LPUConfig,
    images: int,
    height: int,
    width: int,
    channels: int,
    k: int,
    itemsize: int,
    limits: DeviceLimits,
) -> Iterator[LPUConfig]:
    """Other strips and tiles, none with more elements a thread than fill its registers; arguments as of :func:`lpu_config`."""

    def elements(config: LPUConfig) -> float:
        return 2 * config.pairs * config.block_c / (32 * config.num_warps)

    for config in neighbours(
        rule,
        windows=around(rule.windows, 1, -(-height // k)),
        pairs=around(rule.pairs, max(1, k // 2), MAX_TILE),
        num_warps=(2, 4, 8),
    ):
        if 2 <= elements(config) <= max(ELEMENTS, elements(rule)):
            yield config


@tunable("cmt_fast.ops.lpu.triton_kernels:lpu_kernel", lpu_candidates)
def lpu_config(
    images: int, height: int, width: int, channels: int, k: int, itemsize: int, limits: DeviceLimits
) -> LPUConfig:
    """The tile for maps (images, height, width, channels).

    Args:
        k: of the reduction; 1 for none.
        itemsize: bytes of an element of the maps; measured tiles may differ by it, the rule's do not.
        limits: of the device.
    """
    block_c = power_of_two(channels)
    num_warps = 4
    while num_warps < MAX_WARPS and k * block_c > ELEMENTS * 32 * num_warps:
        num_warps *= 2
    pairs = max(1, k // 2, ELEMENTS // 2 * 32 * num_warps // block_c)
    programs_at_once = limits.multiprocessors * max(1, WARPS_AT_ONCE // num_warps)
    tiles = -(-images * (-(-width // k) * k) // (2 * pairs))
    windows = strip_length(height, k, tiles / programs_at_once)
    return LPUConfig(windows, pairs, block_c, num_warps)
