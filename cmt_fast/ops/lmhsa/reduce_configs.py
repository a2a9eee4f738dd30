"""Tiles of the kernels around the attention's core, by shape alone: how sums are cut must not depend on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Elements of a tile, 16 a thread of 4 warps.
TILE = 2048
#: Beyond this many channels a thread would hold more than 32 elements of a row.
MAX_CHANNELS = 8192
#: Programs that fill a device: with fewer, tiles are smaller; with more, a program does several tiles, so that there are fewer sums to add.
_PROGRAMS = 384


@dataclass(frozen=True)
class ReduceConfig:
    """Rows (pixels or windows) and channels of a tile, tiles that a program does, warps, and how many programs there are."""

    block_n: int
    block_c: int
    steps: int
    num_warps: int
    programs: int


def window_count(x_shape: Sequence[int], k: int) -> int:
    """Windows of k x k pixels in the maps (B, H, W, C), incomplete ones included."""
    b, h, w, _ = x_shape
    return b * -(-h // k) * -(-w // k)


def reduce_config(rows: int, channels: int, sums: int = 0) -> ReduceConfig:
    """For a map of so many rows, pixels of the reduced map or windows of K x K, with all channels in a program.

    Args:
        sums: rows of sums that a program holds beside a tile, such as those of the taps.
    """
    block_c = 1 << (channels - 1).bit_length()
    block_n = max(1, TILE // block_c)
    while block_n > 1 and -(-rows // block_n) < _PROGRAMS // 2:
        block_n //= 2
    steps = max(1, min(8, rows // (block_n * _PROGRAMS)))
    num_warps = max(1, min(8, max(block_n * block_c // 512, sums * block_c // 1024)))
    return ReduceConfig(block_n, block_c, steps, num_warps, -(-rows // (block_n * steps)))
