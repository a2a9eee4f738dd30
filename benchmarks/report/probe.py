"""How quiet the machine is: the time of work that is always the same."""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F

from cmt_fast.testing.timing import make_stopwatch


def probe(device: torch.device, calls: int = 3) -> float:
    """Seconds of a large matrix product, the median of ``calls``: more where a clock is throttled or shared."""
    side = 4096 if device.type == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device)
    F.linear(a, b)
    stopwatch = make_stopwatch(device)
    return statistics.median(stopwatch.time(lambda: F.linear(a, b), 1) for _ in range(calls))
