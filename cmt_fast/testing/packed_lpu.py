"""A seeded LPU step of a packed model with its input: what tests and benchmarks of its kernels run on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.inference import program
from cmt_fast.inference.program import Padding, round_up
from cmt_fast.inference.torch_steps import StepFunctions
from cmt_fast.testing.shapes import StageShape


@dataclass(frozen=True)
class LPUCall:
    """The arguments of :func:`cmt_fast.inference.torch_steps.lpu`."""

    step: program.LPU
    x: Tensor

    def run(self, functions: StepFunctions) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) and (B, H // k, W // k, C)."""
        return functions.lpu(self.step, self.x)

    def double(self) -> LPUCall:
        """The same numbers in float64."""
        step = self.step
        reduction = None if step.reduction is None else step.reduction.double()
        return LPUCall(
            replace(step, taps=step.taps.double(), bias=step.bias.double(), reduction=reduction), self.x.double()
        )


def lpu_call(
    shape: StageShape,
    dtype: torch.dtype,
    *,
    padding: Padding | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LPUCall:
    """The LPU of one block at ``shape``: activations of size 1 around 1, padded channels 0, no other term 0.

    Args:
        dtype: of the maps; the step is float32.
        padding: of the widths, ``Padding()`` by default.
    """
    generator = torch.Generator().manual_seed(seed)
    c, k = shape.dim, shape.sr_ratio
    pad = round_up(c, (padding or Padding()).channels) - c

    def normal(*sizes: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        x = torch.randn(*sizes, c, generator=generator) * std + mean
        return F.pad(x, (0, pad)).to(device)

    step = program.LPU(
        taps=normal(9, std=1 / 3),
        bias=normal(std=0.2),
        reduction=normal(k * k, std=1 / k) if k > 1 else None,
        reduce=k,
        channels=c,
        eps=1e-6,
    )
    return LPUCall(step, normal(shape.batch, shape.height, shape.width, mean=1.0).to(dtype))
