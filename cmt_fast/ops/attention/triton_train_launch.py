"""Launching the attention kernels of a training step."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.device import DeviceLimits, device_limits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.parts import sum_parts_launch, whole_vectors
from cmt_fast.ops._triton.products import is_exact, precision_of
from cmt_fast.ops._triton.table import aligned, table_layout
from cmt_fast.ops._triton.tiling import block
from cmt_fast.ops.attention.configs import (
    BackwardConfig,
    backward_config,
    holds_all_keys,
    query_gradient_config,
)
from cmt_fast.ops.attention.triton_launch import attention_launch, unit_rows
from cmt_fast.ops.attention.triton_train_kernels import attention_backward_kernel, query_gradient_kernel


def reduced_kv_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q (B, h, N, d_qk), k (B, h, M, d_qk), v (B, h, M, d_v), bias (h, N, M) or None, any strides -> (B, h, N, d_v), and lse (B, h, N)."""
    b, h, n, _ = q.shape
    out = torch.empty(b, n, h, v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, n, dtype=torch.float32, device=q.device)
    if lse.numel():
        q, k, v = (unit_rows(t) for t in (q, k, v))
        attention_launch(
            q, k, v, None if bias is None else aligned(bias), out, lse, scale, False, device_limits(q.device)
        ).run()
    return out.transpose(1, 2), lse


