"""Markdown tables and figures of a result file alone: ``python -m benchmarks.table FILE [--write README.md] [--model cmt_s]``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plot import write_figures
from benchmarks.store import load
from cmt_fast.testing.providers import BASELINE, PROVIDERS
from cmt_fast.testing.results import device_name

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
ROOT = Path(__file__).parents[1]
#: Where the figures of a page are, beside it, and which of :data:`benchmarks.plot.FIGURES` it shows.
IMAGES, SHOWN = "docs/figures", {"accuracy": "Published accuracy against measured images a second"}

Row = dict[str, Any]
#: Of whole models: (model, pixels, batch, precision).
Setting = tuple[str, int, int, str]


def tables(data: dict[str, Any], path: str, models: Sequence[str] = (), figures: Sequence[str] = ()) -> str:
    """The measured block of the README, of one file alone: every row of whole models and other networks, those that lose too.

    Args:
        data: what :func:`benchmarks.store.load` read.
        path: of the file, to be named.
        models: variants of the tables of whole models; all of the file by default.
        figures: names of the figures in :data:`IMAGES` to show.

    Raises:
        ValueError: if the file holds no whole models.
    """
    rows = [row for row in _models(data) if not models or row["model"] in models]
    if not rows:
        raise ValueError(f"{path} holds no rows of whole models: make one with python -m benchmarks.report")
    facts = data["machine"]
    place = f"{device_name(facts)}, {facts['cores']} cores, {facts['threads']} threads"
    if simd := facts.get("simd"):
        place += f", {simd}"
    blocks = [
        f"Machine: {place}; torch {facts['torch']}, cmt_fast {facts['cmt_fast']} at {facts['commit']}. File: `{path}`, with the spread, "
        "the samples and the rest; make your own with `make report` ([docs/benchmarks.md](docs/benchmarks.md) says what each provider is).",
    ]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        mine = [row for row in rows if row["mode"] == mode]
        text = (
            f"Milliseconds a batch in {mode}, median, and how many times as fast as `{BASELINE}` in turns with it"
            f"{_common(mine)}:"
        )
        for title, cell in ((text, _time), *_MEMORY):
            if table := _matrix(mine, cell):
                blocks += [title, table]
        notes = [f"{_column(mine, _setting(row))}, `{row['provider']}`: {row['note']}" for row in mine if row["note"]]
        if notes:
            blocks.append("No time: " + "; ".join(notes) + ".")
    blocks += _peers(data)
    blocks += [f"![{SHOWN[name]}]({IMAGES}/{name}.png)" for name in figures]
    return "\n\n".join(blocks) + "\n"


def _models(data: dict[str, Any]) -> list[Row]:
    """The rows of whole models; of a report with the memory that its own section measured."""
    rows = [row for row in data["rows"] if "model" in row and row.get("section") in (None, "inference", "training")]
    memory = {_whole(row): row for row in data["rows"] if row.get("section") == "memory"}
    fields = ("peak_mib", "kept_mib", "ready_s")
    return [row | {name: memory.get(_whole(row), row).get(name) for name in fields} for row in rows]


def _setting(row: Row) -> Setting:
    return row["model"], row["img_size"], row["batch"], row["dtype"]


def _whole(row: Row) -> tuple[Any, ...]:
    return (*_setting(row), row["mode"], row["provider"])


def _time(row: Row, base: Row) -> str | None:
    if row["median_ms"] is None:
        return None
    # Each provider has its own turns with the baseline: the ratio is of these.
    ratio = f" ({row['ratio']:.2f}x)" if row["ratio"] is not None and row["provider"] != BASELINE else ""
    return f"{row['median_ms']:.{0 if row['median_ms'] >= 100 else 1}f}{ratio}"


def _ready(row: Row, base: Row) -> str | None:
    return _number(row, "ready_s", ".1f")


def _peak(row: Row, base: Row) -> str | None:
    number = _number(row, "peak_mib", ".0f")
    if number is None or row["provider"] == BASELINE or not base.get("peak_mib"):
        return number
    return f"{number} ({row['peak_mib'] / base['peak_mib']:.2f}x)"


def _kept(row: Row, base: Row) -> str | None:
    return _number(row, "kept_mib", ".0f")


def _number(row: Row, name: str, form: str) -> str | None:
    return None if row.get(name) is None else format(row[name], form)


#: What a cell says of a row, beside the baseline's row; None for nothing.
Cell = Callable[[Row, Row], str | None]
_MEMORY: tuple[tuple[str, Cell], ...] = (
    ("Seconds from a loaded model to the first result (packing, compiling or exporting, and one call):", _ready),
    (f"Peak memory of a call, in MiB, and its ratio to that of `{BASELINE}`:", _peak),
    ("Memory held between calls beyond the loaded model, in MiB:", _kept),
)


def _matrix(rows: Sequence[Row], cell: Cell) -> str | None:
    """A line a provider, a column a setting; None if there is nothing in it."""
    settings: dict[Setting, dict[str, Row]] = {}
    for row in rows:
        settings.setdefault(_setting(row), {})[row["provider"]] = row
    cells = {
        setting: {name: cell(row, mine.get(BASELINE, {})) for name, row in mine.items()}
        for setting, mine in settings.items()
    }
    names = [name for name in PROVIDERS if any(mine.get(name) for mine in cells.values())]
    columns = [setting for setting, mine in cells.items() if any(mine.values())]
    if not names:
        return None
    lines = [[f"`{name}`", *(cells[setting].get(name) or "-" for setting in columns)] for name in names]
    return _markdown(["provider", *(_column(rows, setting) for setting in columns)], lines)


def _common(rows: Sequence[Row]) -> str:
    """The precision, if it is one for all."""
    dtypes = {row["dtype"] for row in rows}
    return f", {dtypes.pop()}" if len(dtypes) == 1 else ""


def _column(rows: Sequence[Row], setting: Setting) -> str:
    """Of a setting what tells it from the others."""
    model, pixels, batch, dtype = setting
    return f"{model} at {pixels}, batch {batch}" + ("" if _common(rows) else f", {dtype}")


def _peers(data: dict[str, Any]) -> list[str]:
    """Other networks, the fastest first."""
    rows = [row for row in data["rows"] if row.get("section") == "peers"]
    blocks = []
    for batch, dtype in dict.fromkeys((row["batch"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["batch"], row["dtype"]) == (batch, dtype)]
        mine.sort(key=lambda row: -row["images_per_s"])
        lines = [
            [
                f"`{row['model']}`",
                row["provider"],
                str(row["img_size"]),
                "-" if row["top1"] is None else f"{row['top1']:.1f}",
                f"{row['images_per_s']:.{0 if row['images_per_s'] >= 100 else 1}f}",
                f"{row['ratio']:.2f}x",
            ]
            for row in mine
        ]
        blocks += [
            f"Beside other networks of timm in inference, batch {batch}, {dtype}; accuracy as published; the ratio is to DeiT-S in turns with it:",
            _markdown(["network", "how", "pixels", "top-1", "images/s", "over DeiT-S"], lines),
        ]
    return blocks


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


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


def write_page(path: Path, results: Path, models: Sequence[str] = ()) -> None:
    """Put the tables of a result file, and the figures that it has data for, into a Markdown file and the folder of its figures."""
    data = load(results)
    shown = write_figures(data, path.parent / IMAGES, SHOWN)
    write_block(path, tables(data, os.path.relpath(results, ROOT), models, list(shown)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser("python -m benchmarks.table", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--model", nargs="+", default=(), help="variants of the tables of whole models; all by default")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help=f"put the tables between {BEGIN} and {END} of this file, and the figures beside it into {IMAGES}",
    )
    options = parser.parse_args(arguments)
    if options.write:
        write_page(options.write, options.results, options.model)
    else:
        print(tables(load(options.results), os.path.relpath(options.results, ROOT), options.model), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
