"""Tiles of the kernels, by shape alone: moments and sums are cut by them, and no GPU may change their bits."""

from __future__ import annotations

from cmt_fast.ops._triton.tiling import power_of_two

#: Elements of a tile, 32 a thread: a sum over its rows goes from thread to thread once.
ELEMENTS = 8192
NUM_WARPS = 8


def map_blocks(channels: int) -> tuple[int, int]:
    """Rows and channels of a tile."""
    block_c = min(power_of_two(channels), 128)
    return ELEMENTS // block_c, block_c


def row_tiles(rows: int, channels: int) -> int:
    """How many tiles a map has along its rows, each with moments or sums of its own."""
    return -(-rows // map_blocks(channels)[0])
