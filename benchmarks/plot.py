"""Figures of result files alone: ``python -m benchmarks.plot results/<device>/<file>.json [FOLDER or IMAGE.png] [--figure roofline]``.

A folder gets every figure that the file has data for; an image one of them.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peaks import peaks
from benchmarks.registry import BASELINE
from benchmarks.store import load
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.providers import BASELINE as MODEL_BASELINE
from cmt_fast.testing.results import device_name

Data = dict[str, Any]
Row = dict[str, Any]


def plot(data: Data, path: Path, mode: str = "inference", dtype: str | None = None) -> None:
    """Write the bars of :func:`ratios`.

    Raises:
        ValueError: if there is nothing to draw.
        ImportError: without matplotlib.
    """
    _write(ratios(data, mode, dtype), path)


def ratios(data: Data, mode: str = "inference", dtype: str | None = None, of: str | None = None) -> Any:
    """The ratios of one mode and dtype (the file's first): a group of bars an operation and shape, or a model and batch; a line at 1.

    ``of``: ``model`` or ``op`` for rows of whole models or of operations alone.
    """
    rows = [row for row in data["rows"] if row["mode"] == mode and (of is None or of in row)]
    rows = [row for row in rows if row.get("section") not in ("peers", "calibration", "memory")]
    rows = [row for row in rows if row.get("ratio") is not None and row["provider"] != _baseline(row)]
    dtype = dtype or (rows[0]["dtype"] if rows else "any")
    rows = [row for row in rows if row["dtype"] == dtype]
    if not rows:
        raise ValueError(f"no ratios for mode {mode} and dtype {dtype} in this file")
    subjects = list(dict.fromkeys(map(_subject, rows)))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    height = 0.8 / len(providers)
    figure, axes = _figure(data, f"{mode}, {dtype}", 1.5 + len(subjects) * max(0.4, 0.12 * len(providers)))
    for i, provider in enumerate(providers):
        mine = [row for row in rows if row["provider"] == provider]
        places = [subjects.index(_subject(row)) + (i + 0.5) * height - 0.4 for row in mine]
        axes.barh(places, [row["ratio"] for row in mine], height, label=provider)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(subjects)), subjects, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as {_baseline(rows[0])}")
    axes.legend()
    return figure


def accuracy(data: Data) -> Any:
    """ImageNet accuracy as published against images a second as measured: CMT as it was, as it is, and what else there is."""
    rows = [row for row in _section(data, "peers") if row.get("top1") and row.get("images_per_s")]
    batch = _need(rows, "networks beside CMT")[0]["batch"]
    rows = [row for row in rows if row["batch"] == batch]
    figure, axes = _figure(data, f"batch {batch}, {rows[0]['dtype']}; accuracy as published", 5.5)
    best: dict[str, Row] = {}  # of each network the fastest way to run it
    for row in sorted(rows, key=lambda row: row["images_per_s"]):
        if row["model"] not in VARIANTS:
            best[row["model"]] = row
    labels = [(row["images_per_s"], row["top1"], name.split("_patch")[0], "dimgray") for name, row in best.items()]
    axes.scatter([x for x, *_ in labels], [y for _, y, *_ in labels], color="tab:gray", zorder=3)
    hollow = []
    for name, variant in VARIANTS.items():
        speeds = {row["provider"]: row["images_per_s"] for row in rows if row["model"] == name}
        now, before, top1 = speeds.get("optimize"), speeds.get("original"), variant.paper_top1
        if before:
            axes.scatter(before, top1, facecolors="none", edgecolors="tab:red", zorder=3)
            hollow.append((before, top1))
        if now:
            axes.scatter(now, top1, color="tab:red", zorder=3)
            labels.insert(0, (now, top1, name, "tab:red"))
        if now and before:
            arrow = dict(arrowstyle="->", color="tab:red", alpha=0.6)
            axes.annotate("", (now, top1), (before, top1), arrowprops=arrow)
    axes.set_xscale("log")
    axes.margins(x=0.1)
    _plain_ticks(axes, "x")
    axes.set_xlabel("images a second (CMT: from the original's order of operations, hollow, to optimize)")
    axes.set_ylabel("ImageNet top-1, percent")
    axes.grid(alpha=0.3)
    _place_labels(axes, labels, hollow)
    return figure


def _place_labels(
    axes: Any, labels: Sequence[tuple[float, float, str, str]], points: Sequence[tuple[float, float]]
) -> None:
    """A text beside each (x, y, text, colour), on the side where it covers neither another one nor a point, if there is such a side."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # places the axes
    taken = []
    for point in (*points, *((x, y) for x, y, *_ in labels)):
        x, y = axes.transData.transform(point)
        taken.append(Bbox.from_extents(x - 5, y - 5, x + 5, y + 5))
    sides = ((6, 0, "left", "center"), (-6, 0, "right", "center"), (0, 6, "center", "bottom"), (0, -6, "center", "top"))
    for x, y, text, color in labels:
        for right, up, horizontal, vertical in sides:
            style = dict(fontsize=8, color=color, ha=horizontal, va=vertical, textcoords="offset points")
            label = axes.annotate(text, (x, y), (right, up), **style)
            box = label.get_window_extent()
            if box.x1 < axes.bbox.x1 and not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        else:
            label = axes.annotate(text, (x, y), sides[0][:2], fontsize=8, color=color, textcoords="offset points")
        taken.append(label.get_window_extent())


def _plain_ticks(axes: Any, name: str) -> None:
    """1, 2, 5, 10 ... on a logarithmic axis, or every digit where these are few."""
    axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
    low, high = axis.get_view_interval()

    def inside(digits: Sequence[int]) -> list[float]:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        return [x for power in powers for digit in digits if low <= (x := digit * 10.0**power) <= high]

    ticks = inside((1, 2, 5))
    axis.set_ticks(ticks if len(ticks) > 2 else inside(range(1, 10)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def roofline(data: Data) -> Any:
    """Each step's operations a second over its operations a byte, under what this machine copies and multiplies at best."""
    rows = [row for row in _section(data, "kernels") if row.get("flops") and row.get("median_us")]
    rows = [row for row in rows if row["mode"] == "inference"]
    _need(rows, "steps with their bytes and operations")
    figure, axes = _figure(data, rows[0]["dtype"], 5.5)
    fastest = {}
    for row in rows:
        fastest.setdefault(row["provider"], []).append(row)
    for provider, mine in fastest.items():
        x = [row["flops"] / row["bytes"] for row in mine]
        axes.scatter(x, [row["flops"] / row["median_us"] * 1e-3 for row in mine], s=18, label=provider, zorder=3)
    best = peaks(data)
    if best.gflop_s and best.memory_gb_s and best.copy_gb_s:
        low, high = (f(row["flops"] / row["bytes"] for row in rows) for f in (min, max))
        grid = [low * (high / low) ** (i / 50) for i in range(51)]
        # Steps that stay in a cache are under the copy that does, too.
        for name, rate, style in (("memory", best.memory_gb_s, "-"), ("cache", best.copy_gb_s, ":")):
            axes.plot(
                grid,
                [min(rate * x, best.gflop_s) for x in grid],
                style,
                color="black",
                label=f"{name}: {rate:.0f} GB/s, {best.gflop_s:.0f} GFLOP/s",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_ticks(axes, "x")
    _plain_ticks(axes, "y")
    axes.set_xlabel("operations a byte that must move")
    axes.set_ylabel("GFLOP/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    return figure


def memory(data: Data) -> Any:
    """Peak memory of a call, by provider and batch."""
    rows = [row for row in (*_section(data, "memory"), *_section(data, "inference")) if row.get("peak_mib") is not None]
    _need(rows, "memory")
    labels = [f"{row['model']} batch {row['batch']}\n{row['provider']}" for row in rows]
    figure, axes = _figure(data, f"{rows[0]['dtype']}, inference", 1.2 + 0.45 * len(rows))
    axes.barh(range(len(rows)), [row["peak_mib"] for row in rows], color="tab:blue")
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("MiB beyond what is held between calls")
    return figure


def latency(data: Data) -> Any:
    """Milliseconds an image over the batch, by provider, of the variant that has most batches."""
    rows = [row for row in _section(data, "inference") if row.get("median_ms")]
    _need(rows, "whole models")
    name, dtype = max(
        ((row["model"], row["dtype"]) for row in rows),
        key=lambda key: len({r["batch"] for r in rows if (r["model"], r["dtype"]) == key}),
    )
    rows = [row for row in rows if (row["model"], row["dtype"]) == (name, dtype)]
    figure, axes = _figure(data, f"{name}, {dtype}, inference", 4.5)
    for provider in dict.fromkeys(row["provider"] for row in rows):
        points = sorted((row["batch"], row["median_ms"] / row["batch"]) for row in rows if row["provider"] == provider)
        axes.plot(*zip(*points), marker="o", label=provider)
    axes.set_xscale("log")
    axes.set_xticks(sorted({row["batch"] for row in rows}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_yscale("log")
    _plain_ticks(axes, "y")
    axes.set_xlabel("batch")
    axes.set_ylabel("milliseconds an image")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    return figure


def convergence(data: Data) -> Any:
    """Loss over the epochs by setting: each run's training loss thin, the means over the seeds thick, of held-out images dashed."""
    rows = _need(_section(data, "convergence"), "training runs", "convergence")
    figure, axes = _figure(data, f"{rows[0]['model']}, batch {rows[0]['batch']}", 5.5)
    for i, setting in enumerate(dict.fromkeys(row["provider"] for row in rows)):
        runs = [row["curves"] for row in rows if row["provider"] == setting]
        epochs, color = range(1, len(runs[0]["train_loss"]) + 1), f"C{i}"
        for run in runs:
            axes.plot(epochs, run["train_loss"], color=color, linewidth=0.5, alpha=0.5)
        for name, style in (("train_loss", "-"), ("val_loss", "--")):
            means = [statistics.mean(values) for values in zip(*(run[name] for run in runs))]
            axes.plot(epochs, means, style, color=color, label=f"{setting}, {name}, mean of {len(runs)} seeds")
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    return figure


FIGURES: dict[str, Callable[[Data], Any]] = {
    "accuracy": accuracy,
    "models": partial(ratios, of="model"),
    "models-training": partial(ratios, mode="training", of="model"),
    "operations": partial(ratios, of="op"),
    "operations-training": partial(ratios, mode="training", of="op"),
    "roofline": roofline,
    "memory": memory,
    "latency": latency,
    "convergence": convergence,
}


def write_figures(data: Data, folder: Path, names: Iterable[str] = FIGURES) -> dict[str, Path]:
    """Every figure of these that there is data for, as PNG files in ``folder``, by name.

    Raises:
        ImportError: without matplotlib.
    """
    _matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in names:
        try:
            figure = FIGURES[name](data)
        except ValueError:
            continue  # nothing to draw
        written[name] = folder / f"{name}.png"
        _write(figure, written[name])
    return written


def _section(data: Data, name: str) -> list[Row]:
    return [row for row in data["rows"] if row.get("section") == name]


def _need(rows: list[Row], what: str, command: str = "report") -> list[Row]:
    if not rows:
        raise ValueError(f"no rows of {what} in this file: make one with python -m benchmarks.{command}")
    return rows


def _matplotlib() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'cmt-fast[train]'") from error
    return Figure


def _figure(data: Data, title: str, height: float) -> tuple[Any, Any]:
    figure = _matplotlib()(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"{title}: {device_name(data['machine'])}, torch {data['machine']['torch']}", fontsize=9)
    return figure, axes


def _write(figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    try:
        figure.savefig(temporary, dpi=150)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _baseline(row: Row) -> str:
    return BASELINE if "op" in row else MODEL_BASELINE


def _subject(row: Row) -> str:
    """What is compared, in words."""
    if "op" in row:
        return f"{row['op']}\n{row['shape']}"
    return f"{row['model']} at {row['img_size']}\nbatch {row['batch']}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw one file."""
    parser = argparse.ArgumentParser("python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("target", type=Path, help="a folder for every figure; or a PNG, PDF or SVG file for one")
    parser.add_argument("--figure", choices=FIGURES, help="for a file; by default every ratio of --mode and --dtype")
    parser.add_argument("--mode", default="inference")
    parser.add_argument("--dtype", help="by default the first of the file")
    options = parser.parse_args(arguments)
    data = load(options.results)
    if not options.target.suffix:
        for path in write_figures(data, options.target).values():
            print(path)
    elif options.figure:
        _write(FIGURES[options.figure](data), options.target)
    else:
        plot(data, options.target, options.mode, options.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
