"""Rules that the launch configurations of several operations share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any, TypeVar

from cmt_fast.ops._triton.device import DeviceLimits

C = TypeVar("C")

#: The least side of a tile that tensor cores multiply.
LEAST_BLOCK = 16


def block(size: int) -> int:
    """The side of the tile that holds ``size`` elements: a power of 2, as Triton wants it."""
    return max(LEAST_BLOCK, power_of_two(size))


def power_of_two(size: int) -> int:
    """The least that holds ``size`` elements."""
    return 1 << (size - 1).bit_length()


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


def around(size: int, least: int, most: int) -> list[int]:
    """Half of ``size``, itself, twice as much, as far as they lie in ``least .. most``: values worth measuring beside a rule's."""
    return [near for near in (size // 2, size, 2 * size) if least <= near <= most]


def neighbours(config: C, **values: Iterable[Any]) -> Iterator[C]:
    """The configurations that differ from ``config`` in one or two fields.

    Args:
        config: a dataclass.
        values: that each field may have instead.
    """
    changes = [(name, value) for name, options in values.items() for value in options if value != getattr(config, name)]
    for change in changes:
        yield replace(config, **dict([change]))  # type: ignore[type-var]
    for one, other in combinations(changes, 2):
        if one[0] != other[0]:
            yield replace(config, **dict([one, other]))  # type: ignore[type-var]


def map_blocks(channels: int, elements: int) -> tuple[int, int]:
    """Rows and channels of a tile of so many elements of a map (rows, channels), for ``tiles.map_tile``."""
    block_c = min(power_of_two(channels), 128)
    return elements // block_c, block_c
