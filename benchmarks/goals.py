"""CMT-S on a GPU beside its goals: ``python -m benchmarks.goals [--mode training] [--device cuda] [--quick]``.

Training: ``goals_training.py``. In inference the packed model in bfloat16 takes turns with everything that it should be faster than: ``torch.compile`` of the original's order in a bfloat16 model,
in three modes and two layouts, the original's order in eager autocast, and timm's DeiT-S, compiled in the same ways. Every row is in the result file
as soon as it is measured. The goals are those of an H100; returns 1 if one is missed or a result is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import goals_training
from benchmarks.report.peers import PEERS, timm_call
from benchmarks.run import QUICK_RESULTS
from benchmarks.store import RESULTS, ResultFile, timing_columns
from cmt_fast.testing.benchmark import MODES, bench, make_images, make_model
from cmt_fast.testing.precision import precision
from cmt_fast.testing.providers import BASELINE, COMPILED_ON_GPU, PROVIDERS
from cmt_fast.testing.results import error_line
from cmt_fast.testing.timing import measure_interleaved
from cmt_fast.training.config import find_device

DTYPE, AUTOCAST = "bfloat16", "autocast-bfloat16"
OURS = "optimize"
COMPILED = ("original-compile", *COMPILED_ON_GPU)
#: DeiT-S compiled in the same ways.
PEER = PEERS[0]
PEER_MODES = tuple(name.removeprefix("original-") for name in COMPILED)

Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        what: the quantity.
        required: at least this, or at most where less is better.
        batch: that it is for, the large or the small one.
        value: the quantity in the rows of that batch; None where one is missing.
    """

    what: str
    required: float
    large_batch: bool
    value: Callable[[Sequence[Row]], float | None]
    less_is_better: bool = False

    def met(self, value: float | None) -> bool:
        if value is None:
            return False
        return value <= self.required if self.less_is_better else value >= self.required


def _ms(rows: Sequence[Row], dtype: str, *providers: str, model: str = "cmt") -> float | None:
    """The least median of these providers."""
    found = [
        row["median_ms"]
        for row in rows
        if row["model"].startswith(model)
        and row["dtype"] == dtype
        and row["provider"] in providers
        and row["median_ms"]
    ]
    return min(found, default=None)


def _over(base: float | None, ours: float | None) -> float | None:
    return base / ours if base and ours else None


def _images_per_s(rows: Sequence[Row]) -> float | None:
    ours = _ms(rows, DTYPE, OURS)
    return 1e3 * rows[0]["batch"] / ours if ours else None


def _over_deit(rows: Sequence[Row]) -> float | None:
    return _over(_ms(rows, DTYPE, *PEER_MODES, model=PEER.model), _ms(rows, DTYPE, OURS))


