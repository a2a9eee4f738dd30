"""``cmt-fast tune``: which tiles are fastest on this GPU?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from cmt_fast.backend import interpreting
from cmt_fast.cli.console import console
from cmt_fast.cli.program import command_line
from cmt_fast.cli.progress import bar
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops._triton.device import DeviceLimits, device_limits
from cmt_fast.ops._triton.tuned_tables import Table, empty_table, file_name, find_tables, read_table, user_folder
from cmt_fast.testing.packed_steps import STEPS
from cmt_fast.testing.precision import one_of, precision
from cmt_fast.testing.results import check_folder, machine, write_json
from cmt_fast.testing.shapes import stage_shapes
from cmt_fast.training.config import find_device
from cmt_fast.tuning.search import Row
from cmt_fast.tuning.search import tune as search

DTYPES = ("bfloat16", "float16", "float32")
#: Of ``--quick``: candidates a launch, and seconds on each.
QUICK = (4, 0.05)


def tune(
    model: Annotated[list[str], typer.Option(help=f"One of {', '.join(VARIANTS)}; may be repeated.")] = ["cmt_s"],  # noqa: B006
    batch: Annotated[
        list[int], typer.Option(help="Images a call; may be repeated. Other batches follow the rules.")
    ] = [1, 256],  # noqa: B006
    dtype: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(DTYPES)}; may be repeated. \\[default: bfloat16]", show_default=False),
    ] = None,
    img_size: Annotated[
        int | None, typer.Option(help="Side of the images in pixels. \\[default: each model's published one]")
    ] = None,
    step: Annotated[
        list[str] | None,
        typer.Option(help=f"Step of a packed model, one of {', '.join(STEPS)}; may be repeated. \\[default: all]"),
    ] = None,
    device: Annotated[
        str,
        typer.Option(help="cuda, cuda:N, auto: a GPU if there is one; or cpu for a dry run in Triton's interpreter."),
    ] = "auto",
    seconds: Annotated[float, typer.Option(help="Time to spend on each candidate; compiling it comes on top.")] = 0.2,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{QUICK[0]} candidates a launch, {QUICK[1]} seconds each: to try it out.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure also what the table has already.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The table to write and go on with. \\[default: the user's, see above]",
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write every row and the machine to this file.", show_default=False),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Measure nothing: say which tables there are for this GPU, and whether they are used."
        ),
    ] = False,
) -> None:
    """Measure the tiles of every kernel on this GPU, and keep the best in a table that later calls use.

    A kernel's tiles, warps and stages come from a rule. This command times others beside it, at the shapes that a packed
    model has, and writes what is faster by more than the spread of the times. Only results that are right are timed.
    The table is a file in CMT_FAST_TUNING, or else ~/.cache/cmt_fast/tuning; it is used by every call on this GPU model
    until its kernels or Triton change. Stop it when you like: what is measured is kept, and the same command goes on.

    Exit code: 0, 1 if a step had wrong results or could not run (with --check: if a table cannot be used), 2 for a bad option,
    130 if interrupted.
    """
    where = find_device(device)
    limits = device_limits(where)
    if check:
        raise typer.Exit(_check(where, limits))
    if json:
        check_folder(json)
    dry = where.type != "cuda"
    if dry:
        _require_interpreter(where, output)
    steps = [one_of("step", name, STEPS) for name in step or STEPS]
    dtypes = [_dtype(name, dry) for name in dtype or ["float16" if dry else "bfloat16"]]
    if min(batch) < 1 or seconds <= 0:
        raise ValueError(f"batch and seconds must be positive, got {', '.join(map(str, batch))} and {seconds}")
    shapes = [s for name in model for b in batch for s in stage_shapes(one_of("model", name, VARIANTS), b, img_size)]
    table = empty_table(Path(), limits) if dry else _open(output or _user_file(limits), limits)
    facts = table.data["machine"] = machine(where)
    console.print(_header(where, limits, table, dry), highlight=False)
    rows: list[Row] = []
    most, seconds = (QUICK[0], min(QUICK[1], seconds)) if quick else (None, seconds)
    interrupted = False
    try:
        with bar(console) as progress:
            search(
                steps,
                shapes,
                dtypes,
                where,
                table,
                write=not dry,
                seconds=seconds,
                most=most,
                again=again,
                progress=progress,
                on_row=rows.append,
            )
    except KeyboardInterrupt:
        interrupted = True
    if rows:
        console.print(_table(rows))
    for row in rows:
        if row.note:
            console.print(f"[bold red]{row.step}[/] {row.shape} {row.dtype}: {escape(row.note)}", highlight=False)
    console.print(_summary(rows, table, dry, interrupted), highlight=False)
    if json:
        write_json(json, {"machine": facts, "rows": [{**asdict(row), "ratio": row.ratio} for row in rows]})
        console.print(f"Wrote {len(rows)} rows to {escape(str(json))}")
    if interrupted:
        raise typer.Exit(130)
    if any(row.note for row in rows):
        raise typer.Exit(1)


def _require_interpreter(where: torch.device, output: Path | None) -> None:
    if not interpreting():
        dry_run = f"TRITON_INTERPRET=1 {command_line('tune', '--device', 'cpu', '--quick', '--batch', 1, '--img-size', 32, '--step', 'lpu')}"
        raise ValueError(
            f"tuning measures a GPU, and this is {where}. A dry run goes through all of it in Triton's interpreter and writes nothing: {dry_run}"
        )
    if output is not None:
        raise ValueError(f"a dry run on a CPU writes no table: leave out --output {output}")


def _dtype(name: str, dry: bool) -> torch.dtype:
    one_of("dtype", name, DTYPES)
    if dry and name == "bfloat16":
        raise ValueError(
            "Triton's interpreter does not compute in bfloat16: use --dtype float16 or float32 for a dry run"
        )
    return precision(name).dtype


def _user_file(limits: DeviceLimits) -> Path:
    folder = user_folder()
    if folder is None:
        raise ValueError("CMT_FAST_TUNING is off, so no table would be used: unset it, or name a file with --output")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / file_name(limits.name)


def _open(path: Path, limits: DeviceLimits) -> Table:
    """The table to go on with, or an empty one in the place of one that does not hold any more."""
    check_folder(path)
    if not path.exists():
        return empty_table(path, limits)
    table = read_table(path, limits)
    if table.problem is None:
        return table
    if table.data.get("device", limits.name) != limits.name:
        raise ValueError(f"{path} {table.problem}: choose another file")
    console.print(f"[yellow]Starting afresh:[/] {escape(str(path))} {escape(table.problem)}", highlight=False)
    return empty_table(path, limits)


def _header(where: torch.device, limits: DeviceLimits, table: Table, dry: bool) -> str:
    if dry:
        return f"[bold yellow]Dry run[/] on {where} in Triton's interpreter: the times mean nothing and nothing is written."
    known = table.launches()
    return f"[bold]{escape(limits.name)}[/] -> {escape(str(table.path))}" + (
        f", {known} launches known" if known else ""
    )


def _table(rows: list[Row]) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD)
    for column in ("kernel", "shape", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("rule us", "best us", "ratio", "tried"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("tile")
    for row in rows:
        if row.rule is None or row.best is None:
            continue
        kernel = row.kernel.partition(":")[2].removesuffix("_kernel")
        tried = f"{row.measured}" + (f" + {row.failed} failed" if row.failed else "")
        table.add_row(
            kernel,
            row.shape,
            row.dtype,
            _number(row.rule_us, 1),
            _number(row.best_us, 1),
            _number(row.ratio, 2),
            "earlier" if row.earlier else tried + (f" + [bold red]{row.wrong} wrong[/]" if row.wrong else ""),
            _tile(row.best, row.rule),
            style="bold" if row.best != row.rule else "",
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _tile(best: Mapping[str, Any], rule: Mapping[str, Any]) -> str:
    """All fields, and of those that differ the rule's."""
    if best == rule:
        return "rule: " + " ".join(f"{name}={value}" for name, value in best.items())
    return " ".join(f"{n}={v}" + (f" (rule {rule[n]})" if rule.get(n) != v else "") for n, v in best.items())


