"""The page of a report: tables and figures of the result file, as HTML and Markdown. Nothing here measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peaks import Peaks, peaks
from benchmarks.plot import write_figures
from benchmarks.report.measurement import disturbed, quietest
from cmt_fast.testing.results import device_name
from cmt_fast.training.report import Report

Row = dict[str, Any]

CAPTIONS = {
    "accuracy": "Published accuracy against measured images a second",
    "models": "Whole models in inference: how many times as fast as the original's order of operations",
    "models-training": "Whole models in training: how many times as fast as the original's order of operations",
    "operations": "Steps in inference: how many times as fast as plain PyTorch",
    "operations-training": "Operations with their gradients: how many times as fast as plain PyTorch",
    "roofline": "Operations and steps under what the machine does at best",
    "memory": "Peak memory of a call",
    "latency": "Time an image over the batch",
}


def write_page(data: dict[str, Any], folder: Path) -> Path:
    """Write ``report.html``, ``report.md`` and the figures into ``folder``; returns the path of the first.

    Without matplotlib the page has no figures and says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = data["machine"]
    page = Report(
        f"cmt_fast on {device_name(facts)}",
        "Every number was measured on this machine; ratios are of providers that took turns in one process. A result that was "
        "not as accurate as PyTorch's own gets no time. Rows that lose stay. Of several visits each provider's quietest counts.",
        [(name.replace("_", " "), str(value)) for name, value in facts.items() if value is not None],
    )
    try:
        figures, missing = write_figures(data, folder), ""
    except ImportError as error:
        figures, missing = {}, f"No figures: {error}; then python -m benchmarks.plot draws them from the result file."
    if missing:
        page.text(missing)
    for name, path in figures.items():
        page.figure(path, CAPTIONS[name])
    best = peaks(data)
    for name, state in data.get("sections", {}).items():
        page.heading(state["title"])
        rows = [row for row in data["rows"] if row.get("section") == name]
        for header, lines in _tables(name, rows, best):
            page.table(header, lines)
        for note in _notes(state, quietest(data)):
            page.text(note)
    return page.write(folder)


def _notes(state: dict[str, Any], best: float) -> list[str]:
    """``best``: seconds that the probe takes while the machine is quiet."""
    notes = [f"Not here: {state['note']}"] if state["note"] else []
    if names := disturbed(state, best):
        notes.append(
            f"Measured only while something else slowed the machine ({len(names)} of {len(state['visits'])}): {_first(names)}."
        )
    if clocks := state.get("clocks_power"):
        sm = sorted(int(line.split()[0]) for line in clocks.values() if line and line.split()[0].isdigit())
        notes += [f"SM clock after each measurement: {sm[0]} to {sm[-1]} MHz; with power in the file."] if sm else []
    notes += [f"Failed: {name}: {why}" for name, why in state["failed"].items()]
    if state["missing"]:
        notes.append(f"Not measured yet ({len(state['missing'])}): {_first(state['missing'])}")
    return notes


def _first(names: Sequence[str], count: int = 12) -> str:
    return ", ".join(names[:count]) + (" ..." if len(names) > count else "")


def _tables(section: str, rows: Sequence[Row], best: Peaks) -> list[tuple[list[str], list[list[str]]]]:
    """Header and lines; none without rows."""
    if not rows:
        return []
    header, line = _LINES[section]
    return [(header, [line(row | _shares(row, best)) for row in rows])]


def _shares(row: Row, best: Peaks) -> Row:
    """Of what the machine does at best. A copy that took turns with a kernel counts before the calibration's."""
    of_copy = row.get("of_copy") or best.of_copy(row.get("gb_s"))
    return dict(of_copy=of_copy, of_products=best.of_products(row.get("gflop_s")))


def _percent(x: float | None) -> str:
    return "–" if x is None else f"{x:.0%}"


def _us(row: Row) -> list[str]:
    if row.get("median_us") is None:
        return ["–", "–"]
    return [_number(row["median_us"]), f"{_number(row['p20_us'])} .. {_number(row['p80_us'])}"]


def _number(x: float | None, unit: str = "") -> str:
    """Three digits."""
    if x is None:
        return "–"
    return f"{x:.0f}{unit}" if abs(x) >= 100 else f"{x:.3g}{unit}"


