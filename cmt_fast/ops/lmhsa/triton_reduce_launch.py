"""Launching the kernels around the attention's core in training."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.statistics import add_partials
from cmt_fast.ops.lmhsa.reduce_configs import TILE, reduce_config, window_count
from cmt_fast.ops.lmhsa.triton_reduce_kernels import norm_reduce_backward_kernel, norm_reduce_kernel, normalise_kernel


def norm_reduce(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    taps: Tensor | None,
    bias: Tensor | None,
    k: int,
    dtype: torch.dtype,
    moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, H, W, C), norm_weight, norm_bias, bias (C,), taps (k * k, C) -> reduced (B, H // k, W // k, C), partials (P, 2, C), counts (P,)."""
    x = x.contiguous()
    b, h, w, c = x.shape
    reduced = torch.empty(b, h // k, w // k, c, dtype=dtype, device=x.device)
    programs = reduce_config(reduced.numel() // c, c).programs if moments else 0
    partials = torch.empty(programs, 2, c, dtype=torch.float32, device=x.device)
    counts = torch.empty(programs, dtype=torch.float32, device=x.device)
    stored = (partials, counts) if moments else (None, None)
    norm_reduce_launch(x, norm_weight, norm_bias, eps, taps, bias, k, reduced, *stored).run()
    return reduced, partials, counts


def normalise(x: Tensor, statistics: Tensor) -> Tensor:
    """x (..., C), statistics (6, C) -> BN(x), in the dtype of x."""
    x = x.contiguous()
    y = torch.empty_like(x)
    normalise_launch(x, statistics, y).run()
    return y


def norm_reduce_backward(
    x: Tensor,
    grad: Tensor | None,
    query_grad: Tensor | None,
    reduced_grad: Tensor | None,
    reduced: Tensor | None,
    statistics: Tensor | None,
    sums: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    taps: Tensor | None,
    k: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (B, H, W, C), of the norm's weight and bias (2, C), of taps and bias (k * k + 1, C); see ``schema.py``."""
    x = x.contiguous()
    grad, query_grad, reduced_grad = (None if t is None else t.contiguous() for t in (grad, query_grad, reduced_grad))
    c = x.shape[-1]
    programs = reduce_config(window_count(x.shape, k), c).programs
    x_grad = torch.empty_like(x) if needs[0] else None
    norm_partials = torch.empty(programs, 2, c, dtype=torch.float32, device=x.device) if needs[1] else None
    tap_partials = torch.empty(programs, k * k + 1, c, dtype=torch.float32, device=x.device) if needs[2] else None
    norm_reduce_backward_launch(
        x,
        grad,
        query_grad,
        reduced_grad,
        reduced,
        statistics,
        sums,
        norm_weight,
        norm_bias,
        eps,
        taps,
        k,
        x_grad,
        norm_partials,
        tap_partials,
    ).run()

    def added(partials: Tensor | None, rows: int) -> Tensor:
        return x.new_empty(0, c, dtype=torch.float32) if partials is None else add_partials(partials)

    return (
        x.new_empty(0, *x.shape[1:]) if x_grad is None else x_grad,
        added(norm_partials, 2),
        added(tap_partials, k * k + 1),
    )


def norm_reduce_launch(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    taps: Tensor | None,
    bias: Tensor | None,
    k: int,
    reduced: Tensor,
    partials: Tensor | None,
    counts: Tensor | None,
) -> Launch:
    """Arguments as of the kernel, all contiguous; eps None for no norm."""
    _, height, width, c = x.shape
    pixels = reduced.numel() // c
    config = reduce_config(pixels, c)
    inputs = (norm_weight, norm_bias, taps, bias)
    read = pixels * k * k * c * x.element_size()  # rows and columns beyond the last window are not
    return Launch(
        kernel=norm_reduce_kernel,
        grid=(config.programs,),
        arguments=dict(
            x=x,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            taps=taps,
            bias=bias,
            reduced=reduced,
            partials=partials,
            counts=counts,
            pixels=pixels,
            height=height,
            width=width,
            eps=0.0 if eps is None else eps,
        ),
        constants=dict(
            C=c, K=k, NORM=eps is not None, STEPS=config.steps, BLOCK_N=config.block_n, BLOCK_C=config.block_c
        ),
        num_warps=config.num_warps,
        num_stages=1,
        reads=read + sum(t.nbytes for t in inputs if t is not None),
        writes=sum(t.nbytes for t in (reduced, partials, counts) if t is not None),
        flops=0,
        elements=pixels * k * k * c,
        loops=tuple(n for n in (config.steps, k * k) if n > 1),
    )


def normalise_launch(x: Tensor, statistics: Tensor, y: Tensor) -> Launch:
    """x and y (..., C), statistics (6, C), all contiguous."""
    c = x.shape[-1]
    rows = x.numel() // c
    block_c = min(64, 1 << (c - 1).bit_length())
    block_n = TILE // block_c
    return Launch(
        kernel=normalise_kernel,
        grid=(-(-rows // block_n) * -(-c // block_c),),
        arguments=dict(x=x, statistics=statistics, y=y, rows=rows),
        constants=dict(C=c, BLOCK_N=block_n, BLOCK_C=block_c),
        num_warps=4,
        num_stages=1,
        reads=x.nbytes + statistics.nbytes,
        writes=y.nbytes,
        flops=0,
        elements=x.numel(),
    )


def norm_reduce_backward_launch(
    x: Tensor,
    grad: Tensor | None,
    query_grad: Tensor | None,
    reduced_grad: Tensor | None,
    reduced: Tensor | None,
    statistics: Tensor | None,
    sums: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    taps: Tensor | None,
    k: int,
    x_grad: Tensor | None,
    norm_partials: Tensor | None,
    tap_partials: Tensor | None,
) -> Launch:
    """Arguments as of the kernel, all contiguous; eps None for no norm."""
    _, height, width, c = x.shape
    windows = window_count(x.shape, k)
    block_taps = 1 << (k * k - 1).bit_length()
    config = reduce_config(windows, c, block_taps)
    inputs = dict(
        x=x,
        grad=grad,
        query_grad=query_grad,
        reduced_grad=reduced_grad,
        reduced=reduced,
        statistics=statistics,
        sums=sums,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        taps=taps,
    )
    outputs = dict(x_grad=x_grad, norm_partials=norm_partials, tap_partials=tap_partials)
    return Launch(
        kernel=norm_reduce_backward_kernel,
        grid=(config.programs,),
        arguments=dict(
            **inputs,
            **outputs,
            windows=windows,
            height=height,
            width=width,
            eps=0.0 if eps is None else eps,
        ),
        constants=dict(
            C=c,
            K=k,
            NORM=eps is not None,
            STEPS=config.steps,
            BLOCK_N=config.block_n,
            BLOCK_C=config.block_c,
            BLOCK_TAPS=block_taps,
        ),
        num_warps=config.num_warps,
        num_stages=1,
        reads=sum(t.nbytes for t in inputs.values() if t is not None),
        writes=sum(t.nbytes for t in outputs.values() if t is not None),
        flops=0,
        elements=x.numel(),
        loops=tuple(n for n in (config.steps, k * k) if n > 1),
    )
