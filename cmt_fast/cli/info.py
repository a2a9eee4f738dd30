"""``cmt-fast info``: this machine, a model, or a checkpoint file."""

from __future__ import annotations

import importlib.metadata
import json as json_format
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from cmt_fast.backend import BACKENDS, get_backend, machine_reasons
from cmt_fast.cli.console import console
from cmt_fast.models.checkpoint import read_checkpoint
from cmt_fast.models.checkpoint_fit import clean_names, describe_layout, layout_of
from cmt_fast.models.complexity import MAC_KINDS, Layer, Totals, add, by_kind, by_stage, layers
from cmt_fast.models.config import STAGES
from cmt_fast.models.grids import Grid, image_size, stage_grids
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops._triton.device import device_limits
from cmt_fast.ops._triton.tuned_tables import find_tables
from cmt_fast.testing.results import machine

#: Packages whose versions are shown if they are installed; none of them is imported.
PACKAGES = ("cmt-fast", "torch", "triton", "torchvision", "timm", "safetensors", "numpy")
#: Flags of /proc/cpuinfo and what they are called.
CPU_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bf16",
    "amx_bf16": "AMX bf16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "Arm bf16",
}
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")


def info(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL | FILE", help=f"A model ({', '.join(VARIANTS)}) or a checkpoint file.", show_default=False
        ),
    ] = None,
    img_size: Annotated[
        str | None,
        typer.Option(metavar="N or HxW", help="Input size of MODEL in pixels. \\[default: its published one]"),
    ] = None,
    every_layer: Annotated[bool, typer.Option("--layers", help="List every layer of MODEL.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show this machine and its backends; the layers, MACs and parameters of a model; or what a checkpoint file holds.

    Exit code: 0, or 2 for an unknown model, a bad size or an unreadable file.
    """
    facts: dict[str, Any]
    if target in VARIANTS:
        size = VARIANTS[target].resolution if img_size is None else _parse_size(img_size)
        found = layers(target, img_size=size)
        facts = model_facts(target, image_size(size), found)
        if not json:
            show_model(facts, found if every_layer else [])
    elif img_size is not None or every_layer:
        raise ValueError(f"--img-size and --layers describe a model, one of {', '.join(VARIANTS)}, got {target!r}")
    elif target is not None:
        if not (Path(target).exists() or target.endswith(SUFFIXES)):
            raise ValueError(f"unknown model {target!r}; expected one of {', '.join(VARIANTS)}, or a checkpoint file")
        facts = checkpoint_facts(target)
        if not json:
            show_checkpoint(facts)
    else:
        facts = machine_facts()
        if not json:
            show_machine(facts)
    if json:
        typer.echo(json_format.dumps(facts, indent=1))


# ---- this machine ------------------------------------------------------------------------------------------------------


def machine_facts() -> dict[str, Any]:
    """The machine, versions, settings and backends as plain JSON values."""
    measured = machine("cpu")
    return {
        "machine": {
            "os": measured["os"],
            "cpu": measured["cpu"],
            "cores": measured["cores"],
            "threads": measured["threads"],
            "instructions": _cpu_instructions(),
            "torch_uses": torch.backends.cpu.get_cpu_capability(),
            "memory_gib": _memory_gib(),
            "gpus": _gpus(),
        },
        "versions": {
            "python": measured["python"],
            **{package: _version(package) for package in PACKAGES},
            "cmt-fast": measured["cmt_fast"],  # also when it runs from a checkout
            "torch": measured["torch"],  # with its build, as in 2.11.0+cpu
            "cuda": torch.version.cuda,
        },
        "commit": measured["commit"],
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("CMT_FAST_")},
        "backend": get_backend(),
        "backends": {name: machine_reasons(name) for name in BACKENDS},
    }


def show_machine(facts: dict[str, Any]) -> None:
    own, versions = facts["machine"], facts["versions"]
    table = _facts_table("This machine")
    threads = f"{own['cores']} cores, PyTorch uses {own['threads']} threads and {own['torch_uses']}"
    table.add_row("CPU", f"{escape(own['cpu'])}\n{threads}\n{', '.join(own['instructions'])}")
    table.add_row("memory", "unknown" if own["memory_gib"] is None else f"{own['memory_gib']} GiB")
    for gpu in own["gpus"]:
        table.add_row(f"GPU {gpu['index']}", f"{escape(gpu['name'])}, sm_{gpu['capability']}, {gpu['memory_gib']} GiB")
        table.add_row("  tuned tiles", "\n".join(map(escape, gpu["tuned"])) or "none: every kernel follows its rule")
    if not own["gpus"]:
        table.add_row("GPU", "none visible to PyTorch")
    table.add_row("system", escape(own["os"]))
    console.print(table)

    table = _facts_table("Versions")
    for name, version in versions.items():
        table.add_row(name, "[dim]not installed[/]" if version is None else escape(version))
    if facts["commit"]:
        table.add_row("commit", facts["commit"])
    console.print(table)

    if facts["environment"]:
        table = _facts_table("Environment")
        for name, value in facts["environment"].items():
            table.add_row(name, escape(value))
        console.print(table)

    table = Table(title=f"Backends (setting: {facts['backend']})", **_STYLE)
    for column in ("backend", "can run here", "why not"):
        table.add_column(column)
    for name, reasons in facts["backends"].items():
        can = "[red]no[/]" if reasons else "[green]yes[/]"
        table.add_row(name, can, "\n".join(map(escape, reasons)))
    console.print(table)


def _cpu_instructions() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = set(line.group(1).split()) if line else set()
    return [name for flag, name in CPU_FLAGS.items() if flag in flags]


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "tuned": [str(table) for table in find_tables(device_limits(torch.device("cuda", index)))],
            }
        )
    return gpus


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- a model -----------------------------------------------------------------------------------------------------------


def model_facts(name: str, size: Grid, found: list[Layer]) -> dict[str, Any]:
    """Layers, sums and the paper's figures as plain JSON values; MACs are those of one image."""
    variant = VARIANTS[name]
    return {
        "model": name,
        "img_size": list(size),
        "total": add(found)._asdict(),
        "paper": {
            "img_size": variant.resolution,
            "gmacs": variant.paper_gmacs,
            "params_million": variant.paper_params,
            "top1": variant.paper_top1,
        },
        "stages": {
            stage: {"shape": _stage_shape(found, stage), **sums._asdict()} for stage, sums in by_stage(found).items()
        },
        "kinds": {kind: sums._asdict() for kind, sums in by_kind(found).items()},
        "layers": [
            {"name": layer.name, "kind": layer.kind, "shape": layer.shape, "macs": layer.macs, "params": layer.params}
            for layer in found
        ],
    }


def _stage_shape(found: list[Layer], stage: str) -> list[int]:
    return list([layer for layer in found if layer.stage == stage][-1].shape)


def show_model(facts: dict[str, Any], every_layer: list[Layer]) -> None:
    total, paper = Totals(**facts["total"]), facts["paper"]
    if every_layer:
        console.print(_layer_table(facts["model"], every_layer))
    console.print(_stage_table(facts, total))
    console.print(f"here: {total.macs / 1e9:.3f} GMAC an image, {total.params / 1e6:.2f} M parameters", highlight=False)
    note = " (not reproducible: the published code has 26.26 M too)" if facts["model"] == "cmt_s" else ""
    console.print(
        f"paper, at {paper['img_size']} x {paper['img_size']}: {paper['gmacs']} GMAC, {paper['params_million']} M{note}, "
        f"top-1 {paper['top1']} %\n",
        highlight=False,
    )
    console.print(_kind_table(facts["kinds"], total))
    counts = [f"{sums['elements'] / 1e6:.2f} M {kind}" for kind, sums in facts["kinds"].items() if kind in _ELEMENTWISE]
    console.print(f"elements of the elementwise steps, an image: {', '.join(counts)}", highlight=False)


def _layer_table(name: str, every_layer: list[Layer]) -> Table:
    table = Table(title=f"Layers of {name}", **_STYLE)
    table.add_column("layer", overflow="fold")
    table.add_column("kind", no_wrap=True)
    for column in ("output", "M MACs", "parameters"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in every_layer:
        macs, params = f"{layer.macs / 1e6:.3f}" if layer.macs else "", f"{layer.params:,}" if layer.params else ""
        table.add_row(layer.name, layer.kind, _shape(layer.shape), macs, params)
    return table


def _stage_table(facts: dict[str, Any], total: Totals) -> Table:
    height, width = facts["img_size"]
    table = Table(title=f"{facts['model']} at {height} x {width} pixels", show_footer=True, **_STYLE)
    table.add_column("stage", footer="total")
    footers = {"output": "", "M MACs": f"{total.macs / 1e6:,.1f}", "share": "", "parameters": f"{total.params:,}"}
    for column, footer in footers.items():
        table.add_column(column, footer, justify="right", no_wrap=True)
    for stage, row in facts["stages"].items():
        share = f"{100 * row['macs'] / total.macs:.1f} %"
        table.add_row(stage, _shape(row["shape"]), f"{row['macs'] / 1e6:,.1f}", share, f"{row['params']:,}")
    return table


def _kind_table(kinds: dict[str, Any], total: Totals) -> Table:
    table = Table(title="Where the multiply-adds and parameters are", **_STYLE)
    table.add_column("kind", no_wrap=True)
    for column in ("M MACs", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=20)
    table.add_column("parameters", justify="right", no_wrap=True)
    for kind, sums in kinds.items():
        if not (sums["macs"] or sums["params"]):
            continue
        share = sums["macs"] / total.macs
        work = (f"{sums['macs'] / 1e6:,.1f}", f"{100 * share:.1f} %") if kind in MAC_KINDS else ("", "")
        table.add_row(kind, *work, f"[cyan]{_bar(share, 20)}[/]", f"{sums['params']:,}" if sums["params"] else "")
    return table


_ELEMENTWISE = ("gelu", "batchnorm", "layernorm", "softmax", "swish")


def _bar(share: float, width: int) -> str:
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _parse_size(text: str) -> int | tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:[xX,](\d+))?", text.strip())
    if not match:
        raise ValueError(f"--img-size must be N or HxW in pixels (224, or 480x640), got {text!r}")
    height, width = match.groups()
    return int(height) if width is None else (int(height), int(width))


# ---- a checkpoint file -------------------------------------------------------------------------------------------------


def checkpoint_facts(path: str) -> dict[str, Any]:
    """What a checkpoint holds, read off its names and shapes, as plain JSON values."""
    checkpoint = read_checkpoint(path, progress=False, mmap=True)
    state = {
        name: value for name, value in clean_names(checkpoint.state_dict).items() if isinstance(value, torch.Tensor)
    }
    first, head = state.get("stem_conv1.weight"), state.get("head.weight")
    dtypes = dict.fromkeys(str(value.dtype).removeprefix("torch.") for value in state.values())
    return {
        "file": str(checkpoint.path),
        "megabytes": round(checkpoint.path.stat().st_size / 1e6, 1),
        "key": checkpoint.key,
        "other_entries": {name: type(value).__name__ for name, value in checkpoint.extra.items()},
        "written_by": checkpoint.version,
        "model": describe_layout(layout_of(state)) if first is not None else None,
        "img_size": list(checkpoint.img_size or _square_size(state) or ()) or None,
        "img_size_recorded": checkpoint.img_size is not None,
        "in_chans": None if first is None else first.shape[1],
        "num_classes": None if first is None else 0 if head is None else head.shape[0],
        "tensors": len(state),
        "params": sum(value.numel() for name, value in state.items() if not name.endswith(_BUFFERS)),
        "dtypes": list(dtypes),
        "config": checkpoint.config,
    }


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def _square_size(state: Mapping[str, torch.Tensor]) -> Grid | None:
    """The square image that the position bias tables belong to, if there is one."""
    tables = [state.get(f"relative_pos_{stage}") for stage in STAGES]
    convs = [state.get(f"blocks_{stage}.0.attn.sr.0.weight") for stage in STAGES]
    shapes = [None if table is None else tuple(table.shape[1:]) for table in tables]
    if shapes[0] is None:
        return None
    side = 4 * math.isqrt(shapes[0][0])  # a token of stage a is four pixels wide
    try:
        grids = stage_grids((side, side), [1 if conv is None else conv.shape[-1] for conv in convs])
    except ValueError:
        return None
    return (side, side) if shapes == [(grid.num_queries, grid.num_keys) for grid in grids] else None


def show_checkpoint(facts: dict[str, Any]) -> None:
    table = _facts_table(escape(facts["file"]))
    table.add_row("size", f"{facts['megabytes']} MB")
    table.add_row("weights under", "the file itself" if facts["key"] is None else escape(facts["key"]))
    if facts["other_entries"]:
        others = (f"{name} ({kind})" for name, kind in facts["other_entries"].items())
        table.add_row("other entries", escape(", ".join(others)))
    if facts["written_by"]:
        table.add_row("written by", f"cmt_fast {escape(facts['written_by'])}")
    if facts["model"] is None:
        table.add_row("model", "[yellow]no CMT: there is no stem_conv1.weight[/]")
    else:
        size = facts["img_size"]
        how = "" if facts["img_size_recorded"] else " (from its bias tables)"
        table.add_row("model", escape(facts["model"].removeprefix("a ")))
        table.add_row("image size", f"{size[0]} x {size[1]}{how}" if size else "not recorded, and not square")
        table.add_row("channels", f"{facts['in_chans']} in")
        table.add_row("classes", str(facts["num_classes"]))
    table.add_row("tensors", f"{facts['tensors']} ({', '.join(facts['dtypes'])})")
    table.add_row("parameters", f"{facts['params']:,}")
    console.print(table)


_STYLE: dict[str, Any] = dict(title_style="bold", title_justify="left", box=box.SIMPLE_HEAD)


def _facts_table(title: str) -> Table:
    """Two columns, name and value."""
    table = Table(title=title, show_header=False, **_STYLE)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    return table
