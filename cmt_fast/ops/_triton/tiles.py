"""Tiles of row-major matrices."""

import triton
import triton.language as tl


@triton.jit
def load_tile(matrix, stride, row, rows, column, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The tile of a matrix (rows, columns) that starts at (row, column); 0 outside of the matrix.

    Args:
        matrix: pointer to its first element; unit stride in a row, rows ``stride`` elements apart.

    Returns:
        (BLOCK_ROWS, BLOCK_COLUMNS) in the matrix's dtype.
    """
    i, j = row + tl.arange(0, BLOCK_ROWS)[:, None], column + tl.arange(0, BLOCK_COLUMNS)[None, :]
    return tl.load(matrix + i.to(tl.int64) * stride + j, (i < rows) & (j < columns), 0.0)


@triton.jit
def store_tile(matrix, tile, stride, rows, columns):
    """A tile into the first ``rows`` and ``columns`` of a matrix, in its dtype; what of the tile lies outside of them is dropped.

    Args:
        matrix: pointer to where the tile starts; unit stride in a row, rows ``stride`` elements apart.
        tile: (any, any).
    """
    i, j = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    tl.store(matrix + i.to(tl.int64) * stride + j, tile.to(matrix.dtype.element_ty), (i < rows) & (j < columns))


@triton.jit
def map_tile(rows, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """The tile of this program of a map (rows, C), on a grid of one axis that goes through the channels first.

    Returns:
        Which tile of rows it is; rows (BLOCK_N, 1), channels (BLOCK_C,); 64-bit offsets into the map, and which elements are inside of it.
    """
    tiles = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0) // tiles
    row = program * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    return program, row, c, row.to(tl.int64) * C + c[None, :], (row < rows) & (c < C)[None, :]
