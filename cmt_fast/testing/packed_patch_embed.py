"""A seeded patch embedding of a packed model with its input: what tests and benchmarks of its kernel run on."""

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
class PatchEmbedCall:
    """The arguments of :func:`cmt_fast.inference.torch_steps.patch_embed`."""

    step: program.PatchEmbed
    x: Tensor

    def run(self, functions: StepFunctions) -> Tensor:
        """(B, H // 2, W // 2, C)."""
        return functions.patch_embed(self.step, self.x)

    def double(self) -> PatchEmbedCall:
        """The same numbers in float64."""
        return in_double(self)


def patch_embed_call(
    shape: tuple[int, int, int, int],
    dim: int,
    dtype: torch.dtype,
    *,
    padding: Padding | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PatchEmbedCall:
    """The embedding of a map of ``shape`` (B, H, W, C_in) in ``dim`` channels: activations of size 1 around 1, padded channels 0, no other term 0.

    Args:
        dtype: of the map and the weight; biases and affines are float32.
        padding: of the widths, ``Padding()`` by default.
    """
    generator = torch.Generator().manual_seed(seed)
    multiple = (padding or Padding()).channels
    c_in = shape[-1]
    pad_in, pad = round_up(c_in, multiple) - c_in, round_up(dim, multiple) - dim

    def normal(*sizes: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(sizes, generator=generator) * std + mean).to(device)

    weight = F.pad(normal(dim, 4, c_in, std=(4 * c_in) ** -0.5), (0, pad_in, 0, 0, 0, pad))
    step = program.PatchEmbed(
        weight=weight.flatten(1).to(dtype),
        bias=F.pad(normal(dim, std=0.5), (0, pad)),
        scale=F.pad(normal(dim, std=0.3, mean=1.0), (0, pad)),
        shift=F.pad(normal(dim, std=0.3), (0, pad)),
        channels=dim,
        eps=1e-5,
    )
    return PatchEmbedCall(step, F.pad(normal(*shape, mean=1.0), (0, pad_in)).to(dtype))
