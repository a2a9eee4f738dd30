"""Launching the patch embedding's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.device import DeviceLimits, device_limits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.products import is_exact, precision_of
from cmt_fast.ops.patch_embed.configs import patch_config
from cmt_fast.ops.patch_embed.triton_kernels import patch_embed_kernel


def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, channels: int, eps: float
) -> Tensor:
    """The step :class:`cmt_fast.inference.program.PatchEmbed` of x (B, H, W, C_in), any strides -> (B, H // 2, W // 2, C)."""
    x = x.contiguous()
    b, h, w, _ = x.shape
    y = torch.empty(b, h // 2, w // 2, len(weight), dtype=x.dtype, device=x.device)
    if y.numel():
        patch_embed_launch(x, weight, bias, scale, shift, y, channels, eps, device_limits(x.device)).run()
    return y


def patch_embed_launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    y: Tensor,
    channels: int,
    eps: float,
    limits: DeviceLimits,
) -> Launch:
    """x (B, H, W, C_in), weight (C, 4 C_in), bias, scale and shift (C,), y (B, H // 2, W // 2, C), all contiguous.

    Raises:
        NotImplementedError: if no tile fits on the device (``reasons.py`` says so before).
    """
    _, height, width, c_in = x.shape
    c, inputs = weight.shape
    tokens = y.numel() // c
    config = patch_config(tokens, inputs, c, x.element_size(), is_exact(x.dtype), limits)
    if config is None:
        raise NotImplementedError(
            f"{c} channels in {x.dtype} do not fit into {limits.shared_memory} bytes of shared memory: use plain PyTorch"
        )
    steps = -(-inputs // config.block_k)
    return Launch(
        kernel=patch_embed_kernel,
        grid=(-(-tokens // config.block_n),),
        arguments=dict(
            x=x,
            weight=weight,
            bias=bias,
            scale=scale,
            shift=shift,
            y=y,
            tokens=tokens,
            height=height,
            width=width,
            eps=eps,
        ),
        constants=dict(
            C_IN=c_in,
            C=c,
            CHANNELS=channels,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_C=config.block_c,
            PRECISION=precision_of(x.dtype),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        reads=sum(t.nbytes for t in (x, weight, bias, scale, shift)),
        writes=y.nbytes,
        flops=2 * tokens * inputs * c,
        elements=y.numel(),
        loops=(steps,) if steps > 1 else (),  # the compiler unrolls a loop of one
    )
