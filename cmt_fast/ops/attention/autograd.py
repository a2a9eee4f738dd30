"""Attention with reduced keys and values as an autograd function."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops.attention.configs import holds_all_keys
from cmt_fast.ops.attention.schema import (
    reduced_kv_attention_bwd,
    reduced_kv_attention_fwd,
    reduced_kv_attention_triton,
)
from cmt_fast.ops.autocast import product_dtype


class ReducedKVAttentionFunction(torch.autograd.Function):
    """(q, k, v, bias, scale) -> out; the arguments of :func:`cmt_fast.functional.reduced_kv_attention`.

    Keeps its inputs and four bytes a query and head for the backward pass; the output too where the keys do not fit one tile (there a
    projection keeps it anyway). Gradients are computed only where they are needed. Under ``create_graph`` they come from plain
    PyTorch, which can be differentiated again.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        out, lse = reduced_kv_attention_fwd(q, k, v, bias, scale)
        whole = holds_all_keys(k.shape[2], max(q.shape[3], v.shape[3]), q.element_size())
        ctx.save_for_backward(q, k, v, bias, lse, None if whole else out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, bias, lse, out = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            found = _differentiable_bwd(grad, q, k, v, bias, ctx.scale)
        else:
            found = reduced_kv_attention_bwd(grad, q, k, v, bias, lse, out, ctx.scale, needs)
        return *(g if need else None for g, need in zip(found, needs)), None


def _differentiable_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What ``reduced_kv_attention_bwd`` computes, in operations that PyTorch can differentiate (docs/math.md, section 4).

    A bias in a wider dtype than q's, as autocast has it, makes the whole computation as wide.
    """
    wide = q.dtype if bias is None else torch.promote_types(q.dtype, bias.dtype)
    dout, q_, k_, v_ = (t.to(wide) for t in (grad, q, k, v))
    logits = (q_ @ k_.transpose(-2, -1)) * scale
    if bias is not None:
        logits = logits + bias
    weights = logits.softmax(dim=-1)
    dweights = dout @ v_.transpose(-2, -1)
    dlogits = weights * (dweights - (weights * dweights).sum(dim=-1, keepdim=True))
    return (
        (dlogits @ k_ * scale).to(q.dtype),
        (dlogits.transpose(-2, -1) @ q_ * scale).to(k.dtype),
        (weights.transpose(-2, -1) @ dout).to(v.dtype),
        None if bias is None else dlogits.sum(dim=0).to(bias.dtype),
    )


def reduced_kv_attention_fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The kernels, with gradients where some will be asked for. Under autocast q, k and v are cast as for a product of PyTorch's, while
    the bias is added to the logits as it is."""
    q, k, v = (t.to(product_dtype(t)) for t in (q, k, v))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias)):
        return ReducedKVAttentionFunction.apply(q, k, v, bias, scale)
    return reduced_kv_attention_triton(q, k, v, bias, scale, False)
