"""``cmt-fast bench``: how fast is it on this machine?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from cmt_fast.cli.console import console
from cmt_fast.cli.progress import bar
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.benchmark import DTYPES, MODES, PROVIDERS, Row
from cmt_fast.testing.results import check_folder, device_name, machine, write_json
from cmt_fast.training.config import find_device


def bench(
    model: Annotated[list[str], typer.Option(help=f"One of {', '.join(VARIANTS)}; may be repeated.")] = ["cmt_s"],  # noqa: B006
    provider: Annotated[
        list[str] | None,
        typer.Option(
            help=f"What to time, one of {', '.join(PROVIDERS)}; may be repeated. Those that compile take minutes to start. "
            "\\[default: original, reference, auto where a faster backend can run, and for inference optimize]"
        ),
    ] = None,
    batch: Annotated[list[int], typer.Option(help="Images a call; may be repeated.")] = [1],  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help=f"One of {', '.join(DTYPES)}; may be repeated.")] = ["float32"],  # noqa: B006
    mode: Annotated[str, typer.Option(help=f"One of {', '.join(MODES)}.")] = "inference",
    img_size: Annotated[
        int | None, typer.Option(help="Side of the images in pixels. \\[default: each model's published one]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Time to spend on each measurement.")] = 2.0,
    threads: Annotated[int | None, typer.Option(help="Threads of a CPU run. \\[default: PyTorch's choice]")] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write every row and the machine to this file.", show_default=False),
    ] = None,
) -> None:
    """Time models against the original's operation order in plain PyTorch.

    All providers run in turns on the same weights and images, so that a busy machine slows them alike. Each is first
    compared with float64; one that is wrong gets no time.

    Exit code: 0, 1 if a provider was wrong or could not run, 2 for a bad option.
    """
    from cmt_fast.testing.benchmark import bench as run_benchmark

    where = find_device(device)
    if json:
        check_folder(json)
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    facts = machine(where)
    rows: list[Row] = []

    def show(new: list[Row]) -> None:
        rows.extend(new)
        console.print(_table(new))
        for row in new:
            if row.note:
                console.print(f"[bold red]{row.provider}[/] has no time: {escape(row.note)}", highlight=False)
        if json:
            write_json(json, {"machine": facts, "rows": [asdict(row) for row in rows]})

    console.print(_header(facts), highlight=False)
    with bar(console) as progress:
        run_benchmark(model, provider, batch, dtype, where, mode, img_size, seconds, progress, on_rows=show)
    console.print("ratio: time of original / time, above 1 is faster; 20 % of calls take at most p20, 80 % p80")
    if json:
        console.print(f"Wrote {len(rows)} rows to {escape(str(json))}")
    if any(row.note for row in rows):
        raise typer.Exit(1)


def _header(facts: dict[str, Any]) -> str:
    threads = f", threads: {facts['threads']}" if facts["device"] == "cpu" else ""
    triton = f", triton {facts['triton']}" if facts["device"] == "cuda" else ""
    return (
        f"[bold]{escape(device_name(facts))}[/]{threads}, torch {facts['torch']}{triton}, cmt_fast {facts['cmt_fast']}"
    )


def _table(rows: list[Row]) -> Table:
    """The providers of one model, dtype and batch."""
    first = rows[0]
    setting = f"{first.model}, {first.img_size} pixels, batch {first.batch}, {first.dtype}, {first.mode}"
    table = Table(title=setting, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD)
    with_memory = any(row.peak_mib is not None for row in rows)
    table.add_column("provider", no_wrap=True)
    for name in ("ms a batch", "p20 .. p80", "images/s", "ratio", *(["peak MiB"] if with_memory else [])):
        table.add_column(name, justify="right", no_wrap=True)
    best = min((row.median_ms for row in rows if row.median_ms is not None), default=None)
    for row in rows:
        if row.median_ms is None:
            table.add_row(row.provider, "[red]none[/]")
            continue
        table.add_row(
            row.provider,
            f"{row.median_ms:.2f}",
            f"{row.p20_ms:.2f} .. {row.p80_ms:.2f}",
            f"{row.images_per_s:.1f}",
            "-" if row.ratio is None else f"{row.ratio:.2f}",
            *([] if row.peak_mib is None else [f"{row.peak_mib:.0f}"]),
            style="bold" if row.median_ms == best else "",
        )
    return table
