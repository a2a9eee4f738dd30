"""The exact algebra of packing, on float64 tensors (docs/math.md, section 10). Nothing is padded here."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmt_fast.modules import LMHSA


class Affine(NamedTuple):
    """x -> scale * x + shift, a channel."""

    scale: Tensor
    shift: Tensor


class Linear(NamedTuple):
    """x -> weight x + bias: (out, in) and (out,)."""

    weight: Tensor
    bias: Tensor


class Keys(NamedTuple):
    """Attention from the normalised map x (C,) of a query and r (C,) of a key, without constants that softmax ignores.

    Plain, with a row a head: logits (q x + q_b) . (k r), output o (P (v r)) + o_b.
    """

    query: Linear  # (h * d_qk, C), (h * d_qk,)
    key: Tensor  # (h * d_qk, C)
    value: Tensor  # (h * d_v, C)
    out: Linear  # (C, h * d_v), (C,)


def exact(tensor: Tensor) -> Tensor:
    """A float64 copy on the CPU."""
    return tensor.detach().to("cpu", torch.float64)


def bias_of(module: Any) -> Tensor:
    """Bias of a linear layer or convolution, or zeros."""
    weight = module.weight
    return exact(weight.new_zeros(weight.shape[0]) if module.bias is None else module.bias)


def layer_norm(norm: Any) -> Affine:
    """What LayerNorm does after normalising."""
    if norm.weight is None:
        size = norm.normalized_shape[0]
        return Affine(torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64))
    return Affine(exact(norm.weight), bias_of(norm))


def batch_norm(norm: Any) -> Affine:
    """BatchNorm in eval mode: scale = gamma / sqrt(var + eps), shift = beta - scale * mean."""
    scale = torch.rsqrt(exact(norm.running_var) + norm.eps)
    if norm.weight is not None:
        scale = scale * exact(norm.weight)
    shift = -scale * exact(norm.running_mean)
    return Affine(scale, shift if norm.bias is None else shift + exact(norm.bias))


def linear(module: Any) -> Linear:
    """A linear layer, or a convolution over (out, in * kernel) with the kernel last."""
    return Linear(exact(module.weight).flatten(1), bias_of(module))


def before(affine: Affine, layer: Linear) -> Linear:
    """``layer`` after ``affine``, as one layer: W (a x + c) + b."""
    return Linear(layer.weight * affine.scale, layer.bias + layer.weight @ affine.shift)


def after(layer: Linear, affine: Affine) -> Linear:
    """``affine`` after ``layer``, as one layer: a (W x + b) + c."""
    return Linear(affine.scale[:, None] * layer.weight, affine.scale * layer.bias + affine.shift)


def taps(conv: Any, shortcut: bool) -> Tensor:
    """Depthwise weights (C, 1, k, k) as (k * k, C); ``shortcut`` adds the input to the output."""
    result = exact(conv.weight).flatten(1).t().clone()
    if shortcut:
        result[result.shape[0] // 2] += 1
    return result


def reduction(attn: LMHSA, norm: Affine) -> tuple[Tensor | None, Affine]:
    """Taps (k * k, C) on the normalised map, and the affine that is left for the key and value weights.

    With a convolution, LayerNorm's and BatchNorm's scales are in the taps and only a shift is left: the sum that LayerNorm's
    shift makes under the taps (there is no padding, so every output has all of them), the convolution's bias, BatchNorm's.
    """
    if attn.sr is None:
        return None, norm
    conv, bn = attn.sr[0], batch_norm(attn.sr[1])
    raw = taps(conv, shortcut=False)
    shift = bn.scale * (bias_of(conv) + norm.shift * raw.sum(0)) + bn.shift
    return bn.scale * norm.scale * raw, Affine(torch.ones_like(shift), shift)


def logit_unit(base2: bool) -> float:
    """What logits are multiplied by: e^x = 2^(x log2 e)."""
    return math.log2(math.e) if base2 else 1.0


def attention(attn: LMHSA, norm: Affine, left: Affine, base2: bool) -> Keys:
    """Fold the scale of the softmax, ``norm`` of the queries and ``left`` of the keys (from :func:`reduction`).

    What is constant over the keys of a query drops out of the softmax: k's bias and ``left.shift`` under k. What is constant over
    the values passes through it, as its weights sum to 1: v's bias and ``left.shift`` under v go into the output bias.
    """
    scale = attn.scale * logit_unit(base2)
    query = before(norm, linear(attn.q))
    value = before(left, linear(attn.v))
    out = linear(attn.proj)
    return Keys(
        query=Linear(query.weight * scale, query.bias * scale),
        key=before(left, linear(attn.k)).weight,
        value=value.weight,
        out=Linear(out.weight, out.bias + out.weight @ value.bias),
    )


def absorb(keys: Keys, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Put the query and output projections into the keys and values.

    logits = x . (Wq_h^T Wk_h r) + (bq_h^T Wk_h) r and output = sum over heads of P_h (Wo_h Wv_h r): the key and value weights
    (h * C, C) and the key bias weight (h, C), all of r.
    """
    query = keys.query.weight.unflatten(0, (heads, -1))  # (h, d, C)
    key = keys.key.unflatten(0, (heads, -1))
    value = keys.value.unflatten(0, (heads, -1))
    out = keys.out.weight.unflatten(1, (heads, -1)).transpose(0, 1)  # (h, C, d)
    bias = (keys.query.bias.unflatten(0, (heads, 1, -1)) @ key).squeeze(1)
    return (query.transpose(1, 2) @ key).flatten(0, 1), (out @ value).flatten(0, 1), bias
