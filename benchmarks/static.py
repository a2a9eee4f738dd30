"""What the compiler makes of each kernel, without a GPU: ``python -m benchmarks.static [--variant cmt_s] [--arch sm_90] [--json FILE]``.

Each launch that a packed model makes, stage by stage at its published resolution, is compiled ahead of time. How instructions are counted, and what
the columns mean: docs/static.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.aot import compile_launch
from benchmarks.launches import LAUNCHES
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops._triton.device import ARCHITECTURES
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.testing.results import write_json
from cmt_fast.testing.shapes import StageShape, stage_shapes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Rates:
    """What a GPU reaches: those of the performance model, roofline.py.

    Attributes:
        copy: bytes a second of a copy, from memory.
        cache: bytes a second from the last-level cache, where everything fits into 60 % of it.
        cache_bytes: its size.
        tensor: operations a second of 16-bit matrix products.
        issue: instructions a second of all lanes.
    """

    copy: float
    cache: float
    cache_bytes: float
    tensor: float
    issue: float

    def floor_us(self, moved: int, flops: int, instructions: float = 0.0) -> float:
        """Microseconds that a kernel takes at least, which moves so many bytes."""
        rate = self.cache if moved < 0.6 * self.cache_bytes else self.copy
        return 1e6 * max(moved / rate, flops / self.tensor, instructions / self.issue)


GPUS = {
    "H100": Rates(3.0e12, 5.5e12, 50e6, 798e12, 132 * 128 * 1.70e9),
    "H200": Rates(4.3e12, 5.5e12, 50e6, 790e12, 132 * 128 * 1.70e9),
    "A100": Rates(1.75e12, 4.0e12, 40e6, 265e12, 108 * 96 * 1.38e9),  # this and the next: data sheets, not measured
    "RTX 4090": Rates(0.92e12, 4.5e12, 72e6, 155e12, 128 * 128 * 2.5e9),
}


@dataclass(frozen=True)
class Plan:
    """What the performance plan says of a kernel.

    Attributes:
        instructions: an element, as the plan counts them on sm_90 for 16-bit maps; None if it does not say.
        spill_stores: that it accepts.
        source: where it says so.
    """

    instructions: float | None
    spill_stores: int
    source: str


#: By kernel and stage. Row sliding with LayerNorm's statistics costs 22 over load and store (3.5), the reduction 3.
PLAN = {
    **{("lpu", stage): Plan(22 + 3.5 + 3, 0, "section 3, row sliding; ALU of roofline.py") for stage in "abc"},
    ("lpu", "d"): Plan(22 + 3.5, 0, "section 3, row sliding"),
    **{("depthwise_conv3x3", stage): Plan(22 + 3.5, 0, "section 3, row sliding") for stage in "abcd"},
    **{("depthwise_conv3x3_backward", stage): Plan(53, 0, "that, and products with nine taps") for stage in "abcd"},
    **{("expand", stage): Plan(15 + 3.5, 0, "section 3, with asm GELU") for stage in "abcd"},
    **{("depthwise_project", stage): Plan(52.5 + 3.5, 0, "section 3, 9 shifted loads") for stage in "abcd"},
}


@dataclass(frozen=True)
class Row:
    """One launch.

    Attributes:
        kernel, variant, stage, batch, dtype, arch: what it is.
        tile: the constants of its tile.
        programs, warps, registers, spill_stores, shared: of the launch; registers of a thread, bytes of shared memory of a program.
        instructions: executed by all lanes, an element; None where it cannot be told.
        planned: the same in the plan, or None.
        spills_accepted: spill stores that the plan accepts.
        bytes: that must move.
        floor_us: by GPU, the least time: bytes, matrix products, and the planned instructions (where there is no plan, those counted).
    """

    kernel: str
    variant: str
    stage: str
    batch: int
    dtype: str
    arch: int
    tile: str
    programs: int
    warps: int
    registers: int
    spill_stores: int
    shared: int
    instructions: float | None
    planned: float | None
    spills_accepted: int
    bytes: int
    floor_us: dict[str, float]


def rows(kernel: str, shape: StageShape, dtype: str, arch: int) -> Iterator[Row]:
    """Compile the launches of ``kernel`` in one stage."""
    variant, _, stage = shape.name.partition("/")
    plan = PLAN.get((kernel, stage))
    for launch in LAUNCHES[kernel](shape, DTYPES[dtype], ARCHITECTURES[arch]):
        compiled = compile_launch(launch, arch)
        instructions = compiled.instructions_per_element(launch)
        planned = plan and plan.instructions
        programs = 1
        for size in launch.grid:
            programs *= size
        yield Row(
            kernel=kernel,
            variant=variant,
            stage=stage,
            batch=shape.batch,
            dtype=dtype,
            arch=arch,
            tile=_tile(launch),
            programs=programs,
            warps=launch.num_warps,
            registers=compiled.registers,
            spill_stores=compiled.sass.spill_stores,
            shared=compiled.shared,
            instructions=instructions,
            planned=planned,
            spills_accepted=plan.spill_stores if plan else 0,
            bytes=launch.reads + launch.writes,
            floor_us={
                name: gpu.floor_us(
                    launch.reads + launch.writes, launch.flops, (planned or instructions or 0.0) * launch.elements
                )
                for name, gpu in GPUS.items()
            },
        )


def _tile(launch: Launch) -> str:
    return " ".join(f"{name.lower().removeprefix('block_')}={value}" for name, value in launch.tile.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; with ``--json`` write the rows too."""
    from rich.console import Console

    options = _parser().parse_args(arguments)
    found = [
        row
        for arch in options.arch or list(ARCHITECTURES)
        for variant in options.variant or list(VARIANTS)
        for batch in options.batch or [1, 256]
        for stage, shape in zip("abcd", stage_shapes(variant, batch))
        if stage in options.stages
        for kernel in options.kernel or list(LAUNCHES)
        for dtype in options.dtype or ["bfloat16"]
        for row in rows(kernel, shape, dtype, arch)
    ]
    Console(width=None if sys.stdout.isatty() else 200).print(_table(found))
    if options.json:
        write_json(
            options.json,
            {"rates": {name: asdict(gpu) for name, gpu in GPUS.items()}, "rows": [asdict(r) for r in found]},
        )
    return 0


