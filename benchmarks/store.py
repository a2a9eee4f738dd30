"""Result files: benchmarks/results/<device>/<date>-<commit>.json, each with its machine and every row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from cmt_fast.testing.results import device_name, machine, write_json
from cmt_fast.testing.timing import Timing

RESULTS = Path(__file__).parent / "results"


class ResultFile:
    """A file that is complete after every :meth:`add`: a run that is cut off keeps what it measured.

    Args:
        device: what is measured.
        root: folder of all results.
        what: kind of rows, part of the name; a second run of a kind on one day, commit and number of
            threads adds to the first's file.
    """

    def __init__(self, device: torch.device | str, root: Path = RESULTS, what: str = "ops") -> None:
        facts = machine(device)
        commit = (facts["commit"] or "no-commit").replace("+", "-changed")
        threads = "" if "gpu" in facts else f"-{facts['threads']}threads"
        self.path = root / slug(device_name(facts)) / f"{facts['date'][:10]}-{commit}-{what}{threads}.json"
        self.data: dict[str, Any] = {"machine": facts, "rows": []}
        if self.path.exists():
            self.data = load(self.path) | {"machine": facts}

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row, in place of an older one with the same key, and write the file."""
        self.add_all([row])

    def add_all(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """:meth:`add` for rows that belong together: all of them are in the file, or none."""
        new = {key(row): dict(row) for row in rows}
        self.data["rows"] = [*(old for old in self.data["rows"] if key(old) not in new), *new.values()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.data)


def timing_columns(t: Timing | None, base: Timing | None = None) -> dict[str, Any]:
    """Of a row what was measured, in microseconds: None where nothing was. ``base``: what ``ratio`` is over."""
    return dict(
        median_us=t and t.median * 1e6,
        p20_us=t and t.p20 * 1e6,
        p80_us=t and t.p80 * 1e6,
        samples_us=t and [float(f"{sample * 1e6:.5g}") for sample in t.samples],
        ratio=base.median / t.median if base and t else None,
    )


def rate_columns(t: Timing | None, size: int, flops: int) -> dict[str, Any]:
    """Of a row the bytes that must move and the operations, and both a second."""
    return dict(
        bytes=size,
        flops=flops,
        gb_s=t and size / t.median * 1e-9,
        gflop_s=t and flops / t.median * 1e-9,
    )


#: What identifies a row; the rest of it is what was measured.
KEY = ("section", "op", "shape", "model", "img_size", "batch", "provider", "dtype", "mode", "seed")


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def quieter(earlier: Mapping[str, Any] | None, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a row's visits the one in which it was fastest; ``ratio`` is of its lowest median and its baseline's.

    Whatever disturbs only adds time (Chen and Revels, Robust benchmarking in noisy environments, 2016, section IV).
    ``visits`` of the result has the medians of all: [[own, baseline's], ...].
    """
    if earlier is None or row.get("ratio") is None or earlier.get("ratio") is None:
        return row
    visits = [*earlier.get("visits", [_medians(earlier)]), _medians(row)]
    own, base = (min(medians) for medians in zip(*visits))
    return {**min(row, earlier, key=_median), "ratio": base / own, "visits": visits}


def _medians(row: Mapping[str, Any]) -> list[float]:
    return [float(f"{median:.5g}") for median in (_median(row), row["ratio"] * _median(row))]


def _median(row: Mapping[str, Any]) -> float:
    return row["median_us"] if "median_us" in row else row["median_ms"]


def slug(name: str) -> str:
    """A device's name as a folder's: ``NVIDIA H100 80GB HBM3`` becomes ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def load(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        ValueError: if it is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a result file: {error}") from error
    if not isinstance(data, dict) or not {"machine", "rows"} <= data.keys():
        raise ValueError(f"{path} is not a result file: expected the keys machine and rows")
    return data