def _ratio(x: float | None) -> str:
    return "–" if x is None else f"{x:.2f}x"


def _visits(row: Row) -> str:
    """The lowest and the highest ratio of all visits, and how many they are; nothing of a baseline."""
    if row["ratio"] in (None, 1.0):
        return ""
    ratios = [base / own for own, base in row.get("visits", [[1.0, row["ratio"]]])]
    return f"{min(ratios):.2f} .. {max(ratios):.2f} ({len(ratios)})"


def _tests(row: Row) -> list[str]:
    return [row["op"], str(row["passed"]), str(row["failed"]), str(row["skipped"]), row["note"]]


def _accuracy(row: Row) -> list[str]:
    errors = [_number(row["error"]), _number(row["own_error"]), _number(row["of_allowed"])]
    return [row["op"], row["dtype"], row["provider"], str(row["checks"]), str(row["failed"]), *errors, row["note"]]


def _calibration(row: Row) -> list[str]:
    return [row["op"], row["shape"], row["dtype"], row["mode"], *_us(row), *_rates(row)]


def _kernel(row: Row) -> list[str]:
    what = [row["op"], row["shape"], row["dtype"], row["mode"], row["provider"]]
    return [*what, *_us(row), _ratio(row["ratio"]), _visits(row), *_rates(row), row["note"]]


def _rates(row: Row) -> list[str]:
    numbers = [_number(row.get("gb_s") or None), _number(row.get("gflop_s") or None)]
    return [*numbers, _percent(row["of_copy"]), _percent(row["of_products"])]


def _model(row: Row) -> list[str]:
    what = [row["model"], str(row["batch"]), row["dtype"], row["provider"]]
    spread = f"{_number(row['p20_ms'])} .. {_number(row['p80_ms'])}"
    numbers = [
        _number(row["median_ms"]),
        spread,
        _number(row["images_per_s"]),
        _ratio(row["ratio"]),
        _visits(row),
        _number(row["peak_mib"]),
    ]
    return [*what, *numbers, row["note"]]


def _memory(row: Row) -> list[str]:
    what = [row["model"], str(row["batch"]), row["dtype"], row["provider"]]
    return [*what, _number(row["peak_mib"]), _number(row["kept_mib"]), _number(row["ready_s"])]


def _peer(row: Row) -> list[str]:
    what = [row["model"], str(row["img_size"]), str(row["batch"]), row["provider"]]
    return [
        *what,
        _number(row["images_per_s"]),
        _ratio(row["ratio"]),
        _visits(row),
        _number(row["top1"]),
        row["source"],
    ]


_MODEL = (
    [
        "model",
        "batch",
        "precision",
        "provider",
        "ms",
        "20th .. 80th percentile",
        "images/s",
        "over original",
        "of all visits",
        "peak MiB",
        "note",
    ],
    _model,
)
_RATES = ("GB/s", "GFLOP/s", "of copy", "of products")
#: By section: the header, and what makes a line of a row.
_LINES: dict[str, Any] = {
    "tests": (["tests", "passed", "failed", "skipped", "note"], _tests),
    "accuracy": (
        [
            "operation",
            "precision",
            "backend",
            "checks",
            "failed",
            "error",
            "PyTorch's own",
            "of what is allowed",
            "worst",
        ],
        _accuracy,
    ),
    "calibration": (
        ["operation", "shape", "dtype", "mode", "us", "20th .. 80th percentile", *_RATES],
        _calibration,
    ),
    "kernels": (
        [
            "operation",
            "shape",
            "dtype",
            "mode",
            "provider",
            "us",
            "20th .. 80th percentile",
            "over PyTorch",
            "of all visits",
            *_RATES,
            "note",
        ],
        _kernel,
    ),
    "inference": _MODEL,
    "training": _MODEL,
    "memory": (
        ["model", "batch", "precision", "provider", "peak MiB of a call", "MiB kept", "s to the first result"],
        _memory,
    ),
    "peers": (
        [
            "network",
            "pixels",
            "batch",
            "provider",
            "images/s",
            "over DeiT-S",
            "of all visits",
            "top-1",
            "accuracy from",
        ],
        _peer,
    ),
}
