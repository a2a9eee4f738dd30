"""Launching the attention kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.device import DeviceLimits, device_limits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.products import is_exact, precision_of
from cmt_fast.ops._triton.table import table_layout
from cmt_fast.ops._triton.tiling import block
from cmt_fast.ops.attention.configs import attention_config
from cmt_fast.ops.attention.triton_kernels import reduced_kv_attention_kernel


def reduced_kv_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, base2: bool) -> Tensor:
    """q (B, h, N, d_qk), k (B, h, M, d_qk), v (B, h, M, d_v), bias (h, N, M) or None, any strides -> (B, h, N, d_v)."""
    b, h, n, _ = q.shape
    out = torch.empty(b, n, h, v.shape[3], dtype=q.dtype, device=q.device)
    if out.numel():
        q, k, v = (unit_rows(t) for t in (q, k, v))
        bias = None if bias is None else unit_rows(bias)
        attention_launch(q, k, v, bias, out, None, scale, base2, device_limits(q.device)).run()
    return out.transpose(1, 2)


def attention_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    scale: float,
    base2: bool,
    limits: DeviceLimits,
) -> Launch:
    """q (B, h, N, d_qk), k (B, h, M, d_qk), v (B, h, M, d_v), bias (h, N, M) or None, all with unit stride in a row, into
    out (B, N, h, d_v) and, for training, lse (B, h, N) float32, both contiguous."""
    b, h, n, d = q.shape
    m, dv = v.shape[2:]
    config = attention_config(b, h, n, m, max(d, dv), q.element_size(), is_exact(q.dtype), limits)
    layout = None if bias is None else table_layout(bias)
    tiles = -(-n // config.block_n)
    steps = -(-m // config.block_m)
    return Launch(
        kernel=reduced_kv_attention_kernel,
        grid=(b * h * tiles,),
        arguments=dict(
            q=q,
            k=k,
            v=v,
            bias=bias,
            out=out,
            lse=lse,
            images=b,
            queries=n,
            keys=m,
            scale=float(scale),
            q_image=q.stride(0),
            q_head=q.stride(1),
            q_row=q.stride(2),
            k_image=k.stride(0),
            k_head=k.stride(1),
            k_row=k.stride(2),
            v_image=v.stride(0),
            v_head=v.stride(1),
            v_row=v.stride(2),
            bias_head=layout.head if layout else 0,
            bias_row=layout.row if layout else 0,
            bias_columns=layout.columns if layout else 0,
        ),
        constants=dict(
            HEADS=h,
            KEY_DIM=d,
            VALUE_DIM=dv,
            BASE2=base2,
            ONE_TILE=steps == 1,
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            BLOCK_K=block(d),
            BLOCK_V=block(dv),
            PRECISION=precision_of(q.dtype),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        reads=sum(t.nbytes for t in (q, k, v, bias) if t is not None),
        writes=out.nbytes + (0 if lse is None else lse.nbytes),
        flops=2 * b * h * n * m * (d + dv),
        elements=b * h * n * m,
        loops=() if steps == 1 else (steps,),
    )


def unit_rows(x: Tensor) -> Tensor:
    """``x`` with unit stride in its last dimension: copied only if it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()
