"""What each step of a packed model computes, in plain torch ops: one function a step, which a backend may replace."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.inference import program
from cmt_fast.ops.depthwise.reference import depthwise_conv3x3_reference, depthwise_reduce_reference
from cmt_fast.ops.layout import nchw, nhwc


def stem(step: program.Stem, x: Tensor) -> Tensor:
    """(B, in_chans, H, W), any strides -> (B, ceil(H / 2), ceil(W / 2), S)."""
    x = x.contiguous(memory_format=torch.channels_last)
    x = _affine(F.gelu(_conv3x3(x, step.weight1, step.bias1, stride=2)), step.scale1, step.shift1)
    x = _affine(F.gelu(_conv3x3(nchw(x), step.weight2, step.bias2)), step.scale2, step.shift2)
    return F.gelu(_conv3x3(nchw(x), step.weight3, step.bias3)).contiguous()


def patch_embed(step: program.PatchEmbed, x: Tensor) -> Tensor:
    """(B, H, W, C_in) -> (B, H // 2, W // 2, C); an odd last row or column is left out."""
    h, w = x.shape[1] // 2, x.shape[2] // 2
    patches = x[:, : 2 * h, : 2 * w].unflatten(2, (w, 2)).unflatten(1, (h, 2))  # (B, h, 2, w, 2, C_in)
    y = linear(patches.transpose(2, 3).flatten(3), step.weight, step.bias)
    wide = _normalise(y.to(step.scale.dtype), step.channels, step.eps)
    return _affine(wide, step.scale, step.shift).to(x.dtype)


def lpu(step: program.LPU, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, W, C) -> the same shape, and its reduction (B, H // k, W // k, C)."""
    y = _depthwise3x3(x, step.taps, step.bias).to(x.dtype)
    normal = _normalise(y, step.channels, step.eps)
    if step.reduction is None:
        return y, normal
    k = step.reduce
    weight = step.reduction.t().reshape(-1, 1, k, k)
    return y, depthwise_reduce_reference(normal.to(weight.dtype), weight, None).to(x.dtype)


def kv(step: program.KV, reduced: Tensor) -> Tensor:
    """(B, H // k, W // k, C) -> (B, M, rows)."""
    return F.linear(reduced.flatten(1, 2), step.weight)


def attention(step: program.Attention, kv_step: program.KV, y: Tensor, keys_values: Tensor, table: Tensor) -> Tensor:
    """y (B, H, W, C), keys_values (B, M, rows), table (h, N, M) -> (B, H, W, C)."""
    h = step.heads
    keys, values, key_bias = keys_values.split([h * kv_step.key_dim, h * kv_step.value_dim, kv_step.bias_dim], dim=-1)
    keys = keys.unflatten(-1, (h, -1)).transpose(1, 2)  # (B, h, M, key_dim)
    values = values.unflatten(-1, (h, -1)).transpose(1, 2)  # (B, h, M, value_dim)
    x = _normalise(y, step.channels, step.eps).flatten(1, 2)  # (B, N, C)
    if step.query_weight is None or step.out_weight is None:
        # All heads in one matrix product each way: their C channels of x are the same, their outputs are summed.
        logits = (x @ keys.flatten(1, 2).transpose(1, 2)).unflatten(-1, (h, -1))  # (B, N, h, M)
        logits = logits + table.transpose(0, 1) + key_bias[..., :h].transpose(1, 2).unsqueeze(1)
        out = _softmax(logits, step.base2).flatten(2) @ values.flatten(1, 2) + step.out_bias.to(y.dtype)
    else:
        query = linear(x, step.query_weight, step.query_bias).unflatten(-1, (h, -1)).transpose(1, 2)
        weights = _softmax(query @ keys.transpose(2, 3) + table, step.base2)  # (B, h, N, M)
        out = linear((weights @ values).transpose(1, 2).flatten(2), step.out_weight, step.out_bias)
    return y + out.view_as(y)


def expand(step: program.Expand, z: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W, R)."""
    x = _normalise(z, step.channels, step.eps)
    return _affine(F.gelu(linear(x, step.weight, step.bias)), step.scale, step.shift)


def depthwise_project(step: program.DepthwiseProject, hidden: Tensor, z: Tensor) -> Tensor:
    """hidden (B, H, W, R), z (B, H, W, C) the block's shortcut -> (B, H, W, C)."""
    g = F.gelu(_depthwise3x3(hidden, step.taps, step.bias)).to(z.dtype)
    return z + linear(g, step.weight, step.out_bias)


def head(step: program.Head, x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, classes), or the features before the classifier, (B, features) or (B, features, H, W)."""
    x = F.silu(linear(x, step.weight, step.bias))
    if step.pool:
        x = x.mean((1, 2))
    if step.hidden_weight is not None:
        x = torch.tanh(linear(x, step.hidden_weight, step.hidden_bias))
    if step.class_weight is not None:
        return linear(x, step.class_weight, step.class_bias)
    x = x[..., : step.features]
    return x if step.pool else nchw(x.contiguous())


@dataclass(frozen=True)
class StepFunctions:
    """How a program is run: one function a step. A backend replaces those that it has kernels for.

    ``stem_embed`` does the stem and the first patch embedding together; None has them done one after the other.
    """

    stem: Callable[[program.Stem, Tensor], Tensor] = stem
    patch_embed: Callable[[program.PatchEmbed, Tensor], Tensor] = patch_embed
    lpu: Callable[[program.LPU, Tensor], tuple[Tensor, Tensor]] = lpu
    kv: Callable[[program.KV, Tensor], Tensor] = kv
    attention: Callable[[program.Attention, program.KV, Tensor, Tensor, Tensor], Tensor] = attention
    expand: Callable[[program.Expand, Tensor], Tensor] = expand
    depthwise_project: Callable[[program.DepthwiseProject, Tensor, Tensor], Tensor] = depthwise_project
    head: Callable[[program.Head, Tensor], Tensor] = head
    stem_embed: Callable[[program.Stem, program.PatchEmbed, Tensor], Tensor] | None = None


#: Every step in plain torch ops.
TORCH = StepFunctions()


# ---- shared pieces -------------------------------------------------------------------------------------------------------


def _normalise(x: Tensor, channels: int, eps: float) -> Tensor:
    """LayerNorm without its affine over the first ``channels``; what follows them stays 0."""
    y = F.layer_norm(x[..., :channels], (channels,), eps=eps)
    padding = x.shape[-1] - channels
    return F.pad(y, (0, padding)) if padding else y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Torch wants the bias in the dtype of the product, though it adds it in float32."""
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift a channel, rounded once."""
    return torch.addcmul(shift, x, scale).to(x.dtype)


def _conv3x3(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """x (B, C_in, H, W), weight (C_out, 3, 3, C_in) -> (B, H', W', C_out)."""
    return nhwc(F.conv2d(x, nchw(weight), bias.to(x.dtype), stride, padding=1))


def _depthwise3x3(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C) in the dtype of ``taps``."""
    return depthwise_conv3x3_reference(x.to(taps.dtype), taps.t().reshape(-1, 1, 3, 3), bias, shortcut=False)


def _softmax(logits: Tensor, base2: bool) -> Tensor:
    return (logits * math.log(2.0) if base2 else logits).softmax(-1)
