"""Rules for kernels that slide down the rows of a map (``sliding.py``)."""

from __future__ import annotations

from collections.abc import Sequence

#: Rows of a map that a strip reads beside its own: what it costs whatever its length, in units of the work on a row.
HALO_ROWS = 2


def map_reasons(shape: Sequence[int], k: int, columns: int) -> list[str]:
    """Reasons why offsets of a tile into a map (B, H, W, C) would not fit; an empty list if they do.

    Args:
        shape: of the map.
        k: an image's columns are padded to a multiple of it.
        columns: that a tile has at most.
    """
    images, height, width, channels = shape
    reasons = []
    if (elements := height * (width + columns) * channels) >= 2**31:
        reasons.append(f"the map of one image must have less than 2^31 elements, got {elements} with what a tile adds")
    if (total := images * (width + k)) >= 2**30:
        reasons.append(f"images times columns must be less than 2^30, got {total}")
    return reasons


def strip_length(height: int, k: int, rounds: float, overhead: int = HALO_ROWS) -> int:
    """How many times k rows a program slides down, so that a launch takes the least time.

    Args:
        height: of a map.
        k: rows that belong together.
        rounds: how often the device is full with programs of whole maps.
        overhead: what a strip costs whatever its length, in rows.
    """
    return min(range(1, -(-height // k) + 1), key=lambda length: _cost(length * k, height, rounds, overhead))


def strip_programs(images: int, height: int, width: int, rows: int, pairs: int) -> int:
    """How many programs a tile of channels of maps (images, height, width, channels) has: strips of ``rows`` rows, of ``pairs`` pairs of columns."""
    return -(-height // rows) * -(-images * width // (2 * pairs))


def _cost(length: int, height: int, rounds: float, overhead: int) -> float:
    """Time of a strip of ``length`` rows, in rows: all the work shared out, and half a program's at the end, when some have finished."""
    rows = min(length, height) + overhead
    strips = -(-height // length)
    work = rounds * (height + strips * overhead)
    return max(rows, work + rows / 2)