GOALS = (
    Goal("images a second", 25_000, True, _images_per_s),
    Goal("milliseconds", 0.40, False, lambda rows: _ms(rows, DTYPE, OURS), less_is_better=True),
    Goal(
        "over torch.compile at its best",
        3.5,
        True,
        lambda rows: _over(_ms(rows, DTYPE, *COMPILED), _ms(rows, DTYPE, OURS)),
    ),
    Goal(
        "over the original's order in eager autocast",
        6.0,
        True,
        lambda rows: _over(_ms(rows, AUTOCAST, BASELINE), _ms(rows, AUTOCAST, OURS)),
    ),
    Goal("over DeiT-S compiled at its best", 1.0, True, _over_deit),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the goals, return 1 if one is missed."""
    options = _parser().parse_args(arguments)
    device = find_device(options.device)
    results = ResultFile(device, options.out or (QUICK_RESULTS if options.quick else RESULTS), "goals")
    print(f"{results.data['machine']}\n-> {results.path}", flush=True)
    variant, size, large = ("cmt_ti", 64, 2) if options.quick else ("cmt_s", 224, 256)
    seconds = options.seconds or (0.02 if options.quick else 3.0)
    if options.mode == "training":
        return _train(results, variant, size, 2 if options.quick else 128, device, seconds, 3 if options.quick else 200)
    measured: dict[bool, list[Row]] = {True: [], False: []}
    for is_large, batch in ((True, large), (False, 1)):
        for row in measure(variant, size, batch, device, seconds):
            results.add(row)
            measured[is_large].append(row)
            print(_line(row), flush=True)
    values = [goal.value(measured[goal.large_batch]) for goal in GOALS]
    for goal, value in zip(GOALS, values):
        print(_verdict(goal, value, large if goal.large_batch else 1))
    wrong = any(row["note"].startswith("wrong") for rows in measured.values() for row in rows)
    return int(wrong or not all(goal.met(value) for goal, value in zip(GOALS, values)))


def _train(
    results: ResultFile, variant: str, size: int, batch: int, device: torch.device, seconds: float, steps: int
) -> int:
    """Measure training, print its goals, return 1 if one is missed."""
    rows = []
    for row in goals_training.measure(variant, size, batch, device, seconds):
        results.add(row)
        rows.append(row)
        print(_line(row), flush=True)
    of_runs, curves = goals_training.losses(variant, size, batch, device, steps)
    results.add(curves)
    verdicts = goals_training.verdicts(goals_training.values(rows) | of_runs)
    for line, _ in verdicts:
        print(f"batch {batch}: {line}")
    return int(any(row["note"].startswith("wrong") for row in rows) or not all(met for _, met in verdicts))


def measure(variant: str, size: int, batch: int, device: torch.device, seconds: float) -> Iterator[Row]:
    """The rows of one batch size: all of a precision in turns."""
    for dtype, providers in ((DTYPE, (BASELINE, OURS, *COMPILED)), (AUTOCAST, (BASELINE, OURS))):
        rows = bench([variant], providers, [batch], [dtype], device, img_size=size, seconds=seconds)
        yield from map(asdict, rows)
    yield from _measure_peer(variant, size, batch, device, seconds)


def _measure_peer(variant: str, size: int, batch: int, device: torch.device, seconds: float) -> Iterator[Row]:
    """DeiT-S in turns with the packed model, whose time the rows' ratio is of."""
    p = precision(DTYPE)
    model, images = make_model(variant, size, p, device), make_images(batch, size, p, device)
    ours = PROVIDERS[OURS].make(model, images, p)
    calls: dict[str, Callable[[], object]] = {OURS: torch.inference_mode()(lambda: ours(images))}
    notes = {}
    for mode in PEER_MODES:
        try:
            calls[mode] = timm_call(PEER.model, batch, PEER.img_size, mode, p, device)
        except Exception as error:
            notes[mode] = error_line(error)
    timings = measure_interleaved(calls, seconds=seconds, device=device)
    for mode in PEER_MODES:
        t = timings.get(mode)
        yield dict(
            model=PEER.model,
            img_size=PEER.img_size,
            batch=batch,
            provider=mode,
            dtype=DTYPE,
            mode="inference",
            median_ms=t and t.median * 1e3,
            **timing_columns(t, timings[OURS]),
            note=notes.get(mode, ""),
        )


def _line(row: Row) -> str:
    name = f"{row['model']:<22} batch {row['batch']:<3} {row['dtype']:<18} {row['provider']:<46}"
    if row["median_ms"] is None:
        return f"{name} {row['note']}"
    return f"{name} {row['median_ms']:9.3f} ms" + (f" {row['ratio']:6.2f}x" if row["ratio"] else "")


def _verdict(goal: Goal, value: float | None, batch: int) -> str:
    state = "met" if goal.met(value) else "not measured" if value is None else "MISSED"
    bound = f"{'at most' if goal.less_is_better else 'at least'} {goal.required:g}"
    return f"batch {batch}: {goal.what}: {'-' if value is None else f'{value:.4g}'} ({bound}): {state}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.goals", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=MODES, default="inference")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto")
    parser.add_argument("--seconds", type=float, help="for each measurement; 3, or 0.02 with --quick")
    parser.add_argument("--out", type=Path, help="folder of result files; benchmarks/results, with --quick outputs/")
    parser.add_argument("--quick", action="store_true", help="a small model and batch: to see that everything runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
