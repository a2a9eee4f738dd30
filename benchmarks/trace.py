"""Every kernel of a model on a GPU, in order, without one: ``python -m benchmarks.trace [--mode training] [--variant cmt_s] [--batch 256] [--dtype bfloat16]``.

Of the packed model, or of a forward and a backward pass in training. Bytes that must move, operations of matrix products, and the time that these take at least. Nothing runs and nothing is compiled; instructions, by which
some kernels are bound, are those of ``python -m benchmarks.static``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.static import GPUS
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.benchmark import DTYPES, MODES, make_model
from cmt_fast.testing.precision import precision
from cmt_fast.testing.results import write_json
from cmt_fast.testing.trace import Kernel, trace
from cmt_fast.testing.trace_training import trace_training


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the kernels and their sums; with ``--json`` write the kernels too."""
    from rich.console import Console

    options = _parser().parse_args(arguments)
    size = options.img_size or VARIANTS[options.variant].resolution
    model, p = make_model(options.variant, size, precision("float32")), precision(options.dtype)
    facts = dict(mode=options.mode, variant=options.variant, img_size=size, batch=options.batch, dtype=options.dtype)
    if options.mode == "training":
        model.set_low_residual(not options.full_residual)
        for stage in options.recompute:
            for block in model.get_submodule(f"blocks_{stage}"):
                block.mlp.recompute = True
        traced = trace_training(model, options.batch, p)
        kernels = traced.kernels
        facts |= dict(low_residual=model.low_residual, recompute=options.recompute, saved=traced.saved)
        facts |= dict(saved_by_original=trace_training(model, options.batch, p, original=True).saved)
    else:
        kernels = trace(model, options.batch, p.low)
    title = f"{options.variant} {size} batch {options.batch} {options.dtype}"
    console = Console(width=None if sys.stdout.isatty() else 200)
    if not options.sums:
        console.print(_kernel_table(kernels, title))
    console.print(_sum_table(kernels, title))
    if options.mode == "training":
        print(_saved_line(facts))
    if options.json:
        rows = [asdict(kernel) | {"floor_us": _floors([kernel])} for kernel in kernels]
        write_json(options.json, facts | {"rates": {name: asdict(gpu) for name, gpu in GPUS.items()}, "kernels": rows})
    return 0


def sums(kernels: Iterable[Kernel]) -> dict[tuple[str, str], list[Kernel]]:
    """The kernels of each stage and step, in the order in which these first come."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.stage, kernel.step), []).append(kernel)
    return groups


def _floors(kernels: Iterable[Kernel]) -> dict[str, float]:
    """By GPU, microseconds."""
    return {name: sum(gpu.floor_us(k.bytes, k.flops) for k in kernels) for name, gpu in GPUS.items()}


def _saved_line(facts: dict[str, Any]) -> str:
    fused, original = facts["saved"], facts["saved_by_original"]
    return (
        f"kept for the backward pass: {fused / 1e9:.2f} GB, {fused / facts['batch'] / 1e6:.1f} MB an image, "
        f"{fused / original:.3f}x of the original's {original / 1e9:.2f} GB"
    )


def _kernel_table(kernels: Sequence[Kernel], title: str) -> object:
    table = _table(f"{title}: kernels; microseconds at least", "stage", "step", "kernel", "tile", "shapes")
    for kernel in kernels:
        name = kernel.name if kernel.triton else f"torch {kernel.name}"
        table.add_row(kernel.stage, kernel.step, name, kernel.tile, kernel.shapes, *_numbers([kernel]))
    return table


def _sum_table(kernels: Sequence[Kernel], title: str) -> object:
    table = _table(f"{title}: sums; microseconds at least", "stage", "step", "kernels")
    for (stage, step), group in sums(kernels).items():
        table.add_row(stage, step, str(len(group)), *_numbers(group))
    ours = [kernel for kernel in kernels if kernel.triton]
    table.add_section()
    table.add_row("", "in Triton", str(len(ours)), *_numbers(ours))
    table.add_row("", "all", str(len(kernels)), *_numbers(kernels))
    return table


def _table(title: str, *columns: str):
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    for column in ("read MB", "written MB", "GFLOP", *GPUS):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _numbers(kernels: Sequence[Kernel]) -> list[str]:
    moved = (
        sum(k.reads for k in kernels) / 1e6,
        sum(k.writes for k in kernels) / 1e6,
        sum(k.flops for k in kernels) / 1e9,
    )
    return [f"{x:.1f}" for x in (*moved, *_floors(kernels).values())]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.trace", description=__doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="cmt_s")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--mode", choices=MODES, default="inference")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="a packed model has autocast's own")
    parser.add_argument("--full-residual", action="store_true", help="in training: CMT.set_low_residual(False)")
    parser.add_argument("--recompute", default="", metavar="STAGES", help="in training: of the IRFFNs, such as ab")
    parser.add_argument("--img-size", type=int, help="by default the published one")
    parser.add_argument("--sums", action="store_true", help="no line for each kernel")
    parser.add_argument("--json", type=Path, help="file to write the kernels to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
