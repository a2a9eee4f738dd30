"""A packed model laid out for the CPU kernels: matrices in panels, vectors padded to whole panels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.backend import BackendError
from cmt_fast.inference import program
from cmt_fast.inference.native.linear_steps import NATIVE_BETWEEN
from cmt_fast.inference.native.reasons import native_reasons
from cmt_fast.inference.native.schema import PANEL
from cmt_fast.inference.native.steps import NATIVE
from cmt_fast.inference.program import PackedModel, round_up
from cmt_fast.inference.torch_steps import StepFunctions


@dataclass(frozen=True)
class Panels:
    """A matrix (out, in) as the kernels read it; asked for its shape it answers as the matrix would.

    Attributes:
        data: (ceil(out / 16), in, 16), zeros beyond ``out``: what a kernel reads while it goes through ``in`` lies in one run.
        shape: of the matrix; of a convolution (out, 3, 3, in).
    """

    data: Tensor
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device


@dataclass(frozen=True)
class PaddedVector:
    """A vector (out,) with zeros after it up to the end of the last panel."""

    data: Tensor
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]


def prepare(packed: PackedModel) -> tuple[PackedModel, StepFunctions]:
    """The program with its weights laid out for the kernels, and the kernels as its functions.

    Nothing of ``packed`` is shared but what needs no layout (taps, tables), so that it can be freed. Where PyTorch has faster
    matrix products than the compiled library, they stay with PyTorch, and the program is as it was.

    Raises:
        BackendError: if the compiled library cannot run ``packed``; the message says why.
    """
    if reasons := native_reasons(packed.device, packed.dtype):
        raise BackendError(f"the compiled library cannot run this packed model: {'; '.join(reasons)}")
    if packed.dtype == torch.bfloat16 and multiplies_bfloat16():
        return packed, NATIVE_BETWEEN
    return _lay_out(packed), NATIVE


def multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 arithmetic that PyTorch's matrix products use (AVX-512 BF16, AMX)."""
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, test, bool)() for test in tests)


#: Vectors that a product's last panel reads beyond its outputs. Those of a depthwise convolution are read by channels.
_PANEL_VECTORS = {
    program.Stem: ("bias1", "scale1", "shift1", "bias2", "scale2", "shift2", "bias3"),
    program.PatchEmbed: ("bias", "scale", "shift"),
    program.Attention: ("query_bias", "out_bias"),
    program.Expand: ("bias", "scale", "shift"),
    program.DepthwiseProject: ("out_bias",),
    program.Head: ("bias", "hidden_bias", "class_bias"),
}


def _lay_out(node: Any) -> Any:
    """``node`` with every matrix and panel vector below it laid out."""
    if isinstance(node, tuple):
        return tuple(_lay_out(item) for item in node)
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return node
    changes = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if not isinstance(value, Tensor):
            changes[field.name] = _lay_out(value)
        elif "weight" in field.name:
            changes[field.name] = panels(value)
        elif field.name in _PANEL_VECTORS.get(type(node), ()):
            padded = F.pad(value, (0, round_up(len(value), PANEL) - len(value)))
            changes[field.name] = PaddedVector(padded, tuple(value.shape))
    return dataclasses.replace(node, **changes)


def panels(weight: Tensor) -> Panels:
    """(out, ...) to panels; the other dimensions are one after the other what a product sums over."""
    matrix = weight.flatten(1)
    padded = F.pad(matrix, (0, 0, 0, round_up(len(matrix), PANEL) - len(matrix)))
    return Panels(padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous(), tuple(weight.shape))
