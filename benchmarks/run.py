"""Time the operations: ``python -m benchmarks.run [--op lmhsa] [--variant cmt_s] [--dtype bfloat16] [--quick]``.

Each operation is first verified at the very shape that is timed; one that is wrong gets no time. All providers run in turns,
and every row is in the result file as soon as it is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.calls import MODES, make_call, work
from benchmarks.registry import BASELINE, OPS, PROVIDERS
from benchmarks.store import RESULTS, ResultFile, rate_columns, timing_columns
from cmt_fast.backend import BACKENDS, machine_reasons
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.inputs import Case
from cmt_fast.testing.precision import PRECISIONS, Precision, precision
from cmt_fast.testing.results import error_line
from cmt_fast.testing.shapes import StageShape, stage_shapes
from cmt_fast.testing.timing import measure_interleaved
from cmt_fast.testing.verification import verify_case
from cmt_fast.training.config import find_device

#: Of runs that only show that everything works; git ignores it.
QUICK_RESULTS = RESULTS.parents[1] / "outputs" / "benchmarks-quick"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks asked for; returns 1 if a provider was wrong."""
    options = _parser().parse_args(arguments)
    seconds = options.seconds or (0.05 if options.quick else 1.0)
    device = find_device(options.device)
    results = ResultFile(device, options.out or (QUICK_RESULTS if options.quick else RESULTS))
    print(f"{results.data['machine']}\n-> {results.path}", flush=True)
    any_wrong = False
    for op in options.op or OPS:
        for shape in shapes(options):
            case = OPS[op].make_case(shape)
            if case is None:
                continue
            providers = options.provider or [name for name in OPS[op].providers if name != "compile"]
            for dtype in options.dtype or ["float32"]:
                for mode in options.mode or MODES:
                    for row in measure_case(op, case, shape, providers, precision(dtype), device, mode, seconds):
                        results.add(row)
                        any_wrong |= row["note"].startswith("wrong")
                        print(_line(row), flush=True)
    return int(any_wrong)


def measure_case(
    op: str,
    case: Case,
    shape: StageShape,
    providers: Sequence[str],
    p: Precision,
    device: torch.device,
    mode: str,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Verify, then time every provider of one operation; yields their rows."""
    notes = _gate(case, [name for name in providers if name in BACKENDS], p, device, mode)
    calls = {}
    for provider in providers:
        if not notes.get(provider):
            try:
                calls[provider] = make_call(case, provider, p, device, mode)
                calls[provider]()
            except Exception as error:
                calls.pop(provider, None)
                notes[provider] = error_line(error)
    timings = measure_interleaved(calls, seconds=seconds, device=device, cold_cache=True)
    base = timings.get(BASELINE)
    size, flops = work(case, p, device, mode)
    for provider in providers:
        row: dict[str, Any] = dict(op=op, shape=str(shape), provider=provider, dtype=p.name, mode=mode)
        t = timings.get(provider)
        row |= timing_columns(t, base) | rate_columns(t, size, flops) | dict(note=notes.get(provider, ""))
        yield row


def _gate(case: Case, backends: list[str], p: Precision, device: torch.device, mode: str) -> dict[str, str]:
    """Why a backend gets no time: what it cannot run, or computes wrongly at this shape."""
    notes = {backend: "; ".join(machine_reasons(backend)) for backend in backends}
    able = [backend for backend in backends if not notes[backend]]
    for check in verify_case(case, p, able, device, mode == "training"):
        if not check.passed and not notes[check.backend]:
            notes[check.backend] = check.detail if check.passed is None else f"wrong {check.quantity}: {check.detail}"
    return notes


def shapes(options: argparse.Namespace) -> Iterator[StageShape]:
    """The stages that the options --variant, --batch and --quick ask for."""
    for variant in options.variant or ["cmt_s"]:
        stages = stage_shapes(variant, options.batch, 64 if options.quick else None)
        yield from stages[:1] if options.quick else stages


def _line(row: dict[str, Any]) -> str:
    name = f"{row['op']:<25} {row['shape']:<28} {row['dtype']:<10} {row['mode']:<10} {row['provider']:<10}"
    if row["median_us"] is None:
        return f"{name} {row['note']}"
    ratio = f"{row['ratio']:6.2f}x" if row["ratio"] else ""
    return f"{name} {row['median_us']:10.1f} us  {row['p20_us']:10.1f} .. {row['p80_us']:<10.1f} {ratio}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.run", description=__doc__)
    parser.add_argument("--op", action="append", choices=OPS, help="may be repeated; all by default")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="may be repeated; cmt_s by default")
    parser.add_argument(
        "--provider", action="append", choices=PROVIDERS, help="may be repeated; all but compile by default"
    )
    parser.add_argument("--dtype", action="append", choices=PRECISIONS, help="may be repeated; float32 by default")
    parser.add_argument("--mode", action="append", choices=MODES, help="may be repeated; both by default")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=None, help="for each measurement; 1, or 0.05 with --quick")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto")
    parser.add_argument("--out", type=Path, help="folder of result files; benchmarks/results, with --quick outputs/")
    parser.add_argument("--quick", action="store_true", help="one small shape: to see that everything runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
