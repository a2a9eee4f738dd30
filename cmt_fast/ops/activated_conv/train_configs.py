"""Tiles of the kernels, by shape alone: moments and sums are cut by them, and no GPU may change their bits."""

from __future__ import annotations

from cmt_fast.ops._triton.tiling import map_blocks

#: Elements of a tile, 32 a thread: a sum over its rows goes from thread to thread once.
ELEMENTS = 8192
NUM_WARPS = 8


def tile_blocks(channels: int) -> tuple[int, int]:
    """Rows and channels of a tile."""
    return map_blocks(channels, ELEMENTS)


def row_tiles(rows: int, channels: int) -> int:
    """How many tiles a map has along its rows, each with moments or sums of its own."""
    return -(-rows // tile_blocks(channels)[0])
