"""``cmt-fast export``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from cmt_fast.cli.console import console
from cmt_fast.cli.weights import (
    CheckpointOption,
    DtypeOption,
    ModelOption,
    PretrainedOption,
    load_trained,
    packed_model,
)
from cmt_fast.inference import PackedModel, save_packed
from cmt_fast.inference.export import export_aoti, export_onnx, export_torch
from cmt_fast.models.features import CMTFeatures
from cmt_fast.testing.exported import cannot_load, check_exported
from cmt_fast.testing.results import check_folder
from cmt_fast.testing.tolerance import Comparison
from cmt_fast.training.config import find_device

#: The ending of each format's file. The first format with an ending is what it means without --format.
ENDINGS = {"onnx": ".onnx", "torch": ".pt2", "aoti": ".pt2", "packed": ".safetensors"}
EXPORTERS: dict[str, Any] = {"onnx": export_onnx, "torch": export_torch, "aoti": export_aoti}

#: How to run a file, to be printed: lines that work as they are.
USE = {
    "onnx": """\
import numpy, onnxruntime
session = onnxruntime.InferenceSession({path!r})
outputs = session.run(None, {{"images": numpy.zeros({shape}, numpy.{dtype})}})""",
    "torch": """\
import torch
model = torch.export.load({path!r}).module()
outputs = model(torch.zeros({shape}, dtype=torch.{dtype}, device="{device}"))""",
    "aoti": """\
import torch
model = torch._inductor.aoti_load_package({path!r})
outputs = model(torch.zeros({shape}, dtype=torch.{dtype}, device="{device}"))""",
    "packed": """\
import torch, cmt_fast
model = cmt_fast.optimize(cmt_fast.inference.load_packed({path!r}, device="{device}"))
outputs = model(torch.zeros({shape}))""",
}


def export(
    output: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
    checkpoint: CheckpointOption = None,
    model: ModelOption = None,
    pretrained: PretrainedOption = False,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            "-f",
            help="onnx, torch, aoti or packed. \\[default: by the ending; .pt2 is torch]",
            metavar="NAME",
        ),
    ] = None,
    features: Annotated[
        bool, typer.Option("--features", help="Export the four feature maps instead of the class scores.")
    ] = False,
    dtype: DtypeOption = "auto",
    img_size: Annotated[
        int | None,
        typer.Option(min=1, help="Input size in pixels; the position bias is resized. \\[default: the trained one]"),
    ] = None,
    any_size: Annotated[
        bool, typer.Option("--any-size", help="Take every size whose sides are multiples of 32 pixels, from 64 on.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="The only batch size taken. \\[default: any]")] = None,
    device: Annotated[str, typer.Option(help="Where torch and aoti files will run: cpu, cuda or auto.")] = "cpu",
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Run the file and judge it by the tolerance policy. \\[default: if what runs it is installed]",
        ),
    ] = None,
) -> None:
    """Write a trained model, packed for inference, to one file that runs without its training code.

    onnx: for onnxruntime and other ONNX runtimes; float32 or float16.

    torch: a torch.export program, which runs wherever PyTorch does.

    aoti: compiled by AOTInductor for this kind of processor, for Python or C++; needs a C++ compiler and minutes.

    packed: what cmt_fast.optimize and cmt-fast predict take; the fastest on a CPU where cmt_fast can be installed.

    For example: cmt-fast export model.onnx --checkpoint runs/train/best.pth

    What the file takes and returns, and its class names and preprocessing, are in its metadata (docs/export.md). Afterwards
    three lines that run the file are printed. A file that computes something else is not kept: exit code 1.
    """
    format = _format(format, output)
    if format == "packed" and (any_size or batch_size):
        raise ValueError("a packed file takes any size and any batch: leave --any-size and --batch-size out")
    check_folder(output)
    missing = cannot_load(format)
    if check and missing:
        raise ValueError(f"--check needs to run the file, but {missing}: pip install 'cmt-fast[export]'")
    where = find_device(device)
    trained = load_trained(checkpoint, model, pretrained, img_size, where)
    source = trained.model
    if features and isinstance(source, PackedModel):
        raise ValueError("--features needs a checkpoint: what a packed file returns was chosen when it was packed")
    packed = packed_model(CMTFeatures(source) if features else source, dtype, where)  # type: ignore[arg-type]
    extra: dict[str, Any] = {"preprocess": trained.preprocess.as_dict()}
    if packed.head is not None:
        extra["class_names"] = trained.class_names

    part = output.with_name(f".part-{output.name}")
    try:
        start = time.perf_counter()
        with console.status(f"writing {output}"):
            if format == "packed":
                save_packed(packed, part, **extra)
            else:
                EXPORTERS[format](packed, part, batch_size=batch_size, any_size=any_size, **extra)
        seconds = time.perf_counter() - start
        comparisons: list[Comparison] = []
        if check is not False and not missing:
            with console.status(f"checking {output}"):
                comparisons = check_exported(packed, part, format, batch_size=batch_size, any_size=any_size)
        passed = all(c.passed for c in comparisons)
        if passed:
            part.replace(output)
            console.print(_table(output, seconds, comparisons))
    finally:
        part.unlink(missing_ok=True)
    if not passed:
        for c in comparisons:
            console.print(str(c), markup=False, highlight=False, style=None if c.passed else "red")
        console.print(f"[bold red]{output} was not written[/]: what it would compute is wrong.")
        raise typer.Exit(1)
    if not comparisons:
        console.print(f"[yellow]not checked:[/] {missing or '--no-check'}")
    shape = (batch_size or 1, packed.in_chans, *packed.img_size)
    name = str(packed.dtype).removeprefix("torch.")
    use = USE[format].format(path=str(output), shape=shape, dtype=name, device=packed.device)
    console.print(f"Run it:\n\n{use}\n", markup=False, highlight=False, soft_wrap=True)


def _format(format: str | None, output: Path) -> str:
    if format is None:
        format = next((name for name, ending in ENDINGS.items() if ending == output.suffix), None)
        if format is None:
            raise ValueError(f"{output} does not end in {', '.join(dict.fromkeys(ENDINGS.values()))}: give --format")
    if format not in ENDINGS:
        raise ValueError(f"--format must be {', '.join(ENDINGS)}, got {format!r}")
    if output.suffix != ENDINGS[format]:
        raise ValueError(f"a file of format {format} must end in {ENDINGS[format]}, got {output}")
    return format


def _table(output: Path, seconds: float, comparisons: list[Comparison]) -> Table:
    """The file, and for each output its error beside PyTorch's own."""
    table = Table("file", "MB", "seconds", "output", "error", "PyTorch's own", "allowed", box=box.SIMPLE_HEAD)
    for column in (1, 2, 4, 5, 6):
        table.columns[column].justify = "right"
    first = (str(output), f"{output.stat().st_size / 1e6:.1f}", f"{seconds:.1f}")
    for c in comparisons:
        table.add_row(*first, c.name, f"{c.error:.2g}", f"{c.own_error:.2g}", f"{c.bound:.2g}")
        first = ("", "", "")
    if not comparisons:
        table.add_row(*first)
    return table
