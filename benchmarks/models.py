"""Time whole models: ``python -m benchmarks.models [--variant cmt_s] [--batch 1 8] [--dtype float32] [--budget 3600]``.

All providers of a variant, batch and precision are checked and then timed in turns. After that each provider is started once
more in a process of its own, for its memory and the seconds to its first result (on a CPU). The most telling settings
come first, and every row is in the result file as soon as it is measured: a run that is cut off goes on where it was when it
is started again on the same day and commit.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.run import QUICK_RESULTS
from benchmarks.store import RESULTS, ResultFile
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.benchmark import DTYPES, bench
from cmt_fast.testing.fresh import measure_fresh
from cmt_fast.testing.providers import COMPILED_ON_GPU, PROVIDERS
from cmt_fast.training.config import find_device

#: By what they tell: the variant that the literature compares, then the others.
ORDER = ("cmt_s", "cmt_ti", "cmt_xs", "cmt_b")

#: All but some that take minutes: our own code compiled, which is for training, a tuning that needs an idle machine, and what is for GPUs.
DEFAULT_PROVIDERS = tuple(
    name for name in PROVIDERS if name not in ("compile", "original-freezing-max-autotune", *COMPILED_ON_GPU)
)


class Setting(NamedTuple):
    """What is timed in turns."""

    model: str
    batch: int
    dtype: str
    img_size: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks asked for; returns 1 if a provider was wrong."""
    options = _parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = find_device(options.device)
    results = ResultFile(device, options.out or (QUICK_RESULTS if options.quick else RESULTS), "models")
    print(f"{results.data['machine']}\n-> {results.path}", flush=True)
    deadline = time.monotonic() + options.budget
    todo = _settings(options)
    for setting in todo:
        if time.monotonic() < deadline:
            _time(results, setting, options, device)
    if device.type == "cpu" and not options.no_fresh:
        for setting in todo:
            for provider in options.provider:
                if time.monotonic() < deadline:
                    _start_fresh(results, setting, provider, deadline)
    if time.monotonic() >= deadline:
        print("the budget is spent: the same command goes on from here", flush=True)
    return int(any(row["note"].startswith("wrong") for row in results.data["rows"]))


def _settings(options: argparse.Namespace) -> list[Setting]:
    """Variant by variant; of each the small batch and the plain precision first."""
    return [
        Setting(variant, batch, dtype, 64 if options.quick else VARIANTS[variant].resolution)
        for variant in options.variant
        for batch in options.batch
        for dtype in options.dtype
    ]


def _rows(results: ResultFile, setting: Setting) -> dict[str, dict[str, Any]]:
    """What the file has of a setting, by provider."""
    rows = [row for row in results.data["rows"] if row["mode"] == "inference"]
    return {row["provider"]: row for row in rows if Setting(*(row[name] for name in Setting._fields)) == setting}


def _time(results: ResultFile, setting: Setting, options: argparse.Namespace, device: torch.device) -> None:
    """All providers in turns, unless the file has them all: ratios are of one run."""
    if set(options.provider) <= _rows(results, setting).keys() and not options.again:
        return
    rows = bench(
        [setting.model],
        options.provider,
        [setting.batch],
        [setting.dtype],
        device,
        img_size=setting.img_size,
        seconds=options.seconds or (0.05 if options.quick else 3.0),
        progress=lambda done, total, what: print(f"  {what}", flush=True),
    )
    for row in rows:
        results.add(asdict(row))
        print(_line(asdict(row)), flush=True)


def _start_fresh(results: ResultFile, setting: Setting, provider: str, deadline: float) -> None:
    """Add memory and the seconds to the first result to a row that has a time and not these."""
    row = _rows(results, setting).get(provider)
    if row is None or row["median_ms"] is None or row["ready_s"] is not None:
        return
    try:
        fresh = measure_fresh(
            setting.model,
            provider,
            setting.batch,
            setting.dtype,
            setting.img_size,
            timeout=None if math.isinf(deadline) else max(1.0, deadline - time.monotonic()),
        )
    except subprocess.TimeoutExpired:
        return
    except RuntimeError as error:
        print(f"{provider} has no memory: {error}", flush=True)
        return
    results.add(row | asdict(fresh))
    print(_line(row | asdict(fresh)), flush=True)


def _line(row: dict[str, Any]) -> str:
    name = f"{row['model']:<7} batch {row['batch']:<3} {row['dtype']:<18} {row['provider']:<32}"
    if row["median_ms"] is None:
        return f"{name} {row['note']}"
    ratio = f"{row['ratio']:5.2f}x" if row["ratio"] else ""
    line = (
        f"{name} {row['median_ms']:9.1f} ms  {row['p20_ms']:9.1f} .. {row['p80_ms']:<9.1f} {ratio} ({row['runs']} runs)"
    )
    if row["ready_s"] is not None:
        line += f"  ready {row['ready_s']:.1f} s, peak {row['peak_mib']:.0f} MiB, kept {row['kept_mib']:.0f} MiB"
    return line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.models", description=__doc__)
    parser.add_argument(
        "--variant", nargs="+", choices=VARIANTS, default=ORDER, metavar="NAME", help=", ".join(VARIANTS)
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=["float32", "autocast-bfloat16"],
        metavar="NAME",
        help=", ".join(DTYPES),
    )
    parser.add_argument(
        "--provider",
        nargs="+",
        choices=PROVIDERS,
        default=DEFAULT_PROVIDERS,
        metavar="NAME",
        help=f"by default {', '.join(DEFAULT_PROVIDERS)}",
    )
    parser.add_argument("--seconds", type=float, help="for each measurement; 3, or 0.05 with --quick")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="start nothing after these")
    parser.add_argument("--threads", type=int, help="of a CPU; PyTorch's choice by default")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto")
    parser.add_argument("--out", type=Path, help="folder of result files; benchmarks/results, with --quick outputs/")
    parser.add_argument("--no-fresh", action="store_true", help="no memory and no time to the first result")
    parser.add_argument("--again", action="store_true", help="time what the file has, too")
    parser.add_argument("--quick", action="store_true", help="images of 64 pixels: to see that everything runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
