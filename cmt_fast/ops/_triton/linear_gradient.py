"""The gradients of a linear layer's weight and bias, behind a LayerNorm that is made anew where its input is read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.norm import affine
from cmt_fast.ops._triton.parts import sum_parts_launch
from cmt_fast.ops._triton.products import precision_of
from cmt_fast.ops._triton.tiles import load_tile
from cmt_fast.ops._triton.tiling import block

#: Programs that fill every GPU: sums over the rows are cut for so many. No GPU may change their bits, so it is not asked.
_PROGRAMS = 132
#: Partial sums written and read again, beside the operands, in bytes: more of them, and attention's backward pass would leave its plan of bytes.
_PARTIALS = 0.075


@dataclass(frozen=True)
class Normal:
    """A LayerNorm of rows: moments (rows, 2) float32, mean and 1 / sigma of each; weight and bias (channels,), or None."""

    moments: Tensor
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class LinearGradientConfig:
    """How :func:`linear_gradient_kernel` is launched: rows, outputs and inputs of a tile; parts that the rows are cut into, and tiles of a part."""

    block_n: int
    block_out: int
    block_in: int
    parts: int
    steps: int


@triton.jit
def linear_gradient_kernel(
    grad,
    x,
    row_scale,
    moments,
    norm_weight,
    norm_bias,
    products,
    sums,
    rows,
    scale_rows,
    steps,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A part of (row_scale * grad)^T LN(x) and of the sum of row_scale * grad, over ``steps`` tiles of rows. The products are in the narrower dtype of both.

    Args:
        grad: (rows, OUT). x: (rows, IN).
        row_scale: (rows / scale_rows,), a factor for every scale_rows rows of grad; or None.
        moments: (rows, 2), mean and 1 / sigma of each row of x; or None: no LayerNorm.
        norm_weight, norm_bias: (IN,), or None.
        products: (parts, OUT, IN) float32. sums: (parts, OUT) float32, or None.
    """
    tiles_in = tl.cdiv(IN, BLOCK_IN)
    tiles = tiles_in * tl.cdiv(OUT, BLOCK_OUT)
    part = (tl.program_id(0) // tiles).to(tl.int64)
    first_out = tl.program_id(0) % tiles // tiles_in * BLOCK_OUT
    first_in = tl.program_id(0) % tiles_in * BLOCK_IN
    o, i = first_out + tl.arange(0, BLOCK_OUT), first_in + tl.arange(0, BLOCK_IN)
    total = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    total_grad = tl.zeros([BLOCK_OUT], tl.float32)
    for step in range(steps):
        first = (part * steps + step) * BLOCK_N
        row = first + tl.arange(0, BLOCK_N)
        g = load_tile(grad, OUT, first, rows, first_out, OUT, BLOCK_N, BLOCK_OUT)
        normal = load_tile(x, IN, first, rows, first_in, IN, BLOCK_N, BLOCK_IN)
        if row_scale is not None:
            g = g.to(tl.float32) * tl.load(row_scale + row // scale_rows, row < rows, 0.0).to(tl.float32)[:, None]
        if sums is not None:
            total_grad += tl.sum(g.to(tl.float32), 0)
        if moments is not None:  # beyond the last row it leaves the norm's bias, times gradients of 0
            mean = tl.load(moments + 2 * row, row < rows, 0.0)[:, None]
            rstd = tl.load(moments + 2 * row + 1, row < rows, 0.0)[:, None]
            normal = affine((normal.to(tl.float32) - mean) * rstd, norm_weight, norm_bias, i[None, :], IN)
        if grad.dtype.element_ty.primitive_bitwidth < x.dtype.element_ty.primitive_bitwidth:
            g, normal = g.to(grad.dtype.element_ty), normal.to(grad.dtype.element_ty)
        else:
            g, normal = g.to(x.dtype.element_ty), normal.to(x.dtype.element_ty)
        total = tl.dot(tl.trans(g), normal, total, input_precision=PRECISION)
    inside = (o < OUT)[:, None] & (i < IN)[None, :]
    tl.store(products + part * (OUT * IN) + o[:, None] * IN + i[None, :], total, inside)
    if sums is not None:  # programs of other inputs have the same
        tl.store(sums + part * OUT + o, total_grad, (o < OUT) & (first_in == 0))


def linear_gradient_launches(
    grad: Tensor,
    x: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    *,
    row_scale: Tensor | None = None,
    norm: Normal | None = None,
) -> list[Launch]:
    """dweight (OUT, IN) = (row_scale * grad)^T LN(x) and dbias (OUT,) = the sum of row_scale * grad, in float32 and rounded once; None where not wanted.

    No tensor as large as grad or x is written: LN(x) and row_scale * grad are made where they are read. The sums over the rows are cut by
    the shape alone and added in order.

    Args:
        grad: (..., OUT), x: (..., IN), contiguous, as many rows each, one at least; of one dtype, or one of them 16 bit, in which the products are.
        row_scale: (n,), for as many equal groups of rows each; or None.
        norm: LayerNorm of x, or None for x itself.
    """
    outputs, inputs = grad.shape[-1], x.shape[-1]
    rows = grad.numel() // outputs
    dtype = min(grad.dtype, x.dtype, key=lambda dtype: dtype.itemsize)
    config = linear_gradient_config(rows, outputs, inputs, dtype.itemsize)
    read = dict(
        grad=grad,
        x=x,
        row_scale=row_scale,
        moments=None if norm is None else norm.moments,
        norm_weight=None if norm is None else norm.weight,
        norm_bias=None if norm is None else norm.bias,
    )
    products = torch.empty(config.parts, outputs, inputs, dtype=torch.float32, device=grad.device)
    sums = None if dbias is None else torch.empty_like(products[:, :, 0])
    launches = [
        Launch(
            kernel=linear_gradient_kernel,
            grid=(config.parts * -(-outputs // config.block_out) * -(-inputs // config.block_in),),
            arguments=dict(
                **read,
                products=products,
                sums=sums,
                rows=rows,
                scale_rows=1 if row_scale is None else rows // len(row_scale),
                steps=config.steps,
            ),
            constants=dict(
                OUT=outputs,
                IN=inputs,
                BLOCK_N=config.block_n,
                BLOCK_OUT=config.block_out,
                BLOCK_IN=config.block_in,
                PRECISION=precision_of(dtype),
            ),
            num_warps=4,
            num_stages=3,
            reads=sum(t.nbytes for t in read.values() if t is not None),
            writes=products.nbytes + (0 if sums is None else sums.nbytes),
            flops=2 * rows * inputs * outputs,
            elements=max(grad.numel(), x.numel()),
            loops=(config.steps,),
        )
    ]
    if dweight is not None:
        launches.append(sum_parts_launch(products, dweight))
    if sums is not None and dbias is not None:
        launches.append(sum_parts_launch(sums, dbias[None]))
    return launches


@lru_cache
def linear_gradient_config(rows: int, outputs: int, inputs: int, itemsize: int) -> LinearGradientConfig:
    """For :func:`linear_gradient_kernel`: as many parts as fill a GPU, but no more than leave the partial sums small beside the operands.

    Args:
        itemsize: bytes of an element of the products.
    """
    block_out, block_in = min(64, block(outputs)), min(64, block(inputs))
    block_n = min(128 // itemsize, block(rows))
    tiles = -(-outputs // block_out) * -(-inputs // block_in)
    small = round(_PARTIALS * rows * (outputs + inputs) * itemsize / (8 * outputs * inputs))
    parts = max(1, min(-(-_PROGRAMS // tiles), small))
    steps = -(-rows // (block_n * parts))
    return LinearGradientConfig(block_n, block_out, block_in, -(-rows // (block_n * steps)), steps)
