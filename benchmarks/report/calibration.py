"""What this machine does at best, and what PyTorch's own operations make of it at the shapes of CMT: the performance model's rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report.measurement import Measurement
from benchmarks.report.settings import Settings
from benchmarks.store import timing_columns
from cmt_fast.testing.precision import precision
from cmt_fast.testing.shapes import StageShape, stage_shapes
from cmt_fast.testing.timing import measure

Call = Callable[[], object]


def plan(settings: Settings) -> Iterator[Measurement]:
    """Memory and matrix products first, then PyTorch's operations stage by stage, in inference and with gradients."""
    p = precision(settings.dtypes[0])
    make = partial(torch.randn, device=settings.device, dtype=p.low)
    yield Measurement("copy", partial(_rows, settings, "copy", _copies(settings)), 4 * settings.seconds)
    yield Measurement("matrix product", partial(_rows, settings, "matrix product", _products(settings, make)), 12.0)
    if settings.gpu:
        yield Measurement("launch", partial(_rows, settings, "launch", _launches(settings)), 4.0)
    batch = 64 if settings.gpu else 1
    stages = stage_shapes(settings.variants[0], batch, settings.img_size)
    for shape in stages[:1] if settings.quick else stages:
        for op, operation in OPERATIONS.items():
            calls = partial(operation, shape, make)
            yield Measurement(f"{op} {shape.name}", partial(_rows, settings, op, calls), 4 * settings.seconds)


def _rows(
    settings: Settings, op: str, calls: Callable[[], Iterator[tuple[str, str, Call, int, int]]]
) -> Iterator[dict[str, Any]]:
    """A row for each of (shape, mode, call, bytes, operations)."""
    for shape, mode, call, size, flops in calls():
        t = measure(call, seconds=settings.seconds, device=settings.device)
        rates = dict(gb_s=size / t.median * 1e-9, gflop_s=flops / t.median * 1e-9)
        dtype = precision(settings.dtypes[0]).low
        yield (
            dict(op=op, shape=shape, provider="torch", dtype=str(dtype).removeprefix("torch."), mode=mode)
            | timing_columns(t)
            | rates
        )


def _copies(settings: Settings) -> Callable[[], Iterator[tuple[str, str, Call, int, int]]]:
    def calls() -> Iterator[tuple[str, str, Call, int, int]]:
        for mib in (1, 16) if settings.quick else (16, 256, 1024) if settings.gpu else (1, 16, 256):
            source = torch.zeros(mib << 20, dtype=torch.uint8, device=settings.device)
            target = torch.empty_like(source)
            yield f"{mib} MiB", "inference", lambda: target.copy_(source), 2 * source.nbytes, 0  # noqa: B023 (called at once)

    return calls


def _products(
    settings: Settings, make: Callable[..., Tensor]
) -> Callable[[], Iterator[tuple[str, str, Call, int, int]]]:
    """A square one, and the IRFFN's expansions: (tokens, C) x (C, R)."""

    def calls() -> Iterator[tuple[str, str, Call, int, int]]:
        side = 256 if settings.quick else 8192 if settings.gpu else 1024
        shapes = [(side, side, side)]
        for s in stage_shapes(settings.variants[0], 64 if settings.gpu else 1, settings.img_size):
            shapes.append((s.batch * s.queries, s.dim, s.hidden))
        for m, k, n in shapes:
            a, b = make(m, k), make(n, k)
            size = (m * k + n * k + m * n) * a.element_size()
            yield f"{m} x {k} x {n}", "inference", lambda: F.linear(a, b), size, 2 * m * k * n  # noqa: B023 (called at once)

    return calls


def _launches(settings: Settings) -> Callable[[], Iterator[tuple[str, str, Call, int, int]]]:
    """A graph of 200 kernels that do next to nothing: what a kernel in a chain costs at least."""

    def calls() -> Iterator[tuple[str, str, Call, int, int]]:
        x = torch.zeros(1024, device=settings.device)
        graph = torch.cuda.CUDAGraph()
        x.add_(1)
        with torch.cuda.graph(graph):
            for _ in range(200):
                x.add_(1)
        yield "graph of 200 kernels", "inference", graph.replay, 0, 0
        yield "eager, 200 kernels", "inference", lambda: [x.add_(1) for _ in range(200)], 0, 0

    return calls