def reduced_kv_attention_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    out: Tensor | None,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad (B, h, N, d_v), the arguments and results of the forward pass (``out`` only where keys stream) -> the gradients of q, k, v and
    bias, those that ``needs`` asks for: (B, h, n, d), transposes of contiguous (B, n, h, d), and (h, N, M)."""
    b, h, n, d = q.shape
    m, dv = v.shape[2:]
    sizes = ((b, n, h, d), (b, m, h, d), (b, m, h, dv), (h, n, m))
    dtypes = (q.dtype, k.dtype, v.dtype, q.dtype if bias is None else bias.dtype)
    found = [
        torch.empty(size if need else (0, *size[1:]), dtype=dtype, device=q.device)
        for size, dtype, need in zip(sizes, dtypes, needs)
    ]
    if grad.numel():
        grad, q, k, v = (unit_rows(t) for t in (grad, q, k, v))
        d_q, d_k, d_v, d_bias = (t if need else None for t, need in zip(found, needs))
        limits = device_limits(q.device)
        for launch in backward_launches(
            grad, q, k, v, None if bias is None else aligned(bias), lse, out, d_q, d_k, d_v, d_bias, scale, limits
        ):
            launch.run()
    else:  # no image, or no query: sums of nothing
        for t in found:
            t.zero_()
    return found[0].transpose(1, 2), found[1].transpose(1, 2), found[2].transpose(1, 2), found[3]


def backward_launches(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    out: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
    scale: float,
    limits: DeviceLimits,
) -> list[Launch]:
    """The launches of one backward pass, in order.

    Args:
        grad, q, k, v, bias: unit stride in a row.
        lse: (B, h, N) float32, contiguous.
        out: (B, h, N, d_v), a transpose of a contiguous tensor: the output of the forward pass, needed where keys stream.
        dq: (B, N, h, d_qk), contiguous; dk: (B, M, h, d_qk) and dv: (B, M, h, d_v), rows (h, d) contiguous and equally far apart; dbias:
            (h, N, M), contiguous; each None if not needed.
    """
    b, h, n, d = q.shape
    m, d_v = v.shape[2:]
    config = backward_config(b, h, n, m, max(d, d_v), q.element_size(), is_exact(q.dtype), limits)
    launches = []
    delta = None
    if not holds_all_keys(m, max(d, d_v), q.element_size()):
        assert out is not None
        delta = torch.empty_like(lse)
        launches.append(query_gradient_launch(grad, q, k, v, bias, lse, out.transpose(1, 2), delta, dq, scale, limits))
        dq = None
    dlogits = None if dbias is None else q.new_empty(b, h, n, whole_vectors(m, q.element_size()))
    partial_k, partial_v = (_partials(t, config.parts) for t in (dk, dv))
    if any(t is not None for t in (dq, partial_k, partial_v, dlogits)):
        launches.append(
            attention_backward_launch(grad, q, k, v, bias, lse, delta, dq, partial_k, partial_v, dlogits, scale, config)
        )
    if dlogits is not None and dbias is not None:
        launches.append(sum_parts_launch(dlogits, dbias))
    for partial, whole in ((partial_k, dk), (partial_v, dv)):
        if config.parts > 1 and partial is not None and whole is not None:
            launches.append(sum_parts_launch(partial.flatten(3), whole.flatten(2)))
    return launches


def attention_backward_launch(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    delta: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dlogits: Tensor | None,
    scale: float,
    config: BackwardConfig,
) -> Launch:
    """Arguments as of :func:`attention_backward_kernel`: dk and dv (parts, B, M, row), dlogits (B, h, N, row)."""
    b, h, n, d = q.shape
    m, d_v = v.shape[2:]
    dots = d * sum((1, dq is not None, dk is not None)) + d_v * sum((1, dv is not None))
    return Launch(
        kernel=attention_backward_kernel,
        grid=(b * h * -(-m // config.block_m), config.parts),
        arguments=dict(
            grad=grad,
            q=q,
            k=k,
            v=v,
            bias=bias,
            lse=lse,
            delta=delta,
            dq=dq,
            dk=dk,
            dv=dv,
            dlogits=dlogits,
            images=b,
            queries=n,
            keys=m,
            part_queries=config.part_queries,
            scale=float(scale),
            **_strides(grad, q, k, v, bias),
        ),
        constants=dict(
            HEADS=h,
            KEY_DIM=d,
            VALUE_DIM=d_v,
            DK_ROW=0 if dk is None else dk.stride(2),
            DV_ROW=0 if dv is None else dv.stride(2),
            LOGITS_ROW=0 if dlogits is None else dlogits.shape[3],
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            BLOCK_K=block(d),
            BLOCK_V=block(d_v),
            PRECISION=precision_of(q.dtype),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        reads=sum(t.nbytes for t in (grad, q, k, v, bias, lse, delta) if t is not None),
        writes=sum(t.nbytes for t in (dq, dk, dv, dlogits) if t is not None),
        flops=2 * b * h * n * m * dots,
        elements=b * h * n * m,
        loops=tuple(steps for steps in (config.part_queries / config.block_n,) if steps > 1),
    )


def query_gradient_launch(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    out: Tensor,
    delta: Tensor,
    dq: Tensor | None,
    scale: float,
    limits: DeviceLimits,
) -> Launch:
    """Arguments as of :func:`query_gradient_kernel`."""
    b, h, n, d = q.shape
    m, d_v = v.shape[2:]
    config = query_gradient_config(n, m, max(d, d_v), q.element_size(), is_exact(q.dtype), limits)
    return Launch(
        kernel=query_gradient_kernel,
        grid=(b * h * -(-n // config.block_n),),
        arguments=dict(
            grad=grad,
            q=q,
            k=k,
            v=v,
            bias=bias,
            lse=lse,
            out=out,
            delta=delta,
            dq=dq,
            images=b,
            queries=n,
            keys=m,
            scale=float(scale),
            **_strides(grad, q, k, v, bias),
        ),
        constants=dict(
            HEADS=h,
            KEY_DIM=d,
            VALUE_DIM=d_v,
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            BLOCK_K=block(d),
            BLOCK_V=block(d_v),
            PRECISION=precision_of(q.dtype),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        reads=sum(t.nbytes for t in (grad, q, k, v, bias, lse, out) if t is not None),
        writes=sum(t.nbytes for t in (delta, dq) if t is not None),
        flops=0 if dq is None else 2 * b * h * n * m * (2 * d + d_v),
        elements=b * h * n * m,
        loops=() if dq is None else (-(-m // config.block_m),),
    )


def _strides(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> dict[str, int]:
    strides = {
        f"{name}_{dim}": t.stride(i)
        for name, t in (("grad", grad), ("q", q), ("k", k), ("v", v))
        for i, dim in enumerate(("image", "head", "row"))
    }
    layout = None if bias is None else table_layout(bias)
    strides["bias_head"], strides["bias_row"] = (layout.head, layout.row) if layout else (0, 0)
    strides["bias_columns"] = layout.columns if layout else 0
    return strides


def _partials(whole: Tensor | None, parts: int) -> Tensor | None:
    """Where ``parts`` programs write what adds up to ``whole`` (B, M, h, d): (parts, B, M, h, d), itself if it is one."""
    if whole is None:
        return None
    return whole[None] if parts == 1 else whole.new_empty(parts, *whole.shape, dtype=torch.float32)
