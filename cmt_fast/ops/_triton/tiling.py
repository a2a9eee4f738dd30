"""Rules that the launch configurations of several operations share."""

from __future__ import annotations

from cmt_fast.ops._triton.device import DeviceLimits

#: The least side of a tile that tensor cores multiply.
LEAST_BLOCK = 16


def block(size: int) -> int:
    """The side of the tile that holds ``size`` elements: a power of 2, as Triton wants it."""
    return max(LEAST_BLOCK, 1 << (size - 1).bit_length())


def fill(rows: int, count: int, programs: int, limits: DeviceLimits) -> int:
    """Fewer rows a program where the grid would leave multiprocessors idle, or most of its rows empty.

    Args:
        rows: that one program does best, a power of 2.
        count: of rows there are, for each of ``programs`` others along the rest of the grid.
        limits: of the device.
    """
    rows = min(rows, block(count))
    while rows > LEAST_BLOCK and -(-count // rows) * programs < limits.multiprocessors:
        rows //= 2
    return rows
