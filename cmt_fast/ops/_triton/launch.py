"""A kernel launch as plain data: made once from tensors, then run, compiled ahead of time, or counted.

A launcher (``ops/<op>/triton_launch.py``) turns the tensors of a call into a :class:`Launch` and runs it. The static table makes the same
launches from tensors on the ``meta`` device and compiles them without a GPU; a trace adds up their bytes and operations. So what is
checked, counted and run cannot differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmt_fast.backend import interpreting
from cmt_fast.ops._triton.interpreter import repair_interpreter

#: How the constants that make a tile begin.
_TILE_CONSTANTS = ("BLOCK", "WINDOWS", "PAIRS", "ROWS")


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: programs along each axis.
        arguments: what the kernel takes at run time, by parameter name: tensors, integers, floats, or None.
        constants: its ``tl.constexpr`` parameters by name.
        num_warps, num_stages: Triton's options.
        reads, writes: bytes that must move at least once; each input counts once, whatever caches do.
        flops: operations of the matrix products, 2 a multiply-add.
        elements: outputs of the elementwise part, that instruction counts are divided by.
        loops: how often each loop of the kernel runs a time it is entered, in the order of the source (an average where it
            differs between programs): instruction counts need it, a launch does not.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    reads: int
    writes: int
    flops: int
    elements: int
    loops: tuple[float, ...] = ()

    @property
    def tile(self) -> dict[str, Any]:
        """The constants that make a tile."""
        return {name: value for name, value in self.constants.items() if name.startswith(_TILE_CONSTANTS)}

    def run(self) -> None:
        """Launch on the current stream of the tensors' device (in Triton's interpreter: run)."""
        if interpreting():
            repair_interpreter()
        if _record is not None:
            _record.append(self)
            if any(isinstance(value, Tensor) and value.is_meta for value in self.arguments.values()):
                return
        self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)


_record: list[Launch] | None = None


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """The launches that run meanwhile in this process, in their order.

    Meanwhile kernels take tensors on the ``meta`` device, too: launches of those are recorded only.
    """
    global _record
    previous, _record = _record, []
    try:
        yield _record
    finally:
        _record = previous


def records(device: torch.device) -> bool:
    """Whether launches on ``device`` are recorded instead of run."""
    return _record is not None and device.type == "meta"
