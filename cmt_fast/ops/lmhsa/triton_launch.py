"""Launching the kernels of the attention sub-layer of a packed model."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.device import DeviceLimits, device_limits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.linear_launch import linear_launch
from cmt_fast.ops._triton.products import is_exact, precision_of
from cmt_fast.ops._triton.table import table_layout
from cmt_fast.ops._triton.tiling import block
from cmt_fast.ops.attention.schema import reduced_kv_attention_triton
from cmt_fast.ops.lmhsa.configs import FusedConfig, absorbed_config, projected_config
from cmt_fast.ops.lmhsa.triton_kernels import absorbed_attention_kernel, projected_attention_kernel


def absorbed_attention(
    x: Tensor, keys_values: Tensor, table: Tensor, out_bias: Tensor, base2: bool, channels: int, eps: float
) -> Tensor:
    """x (B, H, W, C), keys_values (B, M, 2 h C + biases), table (h, N, M), out_bias (C,) -> (B, H, W, C)."""
    x, keys_values, out_bias = x.contiguous(), keys_values.contiguous(), out_bias.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        table = _unit_rows(table)
        absorbed_launch(x, keys_values, table, out_bias, out, base2, channels, eps, device_limits(x.device)).run()
    return out


def projected_attention(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    keys_values: Tensor,
    table: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    base2: bool,
    channels: int,
    eps: float,
) -> Tensor:
    """x (B, H, W, C), query_weight (h d_qk, C), query_bias (h d_qk,), keys_values (B, M, h d_qk + h d_v), table (h, N, M),
    out_weight (C, h d_v), out_bias (C,) -> (B, H, W, C): one kernel, or three where it would not fit."""
    x, keys_values = x.contiguous(), keys_values.contiguous()
    query_weight, query_bias = query_weight.contiguous(), query_bias.contiguous()
    out_weight, out_bias = out_weight.contiguous(), out_bias.contiguous()
    out = torch.empty_like(x)
    if not out.numel():
        return out
    limits = device_limits(x.device)
    fused = projected_launch(
        x,
        query_weight,
        query_bias,
        keys_values,
        _unit_rows(table),
        out_weight,
        out_bias,
        out,
        base2,
        channels,
        eps,
        limits,
    )
    if fused is not None:
        fused.run()
        return out
    heads = len(table)
    query = torch.empty(*x.shape[:-1], len(query_weight), dtype=x.dtype, device=x.device)
    linear_launch(x, query_weight, query_bias, None, query, channels, eps, limits).run()
    keys, values = keys_values.split([len(query_weight), out_weight.shape[1]], dim=-1)
    parts = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query.flatten(1, 2), keys, values))
    attended = reduced_kv_attention_triton(*parts, table, 1.0, base2).transpose(1, 2)  # (B, N, h, d_v)
    linear_launch(attended, out_weight, out_bias, x, out, None, 0.0, limits).run()
    return out


def absorbed_launch(
    x: Tensor,
    keys_values: Tensor,
    table: Tensor,
    out_bias: Tensor,
    out: Tensor,
    base2: bool,
    channels: int,
    eps: float,
    limits: DeviceLimits,
) -> Launch:
    """Arguments as of :func:`absorbed_attention`, contiguous but for ``table``, which needs unit stride in a row only.

    Raises:
        NotImplementedError: if no tile fits on the device (``reasons.py`` says so before).
    """
    images, width = x.shape[0], x.shape[-1]
    heads, tokens, keys = table.shape
    config = absorbed_config(images, tokens, keys, width, x.element_size(), is_exact(x.dtype), limits)
    if config is None:
        raise NotImplementedError(
            f"no tile of {width} channels in {x.dtype} fits into {limits.shared_memory} bytes of shared memory: pack the model "
            "with absorb=()"
        )
    return _fused_launch(
        absorbed_attention_kernel,
        config,
        dict(x=x, keys_values=keys_values, table=table, out_bias=out_bias, out=out),
        dict(KV_ROW=keys_values.shape[2]),
        base2,
        channels,
        eps,
        flops=4 * images * heads * tokens * keys * width,
    )


def projected_launch(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    keys_values: Tensor,
    table: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    out: Tensor,
    base2: bool,
    channels: int,
    eps: float,
    limits: DeviceLimits,
) -> Launch | None:
    """The fused kernel, or None where the three kernels of the split form are better (:func:`projected_config`).

    Arguments as of :func:`projected_attention`, contiguous but for ``table``, which needs unit stride in a row only.
    """
    images, width = x.shape[0], x.shape[-1]
    heads, tokens, keys = table.shape
    key_dim, value_dim = len(query_weight) // heads, out_weight.shape[1] // heads
    config = projected_config(
        images, tokens, keys, width, key_dim, value_dim, x.element_size(), is_exact(x.dtype), limits
    )
    if config is None:
        return None
    tensors = dict(
        x=x,
        query_weight=query_weight,
        query_bias=query_bias,
        keys_values=keys_values,
        table=table,
        out_weight=out_weight,
        out_bias=out_bias,
        out=out,
    )
    return _fused_launch(
        projected_attention_kernel,
        config,
        tensors,
        dict(KEY_DIM=key_dim, VALUE_DIM=value_dim, BLOCK_K=block(key_dim), BLOCK_V=block(value_dim)),
        base2,
        channels,
        eps,
        flops=2 * images * heads * tokens * (width + keys) * (key_dim + value_dim),
    )


def _fused_launch(
    kernel: object,
    config: FusedConfig,
    tensors: dict[str, Tensor],
    constants: dict[str, int],
    base2: bool,
    channels: int,
    eps: float,
    flops: int,
) -> Launch:
    """What both fused kernels have in common. ``tensors``: by parameter name; all but ``out`` are read."""
    x, table, out = tensors["x"], tensors["table"], tensors["out"]
    heads, tokens, keys = table.shape
    layout = table_layout(table)
    steps = -(-keys // config.block_m)
    return Launch(
        kernel=kernel,
        grid=(x.shape[0] * -(-tokens // config.block_n),),
        arguments=dict(
            **tensors,
            images=x.shape[0],
            tokens=tokens,
            keys=keys,
            table_head=layout.head,
            table_row=layout.row,
            table_columns=layout.columns,
            eps=eps,
        ),
        constants=dict(
            HEADS=heads,
            C=x.shape[-1],
            CHANNELS=channels,
            BASE2=base2,
            ONE_TILE=steps == 1,
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            BLOCK_C=block(x.shape[-1]),
            PRECISION=precision_of(x.dtype),
            **constants,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        reads=sum(t.nbytes for t in tensors.values()) - out.nbytes,
        writes=out.nbytes,
        flops=flops,
        elements=out.numel(),
        loops=tuple(n for n in (heads, steps) if n > 1),  # the compiler unrolls a loop of one
    )


def _unit_rows(x: Tensor) -> Tensor:
    """``x`` with unit stride in its last dimension: copied only if it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()
