"""What this machine does at best, and what PyTorch's own operations make of it at the shapes of CMT: the performance model's rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peaks import COPY, PRODUCT
from benchmarks.report.measurement import Measurement
from benchmarks.report.settings import Settings
from benchmarks.store import rate_columns, timing_columns
from cmt_fast.testing.precision import precision
from cmt_fast.testing.shapes import StageShape, stage_shapes
from cmt_fast.testing.timing import measure


@dataclass(frozen=True)
class Load:
    """One call to time.

    Attributes:
        shape: in words.
        mode: ``inference``, ``training`` (forward, and the gradient of the input), or which gradient of a convolution alone.
        call: what is timed.
        bytes: that must move.
        flops: operations of convolutions and matrix products.
        dtype: of its tensors.
    """

    shape: str
    mode: str
    call: Callable[[], object]
    bytes: int
    flops: int
    dtype: torch.dtype


#: (size...) -> a tensor of random numbers.
Make = Callable[..., Tensor]
Loads = Callable[[StageShape, Make], Iterator[Load]]


def plan(settings: Settings) -> Iterator[Measurement]:
    """Memory and matrix products first, then PyTorch's operations stage by stage, in inference and with gradients."""
    p = precision(settings.dtypes[0])
    make = partial(torch.randn, device=settings.device, dtype=p.low)
    yield Measurement(COPY, partial(_rows, settings, COPY, partial(_copies, settings)), 4 * settings.seconds)
    yield Measurement(PRODUCT, partial(_rows, settings, PRODUCT, partial(_product, settings, make)), 2.0)
    if settings.gpu:
        loads = partial(_launches, settings)
        yield Measurement("launch", partial(_rows, settings, "launch", loads, cold_cache=False), 4.0)
    stages = stage_shapes(settings.variants[0], 64 if settings.gpu else 1, settings.img_size)
    for shape in stages[:1] if settings.quick else stages:
        for op, loads_of in OPERATIONS.items():
            loads = partial(loads_of, shape, make)
            yield Measurement(f"{op} {shape.name}", partial(_rows, settings, op, loads), 4 * settings.seconds)


def _rows(
    settings: Settings, op: str, loads: Callable[[], Iterator[Load]], cold_cache: bool = True
) -> Iterator[dict[str, Any]]:
    for load in loads():
        t = measure(load.call, seconds=settings.seconds, device=settings.device, cold_cache=cold_cache)
        dtype = str(load.dtype).removeprefix("torch.")
        row = dict(op=op, shape=load.shape, provider="torch", dtype=dtype, mode=load.mode)
        yield row | timing_columns(t) | rate_columns(t, load.bytes, load.flops)


def _copies(settings: Settings) -> Iterator[Load]:
    """Of bytes: the largest does not fit into any cache."""
    for mib in (1, 16) if settings.quick else (16, 256, 1024) if settings.gpu else (1, 16, 256):
        source = torch.zeros(mib << 20, dtype=torch.uint8, device=settings.device)
        copy = partial(torch.empty_like(source).copy_, source)
        yield Load(f"{mib} MiB", "inference", copy, 2 * source.nbytes, 0, source.dtype)


def _product(settings: Settings, make: Make) -> Iterator[Load]:
    """A square one, near the machine's best."""
    side = 256 if settings.quick else 8192 if settings.gpu else 1024
    a, b = make(side, side), make(side, side)
    yield Load(f"{side} x {side} x {side}", "inference", partial(F.linear, a, b), 3 * a.nbytes, 2 * side**3, a.dtype)


def _launches(settings: Settings) -> Iterator[Load]:
    """A graph of 200 kernels that do next to nothing: what a kernel in a chain costs at least."""
    x = torch.zeros(1024, device=settings.device)
    graph = torch.cuda.CUDAGraph()
    x.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(200):
            x.add_(1)
    yield Load("graph of 200 kernels", "inference", graph.replay, 0, 0, x.dtype)
    yield Load("eager, 200 kernels", "inference", lambda: [x.add_(1) for _ in range(200)], 0, 0, x.dtype)


def _depthwise(shape: StageShape, make: Make) -> Iterator[Load]:
    """3x3, NHWC: LPU's and IRFFN's."""
    for s in (shape, replace(shape, dim=shape.hidden)):
        yield from _convolution(s, make, out=s.dim, kernel=3, stride=1, padding=1, groups=s.dim)


def _reduce(shape: StageShape, make: Make) -> Iterator[Load]:
    """k x k with stride k, NHWC."""
    if shape.sr_ratio > 1:
        k, c = shape.sr_ratio, shape.dim
        yield from _convolution(shape, make, out=c, kernel=k, stride=k, padding=0, groups=c)


def _pointwise(shape: StageShape, make: Make) -> Iterator[Load]:
    """1x1, NHWC: the IRFFN's expansion and projection."""
    for s, out in ((shape, shape.hidden), (replace(shape, dim=shape.hidden), shape.dim)):
        yield from _convolution(s, make, out=out, kernel=1, stride=1, padding=0, groups=1)


