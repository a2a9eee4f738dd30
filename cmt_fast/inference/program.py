"""The steps of a packed model: plain data, tensors laid out as kernels read them.

Notation: B images; (H, W) the token grid of a stage, N = H * W queries; M keys after the k x k reduction; h heads; C, R, S, F
channels of the stream, of the IRFFN's hidden map, of the stem and of the head. All of them are *padded* widths (see
:class:`Padding`): padded channels of every map are exactly 0, and a LayerNorm counts only the first ``channels`` of C.

Maps are (B, H, W, C), row-major. Matrices are (out, in) row-major and contiguous, in the dtype of the program; taps,
biases and affines are float32 where that dtype has 16 bits. :mod:`cmt_fast.inference.pack` makes the steps,
:mod:`cmt_fast.inference.torch_steps` says what each one computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.models.grids import Grid, stage_grids


@dataclass(frozen=True)
class Padding:
    """Multiples that widths are padded to, so that rows start at aligned addresses; 1 for no padding.

    Attributes:
        channels: for C, S and F.
        hidden: for R.
        head: for the q/k and v channels of each head.
    """

    channels: int = 8
    hidden: int = 16
    head: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Padding.{name} must be a positive integer, got {value!r}")


def round_up(width: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is at least ``width``."""
    return -(-width // multiple) * multiple


def align_rows(table: Tensor) -> Tensor:
    """``table`` (h, N, M) as a view of a longer one, its rows a multiple of 16 elements apart: kernels read them in whole vectors."""
    if table.stride(-1) == 1 and table.stride(-2) % 16 == 0:
        return table
    keys = table.shape[-1]
    return F.pad(table, (0, round_up(keys, 16) - keys))[..., :keys]


def _require(owner: object, sizes: Mapping[str, tuple[object, object]]) -> None:
    """Require (got, expected) to be equal for each description: no kernel ever meets steps that do not fit together."""
    for what, (got, expected) in sizes.items():
        if got != expected:
            raise ValueError(f"{type(owner).__name__}: {what} must be {expected} to fit the rest, got {got}")


class _Step:
    """What every step has: checks of its tensors' shapes."""

    def _expect(self, **shapes: tuple[int, ...]) -> None:
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None:
                _require(self, {f"the shape of {name}": (tuple(tensor.shape), shape)})


@dataclass(frozen=True)
class Stem(_Step):
    """Three 3x3 convolutions, the first with stride 2, each followed by GELU, the first two then by an affine.

    (B, in_chans, H, W) -> (B, ceil(H / 2), ceil(W / 2), S). The third affine is folded into the first patch embedding.

    Attributes:
        weight1: (S, 3, 3, in_chans), not padded along in_chans. weight2, weight3: (S, 3, 3, S).
        bias1, bias2, bias3, scale1, shift1, scale2, shift2: (S,).
    """

    weight1: Tensor
    bias1: Tensor
    scale1: Tensor
    shift1: Tensor
    weight2: Tensor
    bias2: Tensor
    scale2: Tensor
    shift2: Tensor
    weight3: Tensor
    bias3: Tensor

    def __post_init__(self) -> None:
        s, chans = self.weight1.shape[0], self.weight1.shape[-1]
        vectors = ("bias1", "scale1", "shift1", "bias2", "scale2", "shift2", "bias3")
        self._expect(weight1=(s, 3, 3, chans), weight2=(s, 3, 3, s), weight3=(s, 3, 3, s), **{v: (s,) for v in vectors})


@dataclass(frozen=True)
class PatchEmbed(_Step):
    """2x2 patches, one matrix product, LayerNorm. (B, H, W, C_in) -> (B, H // 2, W // 2, C).

    Attributes:
        weight: (C, 4 * C_in); a patch is its pixels (0, 0), (0, 1), (1, 0), (1, 1), each C_in channels.
        bias: (C,).
        scale, shift: (C,), LayerNorm's affine.
        channels: how many of C are not padding.
        eps: LayerNorm's.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor
    channels: int
    eps: float

    def __post_init__(self) -> None:
        c, patch = self.weight.shape
        self._expect(weight=(c, patch // 4 * 4), bias=(c,), scale=(c,), shift=(c,))


@dataclass(frozen=True)
class LPU(_Step):
    """Local perception unit, then LayerNorm and reduction: (B, H, W, C) -> the same, and (B, H // k, W // k, C).

    Attributes:
        taps: (9, C), row by row, 1 added to the centre tap for the shortcut.
        bias: (C,).
        reduction: (k * k, C), row by row, of the k x k convolution with stride k of the normalised map, which needs no
            bias; None for k = 1, where the normalised map itself is the second output.
        reduce: k.
        channels: how many of C are not padding.
        eps: LayerNorm's.
    """

    taps: Tensor
    bias: Tensor
    reduction: Tensor | None
    reduce: int
    channels: int
    eps: float

    def __post_init__(self) -> None:
        c = self.taps.shape[-1]
        self._expect(taps=(9, c), bias=(c,), reduction=(self.reduce**2, c))


@dataclass(frozen=True)
class KV(_Step):
    """Keys and values of an image by one matrix product: (B, M, C) -> (B, M, rows).

    The columns of the output: ``heads`` times ``key_dim`` of the keys, ``heads`` times ``value_dim`` of the values and, if
    absorbed, one key bias a head, padded with zeros. Absorbed keys are G_h and absorbed values V'_h (docs/math.md, section 10): both
    have C channels, the query and output projections are in them.

    Attributes:
        weight: (rows, C).
        heads, key_dim, value_dim: as above, widths padded.
        bias_dim: columns for the key biases, padded; 0 if not absorbed.
    """

    weight: Tensor
    heads: int
    key_dim: int
    value_dim: int
    bias_dim: int

    def __post_init__(self) -> None:
        if self.bias_dim and self.bias_dim < self.heads:
            raise ValueError(f"KV.bias_dim must be 0 or at least the {self.heads} heads, got {self.bias_dim}")
        rows = self.heads * (self.key_dim + self.value_dim) + self.bias_dim
        self._expect(weight=(rows, self.key_dim if self.bias_dim else self.weight.shape[-1]))


@dataclass(frozen=True)
class Attention(_Step):
    """LayerNorm, queries, softmax over the keys, output projection, shortcut. (B, H, W, C) -> (B, H, W, C).

    With absorbed keys and values there is neither a query nor an output weight.

    Attributes:
        query_weight: (heads * key_dim, C), the softmax's scale folded in; query_bias: (heads * key_dim,). Or None.
        out_weight: (C, heads * value_dim), or None.
        out_bias: (C,).
        heads: h.
        base2: the logits and the stage's table are in units of log 2: weights are 2^logit / sum, not e^logit / sum.
        channels: how many of C are not padding.
        eps: LayerNorm's.
    """

    query_weight: Tensor | None
    query_bias: Tensor | None
    out_weight: Tensor | None
    out_bias: Tensor
    heads: int
    base2: bool
    channels: int
    eps: float

    def __post_init__(self) -> None:
        parts = (self.query_weight, self.query_bias, self.out_weight)
        if any(part is None for part in parts) != all(part is None for part in parts):
            raise ValueError("Attention needs query_weight, query_bias and out_weight, or none of them")
        if self.query_weight is not None:
            self._expect(query_bias=(len(self.query_weight),))


@dataclass(frozen=True)
class Expand(_Step):
    """LayerNorm, 1x1 expansion, GELU, affine. (B, H, W, C) -> (B, H, W, R).

    Attributes:
        weight: (R, C), LayerNorm's affine folded in.
        bias, scale, shift: (R,).
        channels: how many of C are not padding.
        eps: LayerNorm's.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor
    channels: int
    eps: float

    def __post_init__(self) -> None:
        r = self.weight.shape[0]
        self._expect(bias=(r,), scale=(r,), shift=(r,))


@dataclass(frozen=True)
class DepthwiseProject(_Step):
    """3x3 depthwise convolution with shortcut, GELU, 1x1 projection, the block's shortcut. (B, H, W, R) -> (B, H, W, C).

    Attributes:
        taps: (9, R), row by row, 1 added to the centre tap.
        bias: (R,).
        weight: (C, R), two BatchNorms folded in.
        out_bias: (C,).
    """

    taps: Tensor
    bias: Tensor
    weight: Tensor
    out_bias: Tensor

    def __post_init__(self) -> None:
        c, r = self.weight.shape
        self._expect(taps=(9, r), bias=(r,), out_bias=(c,))


@dataclass(frozen=True)
class Head(_Step):
    """1x1 convolution, swish, average pool, (linear, tanh,) classifier. (B, H, W, C) -> (B, classes).

    Attributes:
        weight: (F, C), BatchNorm folded in; bias: (F,).
        hidden_weight: (P, F), hidden_bias: (P,), of the linear + tanh layer, or None.
        class_weight: (classes, P or F), not padded along classes; class_bias: (classes,). None without classes.
        features: width of the output without classes, not padded.
        pool: average over the map; False leaves (B, features, H, W).
    """

    weight: Tensor
    bias: Tensor
    hidden_weight: Tensor | None
    hidden_bias: Tensor | None
    class_weight: Tensor | None
    class_bias: Tensor | None
    features: int
    pool: bool

    def __post_init__(self) -> None:
        width = self.weight.shape[0]
        self._expect(bias=(width,))
        if self.hidden_weight is not None:
            self._expect(hidden_weight=(len(self.hidden_weight), width), hidden_bias=(len(self.hidden_weight),))
            width = self.hidden_weight.shape[0]
        if self.class_weight is not None:
            self._expect(class_weight=(len(self.class_weight), width), class_bias=(len(self.class_weight),))


@dataclass(frozen=True)
class Block:
    """The steps of one block, in their order. A step's input is the output of the one before, but for the shortcuts."""

    lpu: LPU
    kv: KV
    attention: Attention
    expand: Expand
    depthwise_project: DepthwiseProject

    def __post_init__(self) -> None:
        c, r, h = len(self.lpu.bias), len(self.expand.bias), self.attention.heads
        kv, query, out = self.kv, self.attention.query_weight, self.attention.out_weight
        sizes: dict[str, tuple[object, object]] = {
            "kv.heads": (kv.heads, h),
            "columns of kv.weight": (kv.weight.shape[1], c),
            "rows of attention.out_bias": (len(self.attention.out_bias), c),
            "columns of expand.weight": (self.expand.weight.shape[1], c),
            "the shape of depthwise_project.weight": (tuple(self.depthwise_project.weight.shape), (c, r)),
        }
        if query is None or out is None:
            sizes["channels of absorbed values"] = (kv.value_dim if kv.bias_dim else 0, c)
        else:
            sizes["kv.bias_dim"] = (kv.bias_dim, 0)
            sizes["the shape of attention.query_weight"] = (tuple(query.shape), (h * kv.key_dim, c))
            sizes["the shape of attention.out_weight"] = (tuple(out.shape), (c, h * kv.value_dim))
        _require(self, sizes)
        if not 0 < self.lpu.channels <= c:
            raise ValueError(f"Block: lpu.channels must be 1 to {c}, got {self.lpu.channels}")
        for step in (self.lpu, self.attention, self.expand):
            _require(step, {"channels": (step.channels, self.lpu.channels)})


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        patch_embed: the step before the blocks.
        table: (h, N, M), the position bias of all its blocks, at the program's ``img_size``.
        blocks: at least one.
    """

    patch_embed: PatchEmbed
    table: Tensor
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("a stage needs at least one block")
        embed, first = self.patch_embed, self.blocks[0]
        for block in self.blocks:
            sizes = (len(block.lpu.bias), block.lpu.channels, block.lpu.reduce, block.attention.heads)
            expected = (len(embed.bias), embed.channels, first.lpu.reduce, len(self.table))
            _require(self, {"width, channels, k and heads of a block": (sizes, expected)})


@dataclass(frozen=True)
class PackedModel:
    """A CMT as a program: what :func:`cmt_fast.inference.pack` makes and :func:`cmt_fast.inference.run` runs.

    Attributes:
        stem: the first step.
        stages: up to four.
        head: the last step, or None in a program that returns feature maps.
        out_indices: the stages whose maps are returned; empty with a head.
        img_size: (height, width) of the input that the tables are made for; other sizes run too.
        in_chans: channels of the input.
    """

    stem: Stem
    stages: tuple[Stage, ...]
    head: Head | None
    out_indices: tuple[int, ...]
    img_size: Grid
    in_chans: int

    def __post_init__(self) -> None:
        _require(self.stem, {"columns of weight1": (self.stem.weight1.shape[-1], self.in_chans)})
        width = len(self.stem.bias1)
        for stage, grid in zip(self.stages, stage_grids(self.img_size, self.sr_ratios)):
            _require(stage.patch_embed, {"columns of weight": (stage.patch_embed.weight.shape[1], 4 * width)})
            heads = stage.blocks[0].attention.heads
            table = (heads, grid.num_queries, grid.num_keys)
            _require(stage, {"the shape of table": (tuple(stage.table.shape), table)})
            width = len(stage.patch_embed.bias)
        if self.head is not None:
            _require(self.head, {"columns of weight": (self.head.weight.shape[1], width)})
        if not all(0 <= i < len(self.stages) for i in self.out_indices):
            raise ValueError(f"out_indices must name some of {len(self.stages)} stages, got {self.out_indices}")
        if (self.head is None) != bool(self.out_indices):
            raise ValueError("a packed model needs either a head or out_indices")

    @property
    def dtype(self) -> torch.dtype:
        """Of the maps and matrices."""
        return self.stem.weight1.dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.stem.weight1.device

    @property
    def sr_ratios(self) -> tuple[int, ...]:
        """k of each stage."""
        return tuple(stage.blocks[0].lpu.reduce for stage in self.stages)
