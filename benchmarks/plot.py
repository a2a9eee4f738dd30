"""Bar charts of result files: ``python -m benchmarks.plot results/<device>/<file>.json ratios.png``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.registry import BASELINE
from benchmarks.store import load
from cmt_fast.testing.providers import BASELINE as MODEL_BASELINE
from cmt_fast.testing.results import device_name


def plot(data: dict[str, Any], path: Path, mode: str = "inference", dtype: str = "float32") -> None:
    """Draw the ratios of one mode and dtype: a group of bars an operation and shape, or a model and batch; a line at 1.

    Raises:
        ValueError: if there is nothing to draw.
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'cmt-fast[train]'") from error
    rows = [row for row in data["rows"] if (row["mode"], row["dtype"]) == (mode, dtype)]
    rows = [row for row in rows if row["ratio"] is not None and row["provider"] != _baseline(row)]
    if not rows:
        raise ValueError(f"no ratios for mode {mode} and dtype {dtype} in this file")
    subjects = list(dict.fromkeys(map(_subject, rows)))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    height = 0.8 / len(providers)
    figure = Figure(figsize=(9, 1.5 + len(subjects) * max(0.4, 0.12 * len(providers))), layout="constrained")
    axes = figure.subplots()
    for i, provider in enumerate(providers):
        mine = [row for row in rows if row["provider"] == provider]
        places = [subjects.index(_subject(row)) + (i + 0.5) * height - 0.4 for row in mine]
        axes.barh(places, [row["ratio"] for row in mine], height, label=provider)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(subjects)), subjects, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as {_baseline(rows[0])}")
    axes.set_title(f"{mode}, {dtype}: {device_name(data['machine'])}, torch {data['machine']['torch']}", fontsize=9)
    axes.legend()
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    try:
        figure.savefig(temporary, dpi=150)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _baseline(row: dict[str, Any]) -> str:
    return BASELINE if "op" in row else MODEL_BASELINE


def _subject(row: dict[str, Any]) -> str:
    """What is compared, in words."""
    if "op" in row:
        return f"{row['op']}\n{row['shape']}"
    return f"{row['model']} at {row['img_size']}\nbatch {row['batch']}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw one file."""
    parser = argparse.ArgumentParser("python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("image", type=Path, help="PNG, PDF or SVG")
    parser.add_argument("--mode", default="inference")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args(arguments)
    plot(load(options.results), options.image, options.mode, options.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