def _convolution(
    s: StageShape, make: Make, *, out: int, kernel: int, stride: int, padding: int, groups: int
) -> Iterator[Load]:
    """Forward, and its gradients one by one: they have kernels of their own."""
    x = make(s.batch, s.dim, s.height, s.width).to(memory_format=torch.channels_last)
    weight = make(out, s.dim // groups, kernel, kernel)
    forward = partial(F.conv2d, x, weight, stride=stride, padding=padding, groups=groups)
    grad = torch.randn_like(forward())
    flops, size = 2 * weight[0].numel() * grad.numel(), x.nbytes + weight.nbytes + grad.nbytes
    label = f"{s} to {out}" if out != s.dim else str(s)
    yield Load(label, "inference", torch.inference_mode()(forward), size, flops, x.dtype)
    pair = ([stride] * 2, [padding] * 2, [1, 1])
    for mode, wanted in (("input gradient", [True, False, False]), ("weight gradient", [False, True, False])):
        gradient = partial(
            torch.ops.aten.convolution_backward, grad, x, weight, None, *pair, False, [0, 0], groups, wanted
        )
        yield Load(label, mode, gradient, size, flops, x.dtype)


def _linear(shape: StageShape, make: Make) -> Iterator[Load]:
    """The same as matrix products of tokens: (N, C) x (C, R) and back."""
    for c, out in ((shape.dim, shape.hidden), (shape.hidden, shape.dim)):
        x, weight = make(shape.batch * shape.queries, c), make(out, c)
        y = x.nbytes // c * out
        label, flops = f"{len(x)} x {c} x {out}", 2 * x.numel() * out
        yield from _both(label, partial(F.linear, weight=weight), x, x.nbytes + y, 2 * (x.nbytes + y), flops)


def _batch_norm(shape: StageShape, make: Make) -> Iterator[Load]:
    """Of the hidden map, NHWC: by running statistics, and by the batch's with gradients."""
    x = make(shape.batch, shape.hidden, shape.height, shape.width).to(memory_format=torch.channels_last)
    mean, var = torch.zeros(shape.hidden, device=x.device), torch.ones(shape.hidden, device=x.device)
    label = str(replace(shape, dim=shape.hidden))
    yield Load(label, "inference", lambda: F.batch_norm(x, mean, var), 2 * x.nbytes, 0, x.dtype)
    _, training = _both(label, lambda x: F.batch_norm(x, None, None, training=True), x, 0, 6 * x.nbytes, 0)
    yield training


def _layer_norm(shape: StageShape, make: Make) -> Iterator[Load]:
    """In the stream's dtype, and in float32 as autocast has it."""
    low = make(shape.batch, shape.queries, shape.dim)
    for x in (low, low.float()) if low.dtype != torch.float32 else (low,):
        yield from _both(str(shape), lambda x: F.layer_norm(x, x.shape[-1:]), x, 2 * x.nbytes, 5 * x.nbytes, 0)


def _gelu(shape: StageShape, make: Make) -> Iterator[Load]:
    x = make(shape.batch, shape.queries, shape.hidden)
    yield from _both(str(replace(shape, dim=shape.hidden)), F.gelu, x, 2 * x.nbytes, 5 * x.nbytes, 0)


def _attention(shape: StageShape, make: Make) -> Iterator[Load]:
    """Scaled dot products with the bias as a mask."""
    d = shape.v_head_dim
    q = make(shape.batch, shape.heads, shape.queries, d)
    k, v = make(2, shape.batch, shape.heads, shape.keys, d)
    bias = make(1, shape.heads, shape.queries, shape.keys)
    flops = 4 * q.numel() * shape.keys
    size = 2 * q.nbytes + k.nbytes + v.nbytes + bias.nbytes
    attention = partial(F.scaled_dot_product_attention, key=k, value=v, attn_mask=bias)
    yield from _both(str(shape), attention, q, size, 2 * size, flops)


def _both(
    label: str, function: Callable[[Tensor], Tensor], x: Tensor, forward_bytes: int, step_bytes: int, flops: int
) -> Iterator[Load]:
    """Forward alone; forward and the gradient of x."""
    leaf = x.detach().requires_grad_()
    grad = torch.randn_like(function(x))
    inference = torch.inference_mode()(partial(function, x))
    yield Load(label, "inference", inference, forward_bytes, flops, x.dtype)
    training = partial(_step, function, leaf, grad)
    yield Load(label, "training", training, step_bytes, 2 * flops, x.dtype)


def _step(function: Callable[[Tensor], Tensor], leaf: Tensor, grad: Tensor) -> object:
    return torch.autograd.grad(function(leaf), leaf, grad)


#: By name: from a stage and a maker of tensors to what is timed.
OPERATIONS: dict[str, Loads] = {
    "depthwise 3x3": _depthwise,
    "depthwise k x k": _reduce,
    "1x1 convolution": _pointwise,
    "linear": _linear,
    "batch norm": _batch_norm,
    "layer norm": _layer_norm,
    "gelu": _gelu,
    "attention (SDPA)": _attention,
}
