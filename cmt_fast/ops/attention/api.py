"""Public attention with reduced keys and values: validate, choose a backend, call."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.backend import select
from cmt_fast.ops.attention.autograd import reduced_kv_attention_fused
from cmt_fast.ops.attention.reasons import triton_reasons
from cmt_fast.ops.attention.reference import reduced_kv_attention_reference
from cmt_fast.ops.checks import check_dtype, check_same, shape_of


def reduced_kv_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """``softmax(scale * q k^T + bias) v`` for few keys and a dense bias shared by the batch (paper, "LMHSA").

    Args:
        q: (B, h, N, d_qk) queries, floating point, any strides: ``linear(x).unflatten(-1, (h, d)).transpose(1, 2)`` needs no copy.
        k: (B, h, M, d_qk) keys, in the dtype of ``q`` unless autocast is on.
        v: (B, h, M, d_v) values, in the dtype of ``q`` likewise; d_v may differ from d_qk.
        bias: (h, N, M), added to every image's logits, or None. It receives a gradient. Its dtype may be
            narrower than that of ``q`` (float32 with a bfloat16 bias) but, without autocast, not wider: the logits would
            be promoted and no longer meet ``v``.
        scale: factor of the logits, by default ``d_qk ** -0.5``.
        dropout_p: probability of dropping an attention weight.
        backend: see :func:`cmt_fast.use_backend`.

    Returns:
        (B, h, N, d_v). The Triton kernel returns it as a transpose of a contiguous (B, N, h, d_v), which the output projection
        takes without a copy. Its gradients repeat bit for bit; those of gradients (``create_graph``) come from plain PyTorch.

    Raises:
        ValueError: on a wrong shape or device, or a probability outside [0, 1).
        TypeError: on a wrong dtype.
        BackendError: if ``backend`` names one that cannot run this call.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            raise ValueError(f"{name} must be a 4-D tensor (B, heads, tokens, head dim), got {shape_of(tensor)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        check_same(name, tensor, "q", q)
        check_dtype(name, tensor, "q", q)
    B, h, N, d = q.shape
    M = k.shape[2]
    if tuple(k.shape) != (B, h, M, d):
        raise ValueError(
            f"k must have shape (B, h, M, d_qk) = ({B}, {h}, M, {d}) to meet q {shape_of(q)}, got {shape_of(k)}"
        )
    if tuple(v.shape[:3]) != (B, h, M):
        raise ValueError(
            f"v must have shape (B, h, M, d_v) = ({B}, {h}, {M}, d_v) to meet k {shape_of(k)}, got {shape_of(v)}"
        )
    if M == 0:
        raise ValueError("k and v hold no keys: attention over nothing is undefined")
    if bias is not None:
        if not isinstance(bias, Tensor) or tuple(bias.shape) != (h, N, M):
            raise ValueError(f"bias must have shape (h, N, M) = ({h}, {N}, {M}), got {shape_of(bias)}")
        check_same("bias", bias, "q", q)
        if not bias.is_floating_point():
            raise TypeError(f"bias must be floating point, got {bias.dtype}: it is added to the logits, not a mask")
        if torch.promote_types(q.dtype, bias.dtype) != q.dtype:
            check_dtype("bias", bias, "q", q)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    scale = d**-0.5 if scale is None else scale
    dropout = functools.partial(F.dropout, p=dropout_p) if dropout_p > 0 else None
    candidates = {"triton": lambda: triton_reasons(q, k, v, bias, dropout_p)}
    if select("reduced_kv_attention", candidates, backend, device=q.device) == "triton":
        return reduced_kv_attention_fused(q, k, v, bias, scale)
    return reduced_kv_attention_reference(q, k, v, bias, scale, dropout)
