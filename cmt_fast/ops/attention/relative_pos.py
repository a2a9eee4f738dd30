"""Resizing the dense relative position bias to another input size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cmt_fast.ops.checks import check_grid, shape_of

Grid = tuple[int, int]


def resize_relative_pos(
    bias: Tensor, query_grid: Grid, key_grid: Grid, new_query_grid: Grid, new_key_grid: Grid
) -> Tensor:
    """Resize a bias table separably and bicubically: first over the query grid, then over the key grid.

    The paper transfers B to another size "through bicubic interpolation". Both axes of B are flattened 2-D
    grids, so each is interpolated as the grid that it is; the result is linear in ``bias`` and differentiable.

    Args:
        bias: (h, Hq * Wq, Hk * Wk).
        query_grid, key_grid: (Hq, Wq) and (Hk, Wk) of ``bias``.
        new_query_grid, new_key_grid: the grids wanted.

    Returns:
        (h, Hq' * Wq', Hk' * Wk') in the dtype of ``bias``; ``bias`` itself where nothing changes.

    Raises:
        ValueError: if ``bias`` does not have the shape of its grids, or a grid is not two positive numbers.
        TypeError: if ``bias`` is not floating point.
    """
    check_grid("query_grid", query_grid)
    check_grid("key_grid", key_grid)
    check_grid("new_query_grid", new_query_grid)
    check_grid("new_key_grid", new_key_grid)
    (hq, wq), (hk, wk) = query_grid, key_grid
    if not isinstance(bias, Tensor) or bias.dim() != 3 or tuple(bias.shape[1:]) != (hq * wq, hk * wk):
        raise ValueError(
            f"bias must have shape (h, {hq * wq}, {hk * wk}) for query grid {query_grid} and key grid {key_grid}, got {shape_of(bias)}"
        )
    if not bias.is_floating_point():
        raise TypeError(f"bias must be floating point, got {bias.dtype}")
    same_queries, same_keys = _same(query_grid, new_query_grid), _same(key_grid, new_key_grid)
    if same_queries and same_keys:
        return bias
    dtype = bias.dtype
    if dtype.itemsize < 4:  # interpolation weights in 16 bit would cost accuracy for no speed
        bias = bias.float()
    if not same_queries:
        grid = bias.transpose(1, 2).unflatten(2, query_grid)  # (h, M, Hq, Wq)
        bias = F.interpolate(grid, new_query_grid, mode="bicubic").flatten(2).transpose(1, 2)  # (h, N', M)
    if not same_keys:
        grid = bias.unflatten(2, key_grid)  # (h, N', Hk, Wk)
        bias = F.interpolate(grid, new_key_grid, mode="bicubic").flatten(2)  # (h, N', M')
    return bias.to(dtype)


def _same(grid: Grid, other: Grid) -> bool:
    """Whether two grids are equal; a grid that is symbolic while tracing counts as different, so that one graph serves
    every size (resizing to the same size is the identity)."""
    if all(isinstance(side, int) for side in other):
        return grid == other
    return False
