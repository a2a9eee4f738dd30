"""Whole models: every way to run a CMT in turns with the original's, in inference and in training; and their memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.report.measurement import Measurement, Unavailable
from benchmarks.report.settings import Settings
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.benchmark import Subject, bench
from cmt_fast.testing.fresh import measure_fresh
from cmt_fast.testing.original_code import original_folder
from cmt_fast.testing.precision import precision
from cmt_fast.testing.providers import BASELINE, COMPILED_ON_GPU, PROVIDERS

#: What takes long before it can be timed, and how many seconds, roughly. The others take about ten.
SLOW = {"onnxruntime": 40.0, "onnxruntime-packed": 40.0}
_COMPILING = 130.0

#: In this order; what is left out is for training, or wants hours alone.
INFERENCE = (
    "optimize",
    *(name for name in PROVIDERS if name not in (BASELINE, "optimize", "original-freezing-max-autotune")),
)
TRAINING = ("auto", "reference", "original-code", "compile", "original-compile")


#: One after the other, the providers of a setting are judged by the same float64 run.
_subject = functools.lru_cache(maxsize=1)(Subject)


def plan(settings: Settings, mode: str) -> Iterator[Measurement]:
    """The quick providers of every setting before the slow ones of any."""
    settings_ = [
        (variant, batch, dtype)
        for dtype in settings.dtypes
        for variant in settings.variants
        for batch in (settings.batches if mode == "inference" else _training_batches(settings))
    ]
    providers = INFERENCE if mode == "inference" else TRAINING
    if not settings.gpu:
        providers = tuple(name for name in providers if name not in (*COMPILED_ON_GPU, "optimize-triton"))
    if not original_folder():
        providers = tuple(name for name in providers if name != "original-code")
    if settings.quick:
        providers = providers[:2]
    for slow in (False, True):
        for variant, batch, dtype in settings_:
            for provider in providers:
                expected = _expected(provider)
                if (expected is not None) == slow and not PROVIDERS[provider].unsupported(precision(dtype), mode):
                    yield Measurement(
                        f"{variant} batch {batch} {dtype} {provider}",
                        partial(_rows, settings, variant, batch, dtype, provider, mode),
                        0.0 if settings.quick else expected or 10.0,
                    )


def _training_batches(settings: Settings) -> tuple[int, ...]:
    return (128, 32) if settings.gpu else (2,) if settings.quick else (4,)


def _expected(provider: str) -> float | None:
    if provider in SLOW:
        return SLOW[provider]
    return _COMPILING if "compile" in provider or "freezing" in provider else None


def _rows(
    settings: Settings, variant: str, batch: int, dtype: str, provider: str, mode: str
) -> Iterator[dict[str, Any]]:
    """The baseline's row, and the provider's with the time of the baseline that took turns with it."""
    base, row = bench(
        [variant],
        [BASELINE, provider],
        [batch],
        [dtype],
        settings.device,
        mode,
        settings.img_size,
        seconds=settings.seconds,
        make_subject=_subject,
    )
    if row.note.startswith("wrong"):
        raise AssertionError(row.note)
    if row.median_ms is None:
        raise RuntimeError(row.note)
    yield asdict(base)
    yield asdict(row) | dict(base_ms=base.median_ms, base_peak_mib=base.peak_mib)


def memory_plan(settings: Settings) -> Iterator[Measurement]:
    """On a CPU each provider in a process of its own. (On a GPU the rows of whole models have it.)"""
    if settings.gpu:
        raise Unavailable("on a GPU the allocator counts while the whole models run: their rows have it")
    for batch in reversed(settings.batches):
        for provider in (
            (BASELINE, "optimize") if settings.quick else (BASELINE, "optimize", "reference", "onnxruntime-packed")
        ):
            variant, dtype = settings.variants[0], settings.dtypes[0]
            yield Measurement(
                f"{variant} batch {batch} {provider}",
                partial(_memory, settings, variant, batch, dtype, provider),
                0.0 if settings.quick else SLOW.get(provider, 10.0),
            )


def _memory(settings: Settings, variant: str, batch: int, dtype: str, provider: str) -> Iterator[dict[str, Any]]:
    size = settings.img_size or VARIANTS[variant].resolution
    fresh = measure_fresh(variant, provider, batch, dtype, size, timeout=600)
    yield dict(
        model=variant, img_size=size, batch=batch, provider=provider, dtype=dtype, mode="inference", **asdict(fresh)
    )
