"""The steps of a packed model on the CPU kernels: each one call of the compiled library."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.inference import program
from cmt_fast.inference.native import schema
from cmt_fast.inference.torch_steps import StepFunctions
from cmt_fast.ops.layout import nchw, nhwc

# A step's matrices and vectors are here the Panels and PaddedVectors of layout.py.


def stem(step: program.Stem, x: Tensor) -> Tensor:
    x = nhwc(x).contiguous()
    w1, w2, w3 = _data(step.weight1, step.weight2, step.weight3)
    b1, b2, b3 = _data(step.bias1, step.bias2, step.bias3)
    s = len(step.bias1)
    x = schema.packed_conv3x3_gelu(x, w1, b1, *_data(step.scale1, step.shift1), s, 2)
    x = schema.packed_conv3x3_gelu(x, w2, b2, *_data(step.scale2, step.shift2), s, 1)
    return schema.packed_conv3x3_gelu(x, w3, b3, None, None, s, 1)


def patch_embed(step: program.PatchEmbed, x: Tensor) -> Tensor:
    tensors = _data(step.weight, step.bias, step.scale, step.shift)
    return schema.packed_patch_embed(x, *tensors, len(step.bias), step.channels, step.eps)


def lpu(step: program.LPU, x: Tensor) -> tuple[Tensor, Tensor]:
    return schema.packed_lpu(x, step.taps, step.bias, step.reduction, step.reduce, step.channels, step.eps)


def kv(step: program.KV, reduced: Tensor) -> Tensor:
    return _linear(step.weight, None, reduced.flatten(1, 2))


def attention(step: program.Attention, kv_step: program.KV, y: Tensor, keys_values: Tensor, table: Tensor) -> Tensor:
    return schema.packed_attention(
        y,
        keys_values,
        table,
        *_data(step.query_weight, step.query_bias, step.out_weight, step.out_bias),
        step.heads,
        kv_step.key_dim,
        kv_step.value_dim,
        step.channels,
        step.eps,
        step.base2,
    )


def expand(step: program.Expand, z: Tensor) -> Tensor:
    tensors = _data(step.weight, step.bias, step.scale, step.shift)
    return schema.packed_expand(z, *tensors, len(step.bias), step.channels, step.eps)


def depthwise_project(step: program.DepthwiseProject, hidden: Tensor, z: Tensor) -> Tensor:
    return schema.packed_depthwise_project(hidden, z, step.taps, step.bias, *_data(step.weight, step.out_bias))


def head(step: program.Head, x: Tensor) -> Tensor:
    x = F.silu(_linear(step.weight, step.bias, x))
    if step.pool:
        x = x.mean((1, 2))
    if step.hidden_weight is not None:
        x = torch.tanh(_linear(step.hidden_weight, step.hidden_bias, x))
    if step.class_weight is not None:
        return _linear(step.class_weight, step.class_bias, x)
    x = x[..., : step.features]
    return x if step.pool else nchw(x.contiguous())


#: Every step on the compiled library.
NATIVE = StepFunctions(stem, patch_embed, lpu, kv, attention, expand, depthwise_project, head)


def _linear(weight: Any, bias: Any, x: Tensor) -> Tensor:
    """(..., in) -> (..., out)."""
    width = weight.data.shape[0] * weight.data.shape[2]
    vector = x.new_zeros(width, dtype=torch.float32) if bias is None else bias.data
    y = schema.packed_linear(x.reshape(-1, x.shape[-1]), weight.data, vector, len(weight))
    return y.view(*x.shape[:-1], len(weight))


def _data(*parts: Any) -> list[Any]:
    """The tensors of Panels and PaddedVectors."""
    return [None if part is None else part.data for part in parts]
