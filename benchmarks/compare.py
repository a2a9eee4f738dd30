"""What changed between two result files: ``python -m benchmarks.compare OLD NEW [--fail-if-slower 0.1]``.

Ratios are compared, not times: each is of one run, in turns with its baseline, so that a machine that was slower that day does not count.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.store import key, load
from cmt_fast.testing.results import device_name


@dataclass(frozen=True)
class Change:
    """Of one row that both files have.

    Attributes:
        name: of the row.
        old, new: how many times as fast as the baseline of its own run.
    """

    name: str
    old: float
    new: float

    @property
    def change(self) -> float:
        """0.1: ten percent faster beside the baseline than before; -0.1: ten percent slower."""
        return self.new / self.old - 1


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    """Of every row with a ratio in both files, the worst first.

    Raises:
        ValueError: if the files are of different devices, or have no row in common.
    """
    devices = [device_name(data["machine"]) for data in (old, new)]
    if devices[0] != devices[1]:
        raise ValueError(f"the files are of two devices, {devices[0]} and {devices[1]}: their ratios do not compare")
    before = {key(row): row["ratio"] for row in old["rows"] if row.get("ratio")}
    found = [
        Change(_name(row), before[key(row)], row["ratio"])
        for row in new["rows"]
        if row.get("ratio") and key(row) in before
    ]
    if not found:
        raise ValueError("the files have no measured row in common")
    yield from sorted(found, key=lambda change: change.change)


def compare_files(old: Path, new: Path, fail_if_slower: float | None = None) -> int:
    """Print the changes; 1 if one is slower by more than the share ``fail_if_slower``."""
    found = [change for change in changes(load(old), load(new)) if change.old != 1.0 or change.new != 1.0]
    for change in found:
        print(f"{change.change:+7.1%}  {change.old:7.2f}x -> {change.new:7.2f}x  {change.name}")
    slower = [change for change in found if fail_if_slower is not None and change.change < -fail_if_slower]
    if slower:
        print(f"{len(slower)} of {len(found)} are slower by more than {fail_if_slower:.0%}")
    return int(bool(slower))


def add_comparison(parser: argparse.ArgumentParser) -> None:
    """The options of a command that compares, too."""
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="measure nothing: what changed between two files"
    )
    parser.add_argument(
        "--fail-if-slower",
        type=float,
        metavar="SHARE",
        help="with --compare: 0.1 fails where a ratio fell by more than a tenth",
    )


def _name(row: dict[str, Any]) -> str:
    return " ".join(str(part) for part in key(row) if part is not None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two files."""
    parser = argparse.ArgumentParser("python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--fail-if-slower", type=float, metavar="SHARE", help="0.1 fails where a ratio fell by more than a tenth"
    )
    options = parser.parse_args(arguments)
    return compare_files(options.old, options.new, options.fail_if_slower)


if __name__ == "__main__":
    sys.exit(main())
