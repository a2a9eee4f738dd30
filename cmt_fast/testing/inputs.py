"""Seeded inputs: each operation as a module, so that verification, tests and benchmarks treat ops and models alike.

A case owns its parameters as float32; :meth:`Case.instance` rounds parameters and inputs to the low dtype before anything
runs, so a float64 copy of an instance differs from it in arithmetic alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from cmt_fast import functional
from cmt_fast.models.cmt import CMT
from cmt_fast.modules import IRFFN, LMHSA
from cmt_fast.testing.precision import Precision
from cmt_fast.testing.shapes import ODD_SHAPES, QUICK_SHAPES, SMALL_MODELS, StageShape

M = TypeVar("M", bound=nn.Module)


class DepthwiseConv3x3(nn.Module):
    """:func:`cmt_fast.functional.depthwise_conv3x3` with its parameters."""

    def __init__(self, shape: StageShape, shortcut: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(shape.dim, shape.dim, 3, padding=1, groups=shape.dim, bias=shape.bias)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return functional.depthwise_conv3x3(x, self.conv.weight, self.conv.bias, shortcut=self.shortcut)


class DepthwiseReduce(nn.Module):
    """:func:`cmt_fast.functional.depthwise_reduce` with its parameters."""

    def __init__(self, shape: StageShape) -> None:
        super().__init__()
        k = shape.sr_ratio
        self.conv = nn.Conv2d(shape.dim, shape.dim, k, stride=k, groups=shape.dim, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.depthwise_reduce(x, self.conv.weight, self.conv.bias)


class ReducedKVAttention(nn.Module):
    """:func:`cmt_fast.functional.reduced_kv_attention` with its bias table."""

    def __init__(self, shape: StageShape, bias: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape.heads, shape.queries, shape.keys)) if bias else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # q arrives as (B, N, heads, d): the strides that a linear layer's output has
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return functional.reduced_kv_attention(q, k, v, self.bias)


class LPU(nn.Module):
    """:func:`cmt_fast.functional.lpu` with its convolution."""

    def __init__(self, shape: StageShape) -> None:
        super().__init__()
        self.conv = nn.Conv2d(shape.dim, shape.dim, 3, padding=1, groups=shape.dim, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.lpu(x, self.conv)


class LMHSASubLayer(nn.Module):
    """Attention with the norm and shortcut of a block: Z = Y + LMHSA(LN(Y)) on a map."""

    def __init__(self, shape: StageShape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.dim, eps=1e-6)
        self.attn = LMHSA(shape.dim, shape.heads, qkv_bias=shape.bias, qk_ratio=shape.qk_ratio, sr_ratio=shape.sr_ratio)
        self.relative_pos = nn.Parameter(torch.zeros(shape.heads, shape.queries, shape.keys))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        tokens = self.attn(x.flatten(1, 2), height, width, self.relative_pos, norm=self.norm, shortcut=True)
        return tokens.unflatten(1, (height, width))


class IRFFNSubLayer(nn.Module):
    """Feed-forward network with the norm and shortcut of a block: X = Z + IRFFN(LN(Z)) on a map."""

    def __init__(self, shape: StageShape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.dim, eps=1e-6)
        self.mlp = IRFFN(shape.dim, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        tokens = self.mlp(x.flatten(1, 2), height, width, norm=self.norm, shortcut=True)
        return tokens.unflatten(1, (height, width))


class IRFFNLPUSubLayer(IRFFNSubLayer):
    """The feed-forward network as above, and the LPU of the next block: LPU(X)."""

    def __init__(self, shape: StageShape) -> None:
        super().__init__(shape)
        self.conv = nn.Conv2d(shape.dim, shape.dim, 3, padding=1, groups=shape.dim, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        tokens = self.mlp(x.flatten(1, 2), height, width, norm=self.norm, shortcut=True, lpu=self.conv)
        return tokens.unflatten(1, (height, width))


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        op: name of the operation, or ``cmt`` for a whole model.
        name: of the shape and options.
        build: makes the module.
        input_shapes: name and shape of each input.
        stateful: the module behaves differently in training and evaluation mode (BatchNorm).
        strided: the inputs are not contiguous.
    """

    op: str
    name: str
    build: Callable[[], nn.Module]
    input_shapes: Mapping[str, tuple[int, ...]]
    stateful: bool = False
    strided: bool = False

    def instance(
        self, precision: Precision, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """The module with random parameters and statistics, and its inputs, rounded to the precision's low dtype."""
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            module = randomise(self.build(), generator)
        draw = strided_randn if self.strided else torch.randn
        inputs = {name: draw(shape, generator=generator) for name, shape in self.input_shapes.items()}
        module = module.to(precision.low).to(device, precision.dtype)
        return module, {k: v.to(precision.low).to(device, precision.dtype) for k, v in inputs.items()}


def strided_randn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Like ``torch.randn``, with the dimensions reversed in memory."""
    return torch.randn(tuple(reversed(shape)), generator=generator).permute(*reversed(range(len(shape))))


def in_double(module: M) -> M:
    """A float64 copy: the same numbers, exact arithmetic."""
    return copy.deepcopy(module).double()


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Random parameters and statistics in place, such that activations keep their size and no term is trivial."""

    def normal(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Conv2d)):
            normal(child.weight, 1 / math.sqrt(child.weight[0].numel()))
            if child.bias is not None:
                normal(child.bias, 0.2)
        elif isinstance(child, (nn.LayerNorm, nn.BatchNorm2d)):
            if child.weight is not None:
                normal(child.weight, 0.2, 1.0)
            if child.bias is not None:
                normal(child.bias, 0.2)
        if isinstance(child, nn.BatchNorm2d) and child.running_mean is not None and child.running_var is not None:
            normal(child.running_mean, 0.2)
            child.running_var.copy_(torch.rand(child.running_var.shape, generator=generator) + 0.5)
    for parameter in module.parameters():
        if parameter.dim() == 3:  # the bias tables of attention
            normal(parameter, 1.0)
    return module


