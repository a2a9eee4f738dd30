"""The token grids of the four stages for an input size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Grid = tuple[int, int]


class StageGrid(NamedTuple):
    """Grid of the queries (every token) and of the keys (after the reduction) of one stage, as (H, W)."""

    query: Grid
    key: Grid

    @property
    def num_queries(self) -> int:
        return self.query[0] * self.query[1]

    @property
    def num_keys(self) -> int:
        return self.key[0] * self.key[1]


def image_size(size: int | Sequence[int]) -> Grid:
    """``224`` or ``(height, width)`` as (height, width).

    Raises:
        ValueError: if it is neither an integer nor two of them, or not positive.
    """
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"img_size must be a positive integer or (height, width), got {size!r}")
    return pair[0], pair[1]


def stage_grids(img_size: Grid, sr_ratios: Sequence[int]) -> list[StageGrid]:
    """Grids of the stages for an image of (H, W) pixels: the stem halves rounding up, each patch embedding rounding down.

    Raises:
        ValueError: if a stage would be left without a token or without a key.
    """
    h, w = ((side + 1) // 2 for side in img_size)
    grids = []
    for sr in sr_ratios:
        h, w = h // 2, w // 2
        grids.append(StageGrid((h, w), (h // sr, w // sr)))
    if any(0 in grid.query + grid.key for grid in grids):
        smallest = max(2 ** (2 + stage) * sr for stage, sr in enumerate(sr_ratios))
        raise ValueError(
            f"an image of {img_size[0]} x {img_size[1]} pixels leaves a stage without keys: "
            f"both sides must be at least {smallest - 1} pixels for sr_ratios {tuple(sr_ratios)}"
        )
    return grids
