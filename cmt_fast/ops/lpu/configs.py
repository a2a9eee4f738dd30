"""Tiles of the local perception unit, by a rule from shape, dtype and device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.tiling import around, neighbours
from cmt_fast.ops._triton.tunable import tunable

#: Elements of a tile that a thread holds: a pair of columns by 8 channels of 16 bits. Two unfinished rows of y, the next row of x and nine
#: taps for them fill 215 to 240 registers, so a multiprocessor runs 8 warps.
ELEMENTS = 16
MAX_WARPS = WARPS_AT_ONCE = 8
#: Elements of the largest tile; beyond it a thread's registers spill to memory.
MAX_TILE = 2 * ELEMENTS * 32 * MAX_WARPS

#: Rows of x that a strip reads beside its own, in units of the work on a row.
_HALO_ROWS = 2


@dataclass(frozen=True)
class LPUConfig:
    """The tile of a program: see ``lpu_kernel``."""

    windows: int
    pairs: int
    block_c: int
    num_warps: int


def tile_reasons(x_shape: Sequence[int], k: int, norm: bool) -> list[str]:
    """Reasons why no tile of the kernel fits x (B, H, W, C); an empty list if one does. k and norm: see :func:`lpu_config`."""
    images, height, width, channels = x_shape
    reasons = []
    if k & (k - 1):
        reasons.append(f"k must be a power of two, got {k}")
    if norm and (size := k * _power_of_two(channels)) > MAX_TILE:
        reasons.append(f"k times the channels, rounded up to a power of two, must be at most {MAX_TILE}, got {size}")
    if (elements := height * (width + MAX_TILE) * channels) >= 2**31:
        reasons.append(f"the map of one image must have less than 2^31 elements, got {elements} with what a tile adds")
    if (columns := images * (width + k)) >= 2**30:
        reasons.append(f"images times columns must be less than 2^30, got {columns}")
    return reasons


def lpu_candidates(
    rule: LPUConfig,
    images: int,
    height: int,
    width: int,
    channels: int,
    k: int,
    norm: bool,
    itemsize: int,
    limits: DeviceLimits,
) -> Iterator[LPUConfig]:
    """Other strips and tiles, none with more elements a thread than fill its registers; arguments as of :func:`lpu_config`."""

    def elements(config: LPUConfig) -> float:
        return 2 * config.pairs * config.block_c / (32 * config.num_warps)

    every_channel = _power_of_two(channels)
    for config in neighbours(
        rule,
        windows=around(rule.windows, 1, -(-height // k)),
        pairs=around(rule.pairs, max(1, k // 2), MAX_TILE),
        block_c=[every_channel] if norm else around(rule.block_c, 16, every_channel),
        num_warps=(2, 4, 8),
    ):
        if 2 <= elements(config) <= max(ELEMENTS, elements(rule)):
            yield config


@tunable("cmt_fast.ops.lpu.triton_kernels:lpu_kernel", lpu_candidates)
def lpu_config(
    images: int, height: int, width: int, channels: int, k: int, norm: bool, itemsize: int, limits: DeviceLimits
) -> LPUConfig:
    """The tile for maps (images, height, width, channels).

    Args:
        k: of the reduction; 1 for none.
        norm: whether a LayerNorm follows, for which a program needs all channels.
        itemsize: bytes of an element of the maps; measured tiles may differ by it, the rule's do not.
        limits: of the device.
    """
    block_c = _power_of_two(channels) if norm else min(_power_of_two(channels), 64)
    num_warps = 4
    while num_warps < MAX_WARPS and k * block_c > ELEMENTS * 32 * num_warps:
        num_warps *= 2
    pairs = max(1, k // 2, ELEMENTS // 2 * 32 * num_warps // block_c)
    programs_at_once = limits.multiprocessors * max(1, WARPS_AT_ONCE // num_warps)
    tiles = -(-images * (-(-width // k) * k) // (2 * pairs)) * -(-channels // block_c)
    windows = min(range(1, -(-height // k) + 1), key=lambda w: _cost(w, k, height, tiles / programs_at_once))
    return LPUConfig(windows, pairs, block_c, num_warps)


def _cost(windows: int, k: int, height: int, rounds: float) -> float:
    """Time of a strip height, in rows: all the work shared out, and half a program's at the end, when some have finished."""
    rows = min(windows * k, height) + _HALO_ROWS
    strips = -(-height // (windows * k))
    work = rounds * (height + strips * _HALO_ROWS)
    return max(rows, work + rows / 2)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
