"""A seeded stem of a packed model with its image: what tests and benchmarks of its kernels run on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.inference import program
from cmt_fast.inference.program import Padding, round_up
from cmt_fast.inference.torch_steps import StepFunctions
from cmt_fast.testing.packed_double import in_double
from cmt_fast.testing.packed_patch_embed import patch_embed_call


@dataclass(frozen=True)
class StemCall:
    """The arguments of :func:`cmt_fast.inference.torch_steps.stem`."""

    step: program.Stem
    x: Tensor

    def run(self, functions: StepFunctions) -> Tensor:
        """(B, ceil(H / 2), ceil(W / 2), S)."""
        return functions.stem(self.step, self.x)

    def double(self) -> StemCall:
        """The same numbers in float64."""
        return in_double(self)


@dataclass(frozen=True)
class StemEmbedCall:
    """A stem and the patch embedding that follows it."""

    step: program.Stem
    embed: program.PatchEmbed
    x: Tensor

    def run(self, functions: StepFunctions) -> Tensor:
        """(B, ceil(H / 2) // 2, ceil(W / 2) // 2, C)."""
        if functions.stem_embed is None:
            return functions.patch_embed(self.embed, functions.stem(self.step, self.x))
        return functions.stem_embed(self.step, self.embed, self.x)

    def double(self) -> StemEmbedCall:
        """The same numbers in float64."""
        return in_double(self)


def stem_embed_call(
    shape: tuple[int, int, int, int],
    width: int,
    dim: int,
    dtype: torch.dtype,
    *,
    padding: Padding | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> StemEmbedCall:
    """A :func:`stem_call` with an embedding in ``dim`` channels."""
    stem = stem_call(shape, width, dtype, padding=padding, device=device, seed=seed)
    embed = patch_embed_call((0, 2, 2, width), dim, dtype, padding=padding, device=device, seed=seed)
    return StemEmbedCall(stem.step, embed.step, stem.x)


def stem_call(
    shape: tuple[int, int, int, int],
    width: int,
    dtype: torch.dtype,
    *,
    padding: Padding | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> StemCall:
    """A stem of ``width`` channels on an image of ``shape`` (B, in_chans, H, W): activations of size 1, padded channels 0, no other term 0.

    Args:
        dtype: of the image and the weights; biases and affines are float32.
        padding: of the width, ``Padding()`` by default.
    """
    generator = torch.Generator().manual_seed(seed)
    pad = round_up(width, (padding or Padding()).channels) - width
    chans = shape[1]

    def normal(*sizes: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(sizes, generator=generator) * std + mean).to(device)

    def weight(inputs: int, inner_pad: int) -> Tensor:
        w = normal(width, 3, 3, inputs, std=(9 * inputs) ** -0.5)
        return F.pad(w, (0, inner_pad, 0, 0, 0, 0, 0, pad)).to(dtype)

    def vector(std: float, mean: float = 0.0) -> Tensor:
        return F.pad(normal(width, std=std, mean=mean), (0, pad))

    step = program.Stem(
        weight1=weight(chans, 0),
        bias1=vector(0.2),
        scale1=vector(0.3, 1.5),
        shift1=vector(0.3, -0.5),
        weight2=weight(width, pad),
        bias2=vector(0.2),
        scale2=vector(0.3, 1.5),
        shift2=vector(0.3, -0.5),
        weight3=weight(width, pad),
        bias3=vector(0.2),
    )
    return StemCall(step, normal(*shape).to(dtype))
