"""Schemas and fake implementations of the steps in ``csrc/cpu/packed``: all that tracing needs, nothing compiled.

Maps are (B, H, W, C) in float32 or bfloat16, contiguous. A weight (out, in) comes in panels of 16 outputs, (ceil(out / 16), in, 16), in the dtype
of the maps; biases and affines in float32, with zeros up to the end of the last panel (:mod:`cmt_fast.inference.native.layout`). The boxing of the C++ side
reads arguments by position without checking their types, so a change of a schema here is a change of ``csrc/cpu/packed/ops.h``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.inference.program import round_up

#: Outputs of a panel: one vector of AVX-512, two of AVX2 (csrc/cpu/gemm.h).
PANEL = 16

_SCHEMAS = {
    "packed_linear": "(Tensor x, Tensor weight, Tensor bias, int out) -> Tensor",
    "packed_conv3x3_gelu": (
        "(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, int out, int stride) -> Tensor"
    ),
    "packed_patch_embed": (
        "(Tensor x, Tensor weight, Tensor bias, Tensor scale, Tensor shift, int out, int channels, float eps) -> Tensor"
    ),
    "packed_lpu": (
        "(Tensor x, Tensor taps, Tensor bias, Tensor? reduction, int k, int channels, float eps) -> (Tensor, Tensor)"
    ),
    "packed_attention": (
        "(Tensor y, Tensor keys_values, Tensor table, Tensor? query_weight, Tensor? query_bias, Tensor? out_weight, "
        "Tensor out_bias, int heads, int key_dim, int value_dim, int channels, float eps, bool base2) -> Tensor"
    ),
    "packed_attention_core": (
        "(Tensor q, Tensor keys_values, Tensor table, int heads, int key_dim, int value_dim, bool base2) -> Tensor"
    ),
    "packed_normalise": "(Tensor x, int channels, float eps) -> Tensor",
    "packed_gelu_affine": "(Tensor x, Tensor scale, Tensor shift) -> Tensor",
    "packed_depthwise_gelu": "(Tensor hidden, Tensor taps, Tensor bias) -> Tensor",
    "packed_expand": (
        "(Tensor x, Tensor weight, Tensor bias, Tensor scale, Tensor shift, int out, int channels, float eps) -> Tensor"
    ),
    "packed_depthwise_project": (
        "(Tensor hidden, Tensor shortcut, Tensor taps, Tensor bias, Tensor weight, Tensor out_bias) -> Tensor"
    ),
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"cmt_fast_native::{_name}", _schema)

packed_linear = torch.ops.cmt_fast_native.packed_linear.default
packed_conv3x3_gelu = torch.ops.cmt_fast_native.packed_conv3x3_gelu.default
packed_patch_embed = torch.ops.cmt_fast_native.packed_patch_embed.default
packed_lpu = torch.ops.cmt_fast_native.packed_lpu.default
packed_attention = torch.ops.cmt_fast_native.packed_attention.default
packed_attention_core = torch.ops.cmt_fast_native.packed_attention_core.default
packed_normalise = torch.ops.cmt_fast_native.packed_normalise.default
packed_gelu_affine = torch.ops.cmt_fast_native.packed_gelu_affine.default
packed_depthwise_gelu = torch.ops.cmt_fast_native.packed_depthwise_gelu.default
packed_expand = torch.ops.cmt_fast_native.packed_expand.default
packed_depthwise_project = torch.ops.cmt_fast_native.packed_depthwise_project.default


@torch.library.register_fake("cmt_fast_native::packed_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor, out: int) -> Tensor:
    return x.new_empty(x.shape[0], out)


@torch.library.register_fake("cmt_fast_native::packed_conv3x3_gelu")
def _(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, out: int, stride: int
) -> Tensor:
    b, h, w, _ = x.shape
    return x.new_empty(b, (h + stride - 1) // stride, (w + stride - 1) // stride, out)


@torch.library.register_fake("cmt_fast_native::packed_patch_embed")
def _(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, out: int, channels: int, eps: float
) -> Tensor:
    b, h, w, _ = x.shape
    return x.new_empty(b, h // 2, w // 2, out)


@torch.library.register_fake("cmt_fast_native::packed_lpu")
def _(
    x: Tensor, taps: Tensor, bias: Tensor, reduction: Tensor | None, k: int, channels: int, eps: float
) -> tuple[Tensor, Tensor]:
    b, h, w, c = x.shape
    return x.new_empty(b, h, w, c), x.new_empty(b, h // k, w // k, c)


@torch.library.register_fake("cmt_fast_native::packed_attention")
def _(y: Tensor, *_) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.register_fake("cmt_fast_native::packed_attention_core")
def _(q: Tensor, keys_values: Tensor, table: Tensor, heads: int, key_dim: int, value_dim: int, base2: bool) -> Tensor:
    return q.new_empty(*q.shape[:3], heads * value_dim)


@torch.library.register_fake("cmt_fast_native::packed_normalise")
@torch.library.register_fake("cmt_fast_native::packed_gelu_affine")
@torch.library.register_fake("cmt_fast_native::packed_depthwise_gelu")
def _(x: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("cmt_fast_native::packed_expand")
def _(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, out: int, channels: int, eps: float
) -> Tensor:
    return x.new_empty(*x.shape[:3], round_up(out, PANEL) + PANEL)  # hidden_stride of csrc/cpu/packed/irffn_inner.h


@torch.library.register_fake("cmt_fast_native::packed_depthwise_project")
def _(hidden: Tensor, shortcut: Tensor, taps: Tensor, bias: Tensor, weight: Tensor, out_bias: Tensor) -> Tensor:
    return shortcut.new_empty(shortcut.shape)
