"""Operations and steps, one by one: beside PyTorch and, where it compiles, ``torch.compile``, and how near they are to the machine's best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import attention, run, steps
from benchmarks.registry import OPS
from benchmarks.report.measurement import Measurement
from benchmarks.report.settings import Settings
from cmt_fast.backend import BACKENDS, machine_reasons
from cmt_fast.testing.packed_steps import runs_in
from cmt_fast.testing.precision import precision
from cmt_fast.testing.shapes import StageShape, stage_shapes


def plan(settings: Settings) -> Iterator[Measurement]:
    """The steps of a packed model, then the operations in training."""
    dtype = precision(settings.dtypes[0])
    batch = 1 if not settings.gpu else 256
    if settings.gpu:
        from benchmarks import kernels

        for name in kernels.STEPS:
            for shape in filter(partial(runs_in, name), stage_shapes(settings.variants[0], batch, settings.img_size)):
                call = partial(_gpu_step, settings, name, shape)
                yield Measurement(f"packed {name} {shape.name}", call, 30.0)
    else:
        for name in steps.STEPS:
            yield Measurement(f"packed {name}", partial(_cpu_step, settings, name), 8 * settings.seconds + 5)
    backends = [name for name in BACKENDS if not machine_reasons(name)]
    if settings.gpu:
        for shape in stage_shapes(settings.variants[0], 128, settings.img_size):
            call = partial(_attention, settings, shape)
            yield Measurement(f"attention {shape.name} in training, beside SDPA and FlexAttention", call, 120.0)
    providers = backends if not settings.gpu else [*backends, "compile"]
    for op, benchmark in OPS.items():
        for shape in stage_shapes(settings.variants[0], batch if settings.gpu else 1, settings.img_size):
            shape = replace(shape, batch=128) if settings.gpu else shape
            case = benchmark.make_case(shape)
            if case is not None:
                call = partial(_op, settings, op, shape, providers)
                yield Measurement(f"{op} {shape.name} training {dtype.name}", call, 60.0 if settings.gpu else 5.0)


def _cpu_step(settings: Settings, step: str) -> Iterator[dict[str, Any]]:
    with torch.inference_mode():
        yield from _judged(
            steps.measure_steps(
                settings.variants[0],
                1,
                settings.dtypes[0],
                list(steps.PROVIDERS),
                [step],
                settings.seconds / 2,
                settings.img_size,
            )
        )


def _gpu_step(settings: Settings, step: str, shape: StageShape) -> Iterator[dict[str, Any]]:
    from benchmarks import kernels

    p = precision(settings.dtypes[0])
    inputs = shape, p.low, settings.device
    chain = kernels.CHAINS[step](*inputs) if step in kernels.CHAINS else None
    rows = kernels.measure_step(
        kernels.STEPS[step](*inputs), chain, kernels.PROVIDERS, settings.device, settings.seconds
    )
    for row in _judged(rows):
        yield dict(op=f"packed {step}", shape=str(shape), dtype=p.name, mode="inference", **row)


def _op(settings: Settings, op: str, shape: StageShape, providers: list[str]) -> Iterator[dict[str, Any]]:
    case = OPS[op].make_case(shape)
    assert case is not None
    p = precision(settings.dtypes[-1] if settings.gpu else settings.dtypes[0])
    yield from _judged(
        run.measure_case(op, case, shape, providers, p, settings.device, "training", settings.seconds / 2)
    )


def _attention(settings: Settings, shape: StageShape) -> Iterator[dict[str, Any]]:
    """Forward and backward; a peer that cannot run has no time, one that is wrong is told, ours that is wrong fails."""
    p = precision(settings.dtypes[0])
    rows = attention.measure_shape(shape, p.low, list(attention.PROVIDERS), settings.device, settings.seconds)
    for row in rows:
        if row["provider"] == "triton" and row["note"].startswith("wrong"):
            raise AssertionError(row["note"])
        yield dict(op="attention in training", shape=str(shape), dtype=p.name, **row)


def _judged(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """No number of a wrong result: the whole measurement fails."""
    found = list(rows)
    if wrong := [row["note"] for row in found if row["note"].startswith("wrong")]:
        raise AssertionError(wrong[0])
    return iter(found)
