"""Tiles of the local perception unit, by a rule from shape, dtype and device."""

from __future__ import annotations

from dataclasses import dataclass

from cmt_fast.ops._triton.device import DeviceLimits

#: Elements of a tile that a thread holds. Two unfinished rows of y, the row of x and nine taps of 8 channels then fill 168 registers,
#: of which three programs of four warps fit a multiprocessor.
ELEMENTS = 16
MAX_WARPS = 8
REGISTERS = 65536  # of a multiprocessor

#: Rows of x that a strip reads beside its own, in units of the work on a row.
_HALO_ROWS = 2


@dataclass(frozen=True)
class LPUConfig:
    """The tile of a program: see ``lpu_kernel``."""

    windows: int
    columns: int
    adjacent: int
    block_c: int
    num_warps: int
    max_registers: int | None


def tile_reasons(channels: int, k: int) -> list[str]:
    """Reasons why no tile holds the channels of a row and the columns of a window; an empty list if one does.

    Args:
        channels: C, with padding.
        k: of the reduction.
    """
    if k & (k - 1):
        return [f"k must be a power of two, got {k}"]
    if (size := k * _power_of_two(channels)) > 2 * ELEMENTS * 32 * MAX_WARPS:
        limit = 2 * ELEMENTS * 32 * MAX_WARPS
        return [f"k times the channels, rounded up to a power of two, must be at most {limit}, got {size}"]
    return []


def lpu_config(
    images: int, height: int, width: int, channels: int, itemsize: int, k: int, norm: bool, limits: DeviceLimits
) -> LPUConfig:
    """The tile for maps (images, height, width, channels).

    Args:
        itemsize: bytes of an element.
        k: of the reduction; 1 for none.
        norm: whether a LayerNorm follows, for which a program needs all channels.
        limits: of the device.
    """
    vector = 16 // itemsize  # channels of a thread: one load of 16 bytes
    block_c = _power_of_two(channels) if norm else min(_power_of_two(channels), 64)
    num_warps = 4
    while num_warps < MAX_WARPS and k * block_c > ELEMENTS * 32 * num_warps:
        num_warps *= 2
    columns = max(k, ELEMENTS * 32 * num_warps // block_c)
    threads_of_a_row = max(1, min(32 * num_warps, block_c // vector))
    adjacent = min(k, max(1, columns * threads_of_a_row // (32 * num_warps)))
    # Statistics across warps keep more values alive; two programs a multiprocessor are enough there.
    max_registers = 168 if num_warps == 4 and block_c <= 32 * vector else None
    programs_at_once = limits.multiprocessors * (REGISTERS // ((max_registers or 255) * 32 * num_warps))
    tiles = -(-images * (-(-width // k) * k) // columns) * -(-channels // block_c)
    windows = min(range(1, -(-height // k) + 1), key=lambda w: _cost(w, k, height, tiles / max(1, programs_at_once)))
    return LPUConfig(windows, columns, adjacent, block_c, num_warps, max_registers)


def _cost(windows: int, k: int, height: int, rounds: float) -> float:
    """Time of a strip height, in rows: all the work shared out, and half a program's at the end, when some have finished."""
    rows = min(windows * k, height) + _HALO_ROWS
    strips = -(-height // (windows * k))
    work = rounds * (height + strips * _HALO_ROWS)
    return max(rows, work + rows / 2)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
