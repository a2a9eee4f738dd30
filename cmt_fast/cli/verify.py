"""``cmt-fast verify``: are the numbers right on this machine?"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from cmt_fast.backend import BACKENDS
from cmt_fast.cli.console import console
from cmt_fast.cli.progress import bar
from cmt_fast.testing.results import check_folder, machine, write_json
from cmt_fast.testing.verification import DTYPES, OPS, Check
from cmt_fast.training.config import find_device

#: Failures are listed one a line up to this many.
MAX_LISTED = 20


def verify(
    backend: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join((*BACKENDS, 'auto'))}; may be repeated. \\[default: all]"),
    ] = None,
    op: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(OPS)}; may be repeated. \\[default: all]")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(DTYPES)}; may be repeated. \\[default: all]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Two shapes an operation and one model.")] = False,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every check to this file.", show_default=False)
    ] = None,
) -> None:
    """Check every operation and whole models against float64, beside plain PyTorch's own error.

    Outputs, all gradients and running statistics are compared, in training and evaluation mode. A result is right if its
    error is at most 2 times (gradients: 3 times) plain PyTorch's in the same precision, plus one rounding unit.

    Exit code: 0 if everything that ran is right, 1 if something is wrong or nothing could run, 2 for a bad option.
    """
    from cmt_fast.testing.verification import verify as run_checks

    where = find_device(device)
    if json:
        check_folder(json)
    with bar(console) as progress:
        checks = run_checks(backend, op, dtype, where, progress, quick=quick)
    ran = [check for check in checks if check.passed is not None]
    failures = [check for check in ran if not check.passed]
    if ran:
        console.print(_table(checks))
    for reason, names in _not_run(checks).items():
        console.print(f"[yellow]not verified:[/] {', '.join(names)}: {escape(reason)}")
    for check in failures[:MAX_LISTED]:
        console.print(
            f"[bold red]FAILED[/] {check.op} {check.backend} {check.dtype} ({escape(check.case)}) {escape(check.quantity)}: "
            f"error {check.error:.3g}, plain PyTorch {check.own_error:.3g}, bound {check.bound:.3g}; {escape(check.detail)}",
            highlight=False,
        )
    if len(failures) > MAX_LISTED:
        console.print(f"... and {len(failures) - MAX_LISTED} more failures" + (f"; all in {json}" if json else ""))
    if json:
        write_json(json, {"machine": machine(where), "checks": [asdict(check) for check in checks]})
        console.print(f"Wrote {len(checks)} checks to {escape(str(json))}")
    if not ran:
        console.print("[bold red]Nothing was verified.[/]")
        raise typer.Exit(1)
    if failures:
        console.print(f"[bold red]{len(failures)} of {len(ran)} comparisons failed[/] on {where}.")
        raise typer.Exit(1)
    console.print(f"[bold green]All {len(ran)} comparisons passed[/] on {where}.")


def _table(checks: list[Check]) -> Table:
    """Worst error / bound of each operation and backend, a column a dtype."""
    table = Table(title="worst error / bound of the tolerance policy", title_style="", box=box.SIMPLE_HEAD)
    dtypes = [name for name in DTYPES if any(check.dtype == name for check in checks)]
    table.add_column("operation")
    table.add_column("backend")
    for dtype in dtypes:
        table.add_column(
            dtype.replace("autocast-", "amp\n").replace("bfloat", "bf").replace("float", "fp"), justify="right"
        )
    groups: dict[tuple[str, str], dict[str, list[Check]]] = defaultdict(lambda: defaultdict(list))
    for check in checks:
        if check.passed is not None:
            groups[check.op, check.backend][check.dtype].append(check)
    for (op, backend), by_dtype in sorted(groups.items(), key=lambda item: OPS.index(item[0][0])):
        table.add_row(op, backend, *(_cell(by_dtype[dtype]) for dtype in dtypes))
    return table


def _cell(checks: list[Check]) -> str:
    if not checks:
        return "[dim]-[/]"
    failures = sum(not check.passed for check in checks)
    return f"[bold red]{failures} bad[/]" if failures else f"[green]{max(check.ratio for check in checks):.2f}[/]"


def _not_run(checks: list[Check]) -> dict[str, list[str]]:
    """What did not run by its first reason: a backend, an operation on a backend, or that in one dtype."""
    ran = {key for check in checks if check.passed is not None for key in (check.backend, (check.op, check.backend))}
    reason_of: dict[str, str] = {}
    for check in checks:
        if check.passed is not None:
            continue
        if check.backend not in ran:
            name = check.backend
        elif (check.op, check.backend) not in ran:
            name = f"{check.op} on {check.backend}"
        else:
            name = f"{check.op} in {check.dtype} on {check.backend}"
        reason_of.setdefault(name, check.detail)
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in reason_of.items():
        names[reason].append(name)
    return names