def _table(found: Sequence[Row]) -> object:
    from rich.table import Table

    table = Table(
        title="Kernels compiled ahead of time; floor: the least time on each GPU, in microseconds. No GPU ran."
    )
    for column in ("sm", "kernel", "stage", "batch", "dtype", "tile"):
        table.add_column(column, no_wrap=True)
    for column in ("programs", "warps", "regs", "spills", "shared", "instr", "plan", "ratio", "MB", *GPUS):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found:
        ratio = row.instructions / row.planned if row.instructions and row.planned else None
        table.add_row(
            *(str(row.arch), row.kernel, f"{row.variant}/{row.stage}", str(row.batch), row.dtype, row.tile),
            *(str(n) for n in (row.programs, row.warps, row.registers, row.spill_stores, row.shared)),
            *(
                ("-" if x is None else f"{x:.{digits}f}")
                for x, digits in ((row.instructions, 1), (row.planned, 1), (ratio, 2))
            ),
            f"{row.bytes / 1e6:.1f}",
            *(f"{us:.1f}" for us in row.floor_us.values()),
            style="red" if row.spill_stores > row.spills_accepted else None,
        )
    return table


def _arch(text: str) -> int:
    arch = text.removeprefix("sm_")
    if not arch.isdigit() or int(arch) not in ARCHITECTURES:
        known = ", ".join(f"sm_{known}" for known in ARCHITECTURES)
        raise argparse.ArgumentTypeError(f"expected one of {known}, got {text!r}")
    return int(arch)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.static", description=__doc__)
    parser.add_argument("--kernel", action="append", choices=LAUNCHES, help="may be repeated; all by default")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="may be repeated; all by default")
    parser.add_argument("--stages", default="abcd", help="such as ad; all by default")
    parser.add_argument("--arch", action="append", type=_arch, help="sm_80, sm_90, sm_100 or sm_120; all by default")
    parser.add_argument("--batch", action="append", type=int, help="may be repeated; 1 and 256 by default")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated; bfloat16 by default")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
