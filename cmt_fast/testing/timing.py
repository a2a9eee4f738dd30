"""Measuring how long a call takes, alone or several side by side."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]

#: One sample holds as many calls as take this long, so that the clock's resolution does not count.
_SAMPLE_SECONDS = 1e-3

#: A call that takes longer is slow: not worth a long warm-up, nor as many samples.
_SLOW_SECONDS = 0.5

#: Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Timing:
    """Seconds a call.

    Attributes:
        median, p20, p80: of the samples.
        runs: calls measured.
        samples: seconds a call of each sample, in the order in which they were taken.
    """

    median: float
    p20: float
    p80: float
    runs: int
    samples: tuple[float, ...] = ()


def measure(
    fn: Call,
    *,
    seconds: float = 1.0,
    min_runs: int | None = None,
    device: torch.device | str = "cpu",
    cold_cache: bool = False,
) -> Timing:
    """How long ``fn()`` takes; see :func:`measure_interleaved`."""
    return measure_interleaved({"": fn}, seconds=seconds, min_runs=min_runs, device=device, cold_cache=cold_cache)[""]


def measure_interleaved(
    fns: Mapping[str, Call],
    *,
    seconds: float = 1.0,
    min_runs: int | None = None,
    device: torch.device | str = "cpu",
    cold_cache: bool = False,
) -> dict[str, Timing]:
    """How long each of several calls takes, in rounds that run every one once.

    A machine that slows down, or a neighbour that wakes up, then slows all of them alike, and their ratios stay right.
    The order turns by one each round, so that none always follows the same other. Beside a call that takes seconds, one that
    takes less than a tenth of that is sampled several times a round, so that few rounds are not few samples of it.

    Args:
        fns: the calls by name. Each is run a few times first to warm up.
        seconds: to spend on each, roughly.
        min_runs: rounds at least, however long they take; by default 5, or 3 where a call takes longer than half a second.
        device: a CUDA device is timed by events around each sample, starting from an idle device, so the time holds the
            launching of kernels as a single call feels it; the CPU by ``time.perf_counter``.
        cold_cache: on a CUDA device, overwrite the L2 cache before each call, and launch while the device is still busy
            with that: the time of the kernels alone, from memory. Ignored on a CPU.

    Returns:
        The :class:`Timing` of each. Garbage collection is off while measuring, and memory that a CPU's calls free stays with the
        process from then on.

    Raises:
        ValueError: if ``seconds`` or ``min_runs`` is not positive.
    """
    if seconds <= 0 or (min_runs is not None and min_runs < 1):
        raise ValueError(f"seconds and min_runs must be positive, got {seconds} and {min_runs}")
    if not fns:
        return {}
    device = torch.device(device)
    if device.type == "cpu":
        _keep_freed_memory()
    cold_cache = cold_cache and device.type == "cuda"
    stopwatch = make_stopwatch(device, cold_cache)
    once = {name: _warm_up(fn, stopwatch) for name, fn in fns.items()}
    slowest = max(once.values())
    calls = {name: 1 if cold_cache else max(1, round(_SAMPLE_SECONDS / once[name])) for name in fns}
    slow = slowest > _SLOW_SECONDS
    repeats = {name: min(10, math.ceil(slowest / once[name] / 10)) if slow else 1 for name in fns}
    rounds = min_runs or (3 if slow else 5)
    samples: dict[str, list[float]] = {name: [] for name in fns}
    names = list(fns)
    with _no_gc():
        deadline = time.perf_counter() + seconds * len(fns)
        while rounds > 0 or time.perf_counter() < deadline:
            for name in names:
                samples[name] += [stopwatch.time(fns[name], calls[name]) for _ in range(repeats[name])]
            names.append(names.pop(0))
            rounds -= 1
    return {name: _summary(samples[name], calls[name]) for name in fns}


def make_stopwatch(device: torch.device, cold_cache: bool = False) -> Stopwatch:
    """What times a call on ``device``; ``cold_cache`` as in :func:`measure_interleaved`."""
    return _EventStopwatch(device, cold_cache) if device.type == "cuda" else _ClockStopwatch()


class Stopwatch:
    def time(self, fn: Call, calls: int) -> float:
        """Seconds a call, over ``calls`` of them in a row."""
        raise NotImplementedError


class _ClockStopwatch(Stopwatch):
    def time(self, fn: Call, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        return (time.perf_counter() - start) / calls


class _EventStopwatch(Stopwatch):
    def __init__(self, device: torch.device, cold_cache: bool) -> None:
        self.device = device
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.zeros(max(4 * cache, 1 << 28), dtype=torch.int8, device=device) if cold_cache else None

    def time(self, fn: Call, calls: int) -> float:
        start, end = self.events
        torch.cuda.synchronize(self.device)
        if self.flush is not None:
            self.flush.zero_()
        start.record()
        for _ in range(calls):
            fn()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) * 1e-3 / calls


def _warm_up(fn: Call, stopwatch: Stopwatch) -> float:
    """Run ``fn`` until it no longer compiles, allocates or chooses algorithms; seconds that it takes then, roughly."""
    fn()
    once = stopwatch.time(fn, 1)
    if once <= _SLOW_SECONDS:
        once = min(once, stopwatch.time(fn, 1))
    if once < _SAMPLE_SECONDS:  # the first calls of a short one say little
        once = min(once, stopwatch.time(fn, math.ceil(_SAMPLE_SECONDS / max(once, 1e-7))))
    return max(once, 1e-7)


def _summary(samples: list[float], calls: int) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], calls, (samples[0],))
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), fifths[0], fifths[3], len(samples) * calls, tuple(samples))


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc's allocator keep what is freed, as jemalloc and tcmalloc do.

    By default it hands large tensors back to the system, or not, by what the process allocated before: a call then takes up to a
    quarter longer or shorter by its past, in the kernel, which clears the pages. See mallopt(3).
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_TRIM_THRESHOLD, -1)
            mallopt(_M_MMAP_MAX, 0)


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def peak_memory(fn: Call, device: torch.device | str) -> int | None:
    """Bytes that ``fn()`` allocates at its peak on a CUDA device, beyond what is allocated before; None on a CPU.

    (The resident size of a CPU process says little about one call.)
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    fn()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
