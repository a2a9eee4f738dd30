"""Seeded IRFFN steps of a packed model with their inputs: what tests and benchmarks of its kernels run on."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.inference import program
from cmt_fast.inference.program import Padding, round_up
from cmt_fast.inference.torch_steps import StepFunctions
from cmt_fast.testing.shapes import StageShape

Step = TypeVar("Step", program.Expand, program.DepthwiseProject)


@dataclass(frozen=True)
class ExpandCall:
    """The arguments of :func:`cmt_fast.inference.torch_steps.expand`."""

    step: program.Expand
    z: Tensor

    def run(self, functions: StepFunctions) -> Tensor:
        """(B, H, W, R)."""
        return functions.expand(self.step, self.z)

    def double(self) -> ExpandCall:
        """The same numbers in float64."""
        return ExpandCall(_double(self.step), self.z.double())


@dataclass(frozen=True)
class DepthwiseProjectCall:
    """The arguments of :func:`cmt_fast.inference.torch_steps.depthwise_project`."""

    step: program.DepthwiseProject
    hidden: Tensor
    z: Tensor

    def run(self, functions: StepFunctions) -> Tensor:
        """(B, H, W, C)."""
        return functions.depthwise_project(self.step, self.hidden, self.z)

    def double(self) -> DepthwiseProjectCall:
        """The same numbers in float64."""
        return DepthwiseProjectCall(_double(self.step), self.hidden.double(), self.z.double())


def expand_call(
    shape: StageShape,
    dtype: torch.dtype,
    *,
    padding: Padding | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> ExpandCall:
    """The expansion of one block at ``shape``: activations of size 1 around 1, padded channels 0, no other term 0.

    Args:
        dtype: of maps and matrix; the vectors are float32.
        padding: of the widths, ``Padding()`` by default.
    """
    make = _Maker(padding or Padding(), device, seed)
    c, r = shape.dim, shape.hidden
    step = program.Expand(
        weight=make(r, c, std=c**-0.5, dtype=dtype, pad=(make.padding.hidden, make.padding.channels)),
        bias=make(r, std=0.2, pad=(make.padding.hidden,)),
        scale=make(r, std=0.3, mean=1.0, pad=(make.padding.hidden,)),
        shift=make(r, std=0.2, pad=(make.padding.hidden,)),
        channels=c,
        eps=1e-6,
    )
    return ExpandCall(step, make.map(shape, c, make.padding.channels, dtype))


def depthwise_project_call(
    shape: StageShape,
    dtype: torch.dtype,
    *,
    padding: Padding | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> DepthwiseProjectCall:
    """The rest of the IRFFN of one block at ``shape``: activations of size 1 around 1, padded channels 0, no other term 0.

    Arguments as of :func:`expand_call`.
    """
    make = _Maker(padding or Padding(), device, seed)
    c, r = shape.dim, shape.hidden
    step = program.DepthwiseProject(
        taps=make(9, r, std=1 / 3, pad=(1, make.padding.hidden)),
        bias=make(r, std=0.2, pad=(make.padding.hidden,)),
        weight=make(c, r, std=r**-0.5, dtype=dtype, pad=(make.padding.channels, make.padding.hidden)),
        out_bias=make(c, std=0.2, pad=(make.padding.channels,)),
    )
    hidden = make.map(shape, r, make.padding.hidden, dtype)
    return DepthwiseProjectCall(step, hidden, make.map(shape, c, make.padding.channels, dtype))


class _Maker:
    """Random tensors, padded with zeros."""

    def __init__(self, padding: Padding, device: torch.device | str, seed: int) -> None:
        self.padding, self.device = padding, device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(
        self,
        *sizes: int,
        pad: tuple[int, ...],
        std: float = 1.0,
        mean: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """``pad``: the multiple that each dimension is padded to."""
        x = torch.randn(sizes, generator=self.generator) * std + mean
        zeros = [(0, round_up(size, multiple) - size) for size, multiple in zip(sizes, pad)]
        return F.pad(x, [n for pair in reversed(zeros) for n in pair]).to(self.device, dtype)

    def map(self, shape: StageShape, channels: int, multiple: int, dtype: torch.dtype) -> Tensor:
        sizes = (shape.batch, shape.height, shape.width, channels)
        return self(*sizes, pad=(1, 1, 1, multiple), mean=1.0, dtype=dtype)


def _double(step: Step) -> Step:
    tensors = {f.name: t.double() for f in fields(step) if isinstance(t := getattr(step, f.name), Tensor)}
    return replace(step, **tensors)  # type: ignore[arg-type]
