"""A seeded head of a packed model with its input: what tests and benchmarks of its kernels run on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.inference import program
from cmt_fast.inference.program import Padding, round_up
from cmt_fast.inference.torch_steps import StepFunctions
from cmt_fast.testing.packed_double import in_double


@dataclass(frozen=True)
class HeadCall:
    """The arguments of :func:`cmt_fast.inference.torch_steps.head`."""

    step: program.Head
    x: Tensor

    def run(self, functions: StepFunctions) -> Tensor:
        """(B, classes), or the features before the classifier, (B, features) or (B, features, H, W)."""
        return functions.head(self.step, self.x)

    def double(self) -> HeadCall:
        """The same numbers in float64."""
        return in_double(self)


def head_call(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    features: int = 1280,
    hidden: int | None = None,
    classes: int | None = 1000,
    pool: bool = True,
    padding: Padding | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> HeadCall:
    """The head on a map of ``shape`` (B, H, W, C): activations of size 1 around 1, padded channels 0, no other term 0.

    Args:
        dtype: of the map and the weights; biases are float32.
        features: of the 1x1 convolution.
        hidden: width of the linear + tanh layer; None for none.
        classes: None for none.
        pool: whether the map is averaged.
        padding: of the widths, ``Padding()`` by default.
    """
    generator = torch.Generator().manual_seed(seed)
    multiple = (padding or Padding()).channels

    def normal(*sizes: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(sizes, generator=generator) * std + mean).to(device)

    def linear(inputs: int, outputs: int, multiple_out: int = multiple) -> tuple[Tensor, Tensor]:
        pad_in, pad_out = round_up(inputs, multiple) - inputs, round_up(outputs, multiple_out) - outputs
        weight = F.pad(normal(outputs, inputs, std=inputs**-0.5), (0, pad_in, 0, pad_out)).to(dtype)
        return weight, F.pad(normal(outputs, std=0.2), (0, pad_out))

    c = shape[-1]
    weight, bias = linear(c, features)
    width = features
    hidden_weight = hidden_bias = class_weight = class_bias = None
    if hidden is not None:
        (hidden_weight, hidden_bias), width = linear(width, hidden), hidden
    if classes is not None:
        class_weight, class_bias = linear(width, classes, multiple_out=1)
    step = program.Head(
        weight=weight,
        bias=bias,
        hidden_weight=hidden_weight,
        hidden_bias=hidden_bias,
        class_weight=class_weight,
        class_bias=class_bias,
        features=width,
        pool=pool,
    )
    x = F.pad(normal(*shape, mean=1.0), (0, round_up(c, multiple) - c))
    return HeadCall(step, x.to(dtype))
