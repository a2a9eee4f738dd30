"""Tiles of the depthwise convolutions, by a rule from shape and device; where a sum is cut, from the shape alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.strips import map_reasons, strip_length
from cmt_fast.ops._triton.tiling import power_of_two

#: Channels of a tile: 128 bytes of 16 bits, so that narrow maps waste few lanes and a row of memory is read in whole lines.
MAX_BLOCK_C = 64
WARPS = 4
_THREADS = 32 * WARPS

#: Elements of a tile of the 3x3 convolution that a thread holds: a pair of columns by 8 channels of 16 bits, and with the sums of
#: the taps by 4, as nine of them take the registers of nine taps.
ELEMENTS, ELEMENTS_WITH_SUMS = 16, 8
#: Programs that a multiprocessor runs at once, by the registers.
_PROGRAMS = 2
#: Programs at once that a sum is cut for, whatever the GPU: three on each multiprocessor of an H100.
PROGRAMS_WITH_SUMS = 400
#: What a strip with sums costs whatever its length, in rows: halo, taps, adding up ten sums over the columns.
_OVERHEAD_ROWS = 4

#: Elements of a tile of the reduction, and of its gradients, that keep a sum for each tap beside.
REDUCE_TILE, REDUCE_BACKWARD_TILE = 64 * _THREADS, 32 * _THREADS
#: Largest k of a reduction.
MAX_K = 64


@dataclass(frozen=True)
class Conv3x3Config:
    """The tile of a program of the 3x3 convolution: rows of a strip, pairs of columns, channels."""

    rows: int
    pairs: int
    block_c: int


@dataclass(frozen=True)
class ReduceConfig:
    """The tile of a program of the reduction: windows, columns of a window, channels; and how many tiles one after another."""

    windows: int
    block_k: int
    block_c: int
    tiles: int = 1


def conv3x3_reasons(shape: Sequence[int]) -> list[str]:
    """Reasons why offsets into x (B, H, W, C) would not fit a tile of the 3x3 convolution; an empty list if they do."""
    return map_reasons(shape, 1, ELEMENTS * _THREADS)


def reduce_reasons(shape: Sequence[int], k: int) -> list[str]:
    """Reasons why no tile of the reduction by k fits x (B, H, W, C); an empty list if one does."""
    images, height, width, channels = shape
    reasons = []
    if k > MAX_K:
        reasons.append(f"k must be at most {MAX_K}, got {k}")
    if (elements := k * width * channels) >= 2**31:
        reasons.append(f"k rows of the map must have less than 2^31 elements, got {elements}")
    if (windows := images * (height // k + 1) * (width // k + 1)) >= 2**30:
        reasons.append(f"there must be less than 2^30 windows, got {windows}")
    return reasons


@lru_cache(maxsize=1024)
def conv3x3_config(images: int, height: int, width: int, channels: int, limits: DeviceLimits) -> Conv3x3Config:
    """The tile for maps (images, height, width, channels); nothing is summed over programs, so it may depend on the device."""
    block_c = min(power_of_two(channels), MAX_BLOCK_C)
    pairs = ELEMENTS // 2 * _THREADS // block_c
    programs = -(-images * width // (2 * pairs)) * -(-channels // block_c)
    return Conv3x3Config(strip_length(height, 1, programs / (_PROGRAMS * limits.multiprocessors)), pairs, block_c)


@lru_cache(maxsize=1024)
def conv3x3_backward_config(images: int, height: int, width: int, channels: int) -> Conv3x3Config:
    """The tile of the gradients' kernel, which cuts the sums of the taps."""
    block_c = min(power_of_two(channels), MAX_BLOCK_C)
    pairs = ELEMENTS_WITH_SUMS // 2 * _THREADS // block_c
    programs = -(-images * width // (2 * pairs)) * -(-channels // block_c)
    return Conv3x3Config(strip_length(height, 1, programs / PROGRAMS_WITH_SUMS, _OVERHEAD_ROWS), pairs, block_c)


@lru_cache(maxsize=1024)
def reduce_config(windows: int, k: int, channels: int, limits: DeviceLimits) -> ReduceConfig:
    """The tile for a result of so many windows; nothing is summed over programs."""
    block_k, block_c = power_of_two(k), min(power_of_two(channels), MAX_BLOCK_C)
    tile = max(1, REDUCE_TILE // (block_k * block_c))
    while tile > 1 and -(-windows // tile) * -(-channels // block_c) < 2 * limits.multiprocessors:
        tile //= 2
    return ReduceConfig(tile, block_k, block_c)


@lru_cache(maxsize=1024)
def reduce_backward_config(windows: int, k: int, channels: int) -> ReduceConfig:
    """The tile of the gradients' kernel for maps of so many windows, unfinished ones included."""
    block_k, block_c = power_of_two(k), min(power_of_two(channels), MAX_BLOCK_C)
    tile = max(1, REDUCE_BACKWARD_TILE // (block_k * block_c))
    programs = -(-windows // tile) * k * -(-channels // block_c)
    return ReduceConfig(tile, block_k, block_c, -(-programs // (2 * PROGRAMS_WITH_SUMS)))
