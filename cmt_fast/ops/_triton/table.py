"""How a kernel reads a position bias table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
