"""How a kernel reads a position bias table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

#: Elements that the rows of an aligned table are a multiple of: what Triton takes for the alignment of a number.
_ROW = 16

#: Keys that make a row short: every image of a batch reads all of the table, so that copying it pays.
_FEW_KEYS = 64


@dataclass(frozen=True)
class TableLayout:
    """Strides of a table (h, N, M), and how many columns of a row may be read.

    M is odd in most models, and a row that starts at an odd element is read element by element. A table that is a view of
    one with longer rows, ``longer[..., :M]``, can be read in whole vectors: what lies beyond M is ignored.

    Attributes:
        head, row: elements between heads and between rows.
        columns: at least M.
    """

    head: int
    row: int
    columns: int


def table_layout(table: Tensor) -> TableLayout:
    """Of a table with unit stride in a row."""
    h, n, m = table.shape
    head, row, _ = table.stride()
    last_row = table.storage_offset() + (h - 1) * head + (n - 1) * row
    readable = row > m and last_row + row <= table.untyped_storage().nbytes() // table.element_size()
    return TableLayout(head, row, row if readable else m)


def aligned(table: Tensor) -> Tensor:
    """``table`` as kernels read it best: with rows in whole vectors, a view of longer ones, copied unless it is one already.

    A table for many keys is copied only if it has no unit stride in a row: it is large, and its rows are long.
    """
    h, n, m = table.shape
    if table.stride(2) == 1 and (m > _FEW_KEYS or (table.stride(1) % _ROW == 0 and table.storage_offset() % _ROW == 0)):
        return table
    if m > _FEW_KEYS:
        return table.contiguous()
    return table.new_zeros(h, n, -(-m // _ROW) * _ROW)[..., :m].copy_(table)