def _depthwise(shape: StageShape, make: Callable[..., Tensor]) -> Iterator[tuple[str, str, Call, int, int]]:
    """3x3, NHWC: LPU's and IRFFN's."""
    for s in (shape, replace(shape, dim=shape.hidden)):
        x = make(s.batch, s.dim, s.height, s.width).to(memory_format=torch.channels_last)
        conv = partial(F.conv2d, weight=make(s.dim, 1, 3, 3), padding=1, groups=s.dim)
        yield from _both(s, conv, x, 2 * x.nbytes, 3 * x.nbytes, 18 * x.numel())


def _reduce(shape: StageShape, make: Callable[..., Tensor]) -> Iterator[tuple[str, str, Call, int, int]]:
    """k x k with stride k, NHWC."""
    if shape.sr_ratio > 1:
        k, c = shape.sr_ratio, shape.dim
        x = make(shape.batch, c, shape.height, shape.width).to(memory_format=torch.channels_last)
        conv = partial(F.conv2d, weight=make(c, 1, k, k), stride=k, groups=c)
        yield from _both(shape, conv, x, x.nbytes, 2 * x.nbytes, 2 * x.numel())


def _batch_norm(shape: StageShape, make: Callable[..., Tensor]) -> Iterator[tuple[str, str, Call, int, int]]:
    """Of the hidden map, NHWC: by running statistics, and by the batch's with gradients."""
    x = make(shape.batch, shape.hidden, shape.height, shape.width).to(memory_format=torch.channels_last)
    mean, var = torch.zeros(shape.hidden, device=x.device), torch.ones(shape.hidden, device=x.device)
    yield str(shape), "inference", lambda: F.batch_norm(x, mean, var), 2 * x.nbytes, 0
    yield from _both(
        shape, lambda x: F.batch_norm(x, None, None, training=True), x, 0, 6 * x.nbytes, 0, modes=("training",)
    )


def _layer_norm(shape: StageShape, make: Callable[..., Tensor]) -> Iterator[tuple[str, str, Call, int, int]]:
    x = make(shape.batch, shape.queries, shape.dim)
    yield from _both(shape, lambda x: F.layer_norm(x, x.shape[-1:]), x, 2 * x.nbytes, 5 * x.nbytes, 0)


def _gelu(shape: StageShape, make: Callable[..., Tensor]) -> Iterator[tuple[str, str, Call, int, int]]:
    x = make(shape.batch, shape.queries, shape.hidden)
    yield from _both(shape, F.gelu, x, 2 * x.nbytes, 5 * x.nbytes, 0)


def _attention(shape: StageShape, make: Callable[..., Tensor]) -> Iterator[tuple[str, str, Call, int, int]]:
    """Scaled dot products with the bias as a mask."""
    d = shape.v_head_dim
    q = make(shape.batch, shape.heads, shape.queries, d)
    k, v = make(2, shape.batch, shape.heads, shape.keys, d)
    bias = make(shape.heads, shape.queries, shape.keys)
    flops = 4 * shape.batch * shape.heads * shape.queries * shape.keys * d
    size = 2 * q.nbytes + k.nbytes + v.nbytes + bias.nbytes
    yield from _both(shape, lambda q: F.scaled_dot_product_attention(q, k, v, bias[None]), q, size, 2 * size, flops)


def _both(
    shape: StageShape,
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    forward_bytes: int,
    step_bytes: int,
    flops: int,
    modes: tuple[str, ...] = ("inference", "training"),
) -> Iterator[tuple[str, str, Call, int, int]]:
    """Forward alone; forward and the gradient of x."""
    leaf = x.detach().requires_grad_()
    grad = torch.randn_like(function(x))

    def inference() -> None:
        with torch.inference_mode():
            function(x)

    if "inference" in modes:
        yield str(shape), "inference", inference, forward_bytes, flops
    if "training" in modes:
        yield str(shape), "training", lambda: torch.autograd.grad(function(leaf), leaf, grad), step_bytes, 3 * flops


#: By name: from a stage and a maker of tensors to (shape, mode, call, bytes that must move, operations).
OPERATIONS: dict[str, Callable[[StageShape, Callable[..., Tensor]], Iterator[tuple[str, str, Call, int, int]]]] = {
    "depthwise 3x3": _depthwise,
    "depthwise k x k": _reduce,
    "batch norm": _batch_norm,
    "layer norm": _layer_norm,
    "gelu": _gelu,
    "attention (SDPA)": _attention,
}
