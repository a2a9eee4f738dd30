"""The launches of each kernel in each stage of a packed model, from tensors without memory. A new kernel is one line in ``LAUNCHES``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from cmt_fast.inference.program import Padding, round_up
from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops.lpu.triton_launch import lpu_reduce_launch
from cmt_fast.testing.shapes import StageShape

#: A stage (with its batch), the dtype of the stream, and the device to choose tiles for.
MakeLaunches = Callable[[StageShape, torch.dtype, DeviceLimits], list[Launch]]

_PAD = Padding()
_vector = partial(torch.empty, device="meta", dtype=torch.float32)


def lpu(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    c, k = round_up(shape.dim, _PAD.channels), shape.sr_ratio
    x = torch.empty(shape.batch, shape.height, shape.width, c, dtype=dtype, device="meta")
    reduced = x.new_empty(shape.batch, shape.height // k, shape.width // k, c)
    reduction = _vector(k * k, c) if k > 1 else None
    return [lpu_reduce_launch(x, _vector(9, c), _vector(c), reduction, x, reduced, k, shape.dim, 1e-6, limits)]


LAUNCHES: dict[str, MakeLaunches] = {
    "lpu": lpu,
}