def op_cases(shapes: Sequence[StageShape] = ODD_SHAPES) -> list[Case]:
    """The cases of every operation of ``cmt_fast.functional`` at ``shapes``."""
    cases: list[Case] = []
    for s in shapes:
        x = {"x": (s.batch, s.height, s.width, s.dim)}
        qkv = {
            "q": (s.batch, s.queries, s.heads, s.qk_head_dim),
            "k": (s.batch, s.keys, s.heads, s.qk_head_dim),
            "v": (s.batch, s.keys, s.heads, s.v_head_dim),
        }
        cases += [
            Case("depthwise_conv3x3", s.name, partial(DepthwiseConv3x3, s, shortcut=False), x),
            Case("depthwise_conv3x3", f"{s.name}, shortcut", partial(DepthwiseConv3x3, s, shortcut=True), x),
            Case("reduced_kv_attention", s.name, partial(ReducedKVAttention, s, bias=s.bias), qkv),
            Case("lpu", s.name, partial(LPU, s), x),
            Case("lmhsa", s.name, partial(LMHSASubLayer, s), x, stateful=s.sr_ratio > 1),
            Case("irffn", s.name, partial(IRFFNSubLayer, s), x, stateful=True),
            Case("irffn_lpu", s.name, partial(IRFFNLPUSubLayer, s), x, stateful=True),
        ]
        if s.sr_ratio > 1:
            cases.append(Case("depthwise_reduce", s.name, partial(DepthwiseReduce, s), x))
    return cases + [
        replace(case, name=f"{case.name}, strided", strided=True) for case in cases if case.name == shapes[0].name
    ]


def model_cases() -> list[Case]:
    """Whole small models, batch 2."""
    cases: list[Case] = []
    for name, config in SMALL_MODELS.items():
        size = config["img_size"]
        height, width = size if isinstance(size, tuple) else (size, size)
        x = {"x": (2, 3, height, width)}
        cases.append(Case("cmt", name, partial(CMT, **config), x, stateful=True))
    return cases


def all_cases(quick: bool = False) -> list[Case]:
    """Every operation and the whole models; ``quick`` leaves out most shapes."""
    models = model_cases()
    return op_cases(QUICK_SHAPES if quick else ODD_SHAPES) + (models[1:] if quick else models)
