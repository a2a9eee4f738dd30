"""Sums over programs, in a fixed order: each program writes its part, and a kernel adds the parts by index."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cmt_fast.ops._triton.launch import Launch

#: Elements that a program of :func:`sum_parts_kernel` adds up: 16 bytes a thread and part where they are 16 bit.
BLOCK = 512


@triton.jit
def sum_parts_kernel(
    parts, out, count, rows, ROW: tl.constexpr, COLUMNS: tl.constexpr, OUT_ROW: tl.constexpr, BLOCK: tl.constexpr
):
    """out[r, c] = parts[0, r, c] + parts[1, r, c] + ... in float32, rounded once at the end.

    Args:
        parts: (count, rows, ROW), contiguous.
        out: (rows, COLUMNS), its rows OUT_ROW apart; COLUMNS <= ROW.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first = start // ROW
    i = (start - first * ROW).to(tl.int32) + tl.arange(0, BLOCK)  # from the first row on: divided in 32 bit
    inside = i < (rows - first) * ROW
    total = tl.zeros([BLOCK], tl.float32)
    parts += first * ROW
    for _ in tl.range(count, loop_unroll_factor=4):  # four loads are on their way at once
        total += tl.load(parts + i, inside, 0.0).to(tl.float32)
        parts += tl.cast(rows, tl.int64) * ROW  # a number where it is 1
    column = i % ROW
    tl.store(out + (first + i // ROW) * OUT_ROW + column, total.to(out.dtype.element_ty), inside & (column < COLUMNS))


def sum_parts_launch(parts: Tensor, out: Tensor) -> Launch:
    """parts (count, ..., row), contiguous, added up into out (..., columns), whose rows are equally far apart; columns <= row."""
    row, columns = parts.shape[-1], out.shape[-1]
    rows = out.numel() // columns
    return Launch(
        kernel=sum_parts_kernel,
        grid=(-(-rows * row // BLOCK),),
        arguments=dict(parts=parts, out=out, count=len(parts), rows=rows),
        constants=dict(ROW=row, COLUMNS=columns, OUT_ROW=out.stride(-2), BLOCK=BLOCK),
        num_warps=2,
        num_stages=1,
        reads=parts.nbytes,
        writes=out.nbytes,
        flops=0,
        elements=parts.numel(),
    )


def whole_vectors(columns: int, itemsize: int) -> int:
    """``columns`` of a row of parts, rounded up to 16 bytes: so rows are written and read in whole vectors."""
    return -(-columns * itemsize // 16) * 16 // itemsize