def _summary(rows: list[Row], table: Table, dry: bool, interrupted: bool) -> str:
    timed = [row for row in rows if row.rule is not None]
    better = [row.ratio for row in timed if row.best != row.rule and row.ratio]
    text = f"{len(timed)} launches, {len(better)} faster than by the rule"
    if better:
        text += f" ({math.exp(sum(map(math.log, better)) / len(better)):.2f} times on average)"
    if dry:
        return f"{text}: [bold yellow]a dry run[/], nothing was written."
    if interrupted:
        return (
            f"[bold yellow]Interrupted.[/] {text}; they are in {escape(str(table.path))}, and the same command goes on."
        )
    return f"{text}; in {escape(str(table.path))}."


def _check(where: torch.device, limits: DeviceLimits) -> int:
    """Say which tables there are and whether they are used; 1 if one is there and cannot be."""
    if where.type != "cuda":
        console.print(f"No table is used on {where}: tables are of GPUs.")
        return 0
    if user_folder() is None:
        console.print("CMT_FAST_TUNING is off: no table is used.")
        return 0
    tables = find_tables(limits)
    if not tables:
        console.print(
            f"No table for {escape(limits.name)}: every kernel follows its rule. `{command_line('tune')}` measures one into "
            f"{escape(str(user_folder()))}",
            highlight=False,
        )
    for table in tables:
        console.print(escape(str(table)), highlight=False)
    return int(any(table.problem or table.stale_kernels() for table in tables))
