"""Markdown tables of a result file of whole models: ``python -m benchmarks.table FILE [--write README.md]``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.store import load
from cmt_fast.testing.providers import BASELINE, PROVIDERS
from cmt_fast.testing.results import device_name

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"

Row = dict[str, Any]
#: What a table says of a row, beside the baseline's row; None for nothing.
Cell = Callable[[Row, Row], str | None]


def tables(data: dict[str, Any], path: str) -> str:
    """The measured block of the README, of one file alone: every row of it, those that lose too.

    Args:
        data: what :func:`benchmarks.store.load` read.
        path: of the file, to be named.

    Raises:
        ValueError: if the file holds no whole models.
    """
    rows = _models(data)
    if not rows:
        raise ValueError(f"{path} holds no rows of whole models: make one with python -m benchmarks.models")
    facts = data["machine"]
    place = f"{device_name(facts)}, {facts['cores']} cores, {facts['threads']} threads"
    if simd := facts.get("simd"):
        place += f", {simd}"
    blocks = [
        f"Machine: {place}; torch {facts['torch']}, cmt_fast {facts['cmt_fast']} at {facts['commit']}. All providers of a row take "
        f"turns in one run; the spread is in the file. File: `{path}`; make your own with `python -m benchmarks.models` "
        "([docs/benchmarks.md](docs/benchmarks.md) says what each provider is).",
    ]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        mine = [row for row in rows if row["mode"] == mode]
        title = f"Milliseconds a batch, median, in {mode}, and how many times as fast as `{BASELINE}`:"
        for text, cell in ((title, _time), (_READY, _ready), (_PEAK, _peak), (_KEPT, _kept)):
            if table := _matrix(mine, cell):
                blocks += [text, table]
        notes = [
            f"{' '.join(map(str, _setting(row)))} `{row['provider']}`: {row['note']}" for row in mine if row["note"]
        ]
        if notes:
            blocks.append("No time: " + "; ".join(notes) + ".")
    return "\n\n".join(blocks) + "\n"


def _models(data: dict[str, Any]) -> list[Row]:
    """The rows of whole models; of a report with the memory that its own section measured."""
    rows = [row for row in data["rows"] if "model" in row and row.get("section") in (None, "inference", "training")]
    memory = {_whole(row): row for row in data["rows"] if row.get("section") == "memory"}
    fields = ("peak_mib", "kept_mib", "ready_s")
    return [row | {name: memory.get(_whole(row), row).get(name) for name in fields} for row in rows]


def _whole(row: Row) -> tuple[Any, ...]:
    return (*_setting(row), row["mode"], row["provider"])


_READY = "Seconds from a loaded model to the first result (packing, compiling or exporting, and one call):"
_PEAK = f"Peak memory of a call, in MiB, and its ratio to that of `{BASELINE}`:"
_KEPT = "Memory held between calls beyond the loaded model, in MiB:"


def _time(row: Row, base: Row) -> str | None:
    if row["median_ms"] is None:
        return None
    ratio = f" ({row['ratio']:.2f}x)" if row["ratio"] is not None and row is not base else ""
    return f"{row['median_ms']:.{0 if row['median_ms'] >= 100 else 1}f}{ratio}"


def _ready(row: Row, base: Row) -> str | None:
    return _number(row, "ready_s", ".1f")


def _peak(row: Row, base: Row) -> str | None:
    number = _number(row, "peak_mib", ".0f")
    if number is None or row is base or not base.get("peak_mib"):
        return number
    return f"{number} ({row['peak_mib'] / base['peak_mib']:.2f}x)"


def _kept(row: Row, base: Row) -> str | None:
    return _number(row, "kept_mib", ".0f")


def _number(row: Row, name: str, form: str) -> str | None:
    return None if row.get(name) is None else format(row[name], form)


def _setting(row: Row) -> tuple[Any, ...]:
    return row["model"], row["img_size"], row["batch"], row["dtype"]


def _matrix(rows: Sequence[Row], cell: Cell) -> str | None:
    """A line a setting, a column a provider; None if there is nothing in it."""
    settings: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        settings.setdefault(_setting(row), {})[row["provider"]] = row
    cells = {
        setting: {name: cell(row, mine.get(BASELINE, {})) for name, row in mine.items()}
        for setting, mine in settings.items()
    }
    names = [name for name in PROVIDERS if any(mine.get(name) for mine in cells.values())]
    if not names:
        return None
    lines = ["| model | pixels | batch | precision | " + " | ".join(names) + " |", "|---" * (4 + len(names)) + "|"]
    for setting, mine in cells.items():
        lines.append("| " + " | ".join([*map(str, setting), *(mine.get(name) or "-" for name in names)]) + " |")
    return "\n".join(lines)


def write_block(path: Path, text: str) -> None:
    """Put ``text`` between the markers of a Markdown file.

    Raises:
        ValueError: if the file has no such markers.
    """
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no lines {BEGIN} and {END} to write between")
    path.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser("python -m benchmarks.table", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help=f"put the tables between {BEGIN} and {END} of this file"
    )
    options = parser.parse_args(arguments)
    text = tables(load(options.results), os.path.relpath(options.results, Path(__file__).parents[1]))
    if options.write:
        write_block(options.write, text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
