"""``cmt-fast predict``."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cmt_fast.backend import use_backend
from cmt_fast.cli.console import console, errors
from cmt_fast.data.class_names import imagenet_class_names
from cmt_fast.data.images import find_images, read_image
from cmt_fast.data.preprocess import Preprocess, Transform
from cmt_fast.models.checkpoint import load_checkpoint, load_model, read_checkpoint
from cmt_fast.models.checkpoint_fit import describe_layout, layout_of
from cmt_fast.models.cmt import CMT
from cmt_fast.models.create import create
from cmt_fast.models.variants import VARIANTS
from cmt_fast.training.config import TrainConfig, find_device
from cmt_fast.training.data import ignore_interrupt
from cmt_fast.training.engine import autocast

#: With more images than this, one line an image is printed, and of these at most SHOWN_LINES.
DETAILED, SHOWN_LINES = 10, 40


@dataclass(frozen=True)
class Trained:
    """A model that can name what it sees."""

    model: CMT
    class_names: list[str]
    preprocess: Preprocess


@dataclass(frozen=True)
class Prediction:
    """Of one image: the ``top`` (class name, probability) pairs, most likely first; or the error that kept it from being read."""

    path: Path
    top: list[tuple[str, float]]
    error: str | None = None


def predict(
    images: Annotated[
        list[Path],
        typer.Argument(help="Image files, or folders, of which every image below is taken.", show_default=False),
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights saved by cmt-fast train (with the model's layout, class names and preprocessing inside), or the "
            "original's file together with --model.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help=f"Which model: {', '.join(VARIANTS)}.")] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Use the original's published ImageNet weights of --model.")
    ] = False,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="How many classes to show.")] = 5,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images the model sees at once.")] = 32,
    img_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Another input size in pixels; the position bias is resized. \\[default: the trained one]"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write every result to this .json or .csv file.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    amp: Annotated[str, typer.Option(help="Autocast: off, bf16, fp16, or auto (bf16 or fp16 on a GPU).")] = "off",
    backend: Annotated[str, typer.Option(help="auto, triton, native or reference (see: cmt-fast info).")] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that read images. \\[default: 0, or up to 4 from 256 images on]"),
    ] = None,
) -> None:
    """Say what is in images: the most likely classes and their probabilities.

    With your own model: cmt-fast predict photo.jpg --checkpoint runs/train/best.pth

    With the published one: cmt-fast predict photos/ --model cmt_s --pretrained

    An image that cannot be read is reported and left out; exit code 1 means that none could be read.
    """
    if output is not None and output.suffix not in (".json", ".csv"):
        raise ValueError(f"--output must end in .json or .csv, got {output}")
    if amp not in ("off", "auto", "bf16", "fp16"):
        raise ValueError(f"--amp must be off, auto, bf16 or fp16, got {amp!r}")
    where = find_device(device)
    paths = find_images(images)
    trained = load_trained(checkpoint, model, pretrained, img_size)
    if workers is None:
        workers = min(4, os.cpu_count() or 1) if len(paths) >= 256 else 0

    start = time.perf_counter()
    results: list[Prediction] = []
    bars = Progress(
        TextColumn("predicting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
    )
    dtype = TrainConfig("", amp=amp).amp_dtype(where)
    with use_backend(backend), bars:
        bar = bars.add_task("", total=len(paths), speed="")
        for batch in run(trained, paths, where, dtype, top_k, batch_size, workers):
            results += batch
            speed = len(results) / (time.perf_counter() - start)
            bars.update(bar, completed=len(results), speed=f"{speed:.0f} images/s")
    seconds = time.perf_counter() - start

    unread = [result for result in results if result.error]
    for result in unread:
        errors.print(f"[red]not read:[/] {escape(result.error or '')}", highlight=False)
    read = [result for result in results if not result.error]
    if read:
        console.print(table(read))
        if len(read) > SHOWN_LINES:
            more = "every result is in the output file" if output else "--output results.csv writes them all"
            console.print(f"… and {len(read) - SHOWN_LINES} more images; {more}")
    if output is not None:
        output.write_text(as_json(results) if output.suffix == ".json" else as_csv(results))
        console.print(f"written: {output}", highlight=False)
    console.print(
        f"{len(read)} image{'s' * (len(read) != 1)} in {seconds:.2f} s ({len(read) / seconds:.1f} images/s on {where})"
        + (f", [red]{len(unread)} not read[/]" if unread else ""),
        highlight=False,
    )
    if not read:
        raise typer.Exit(1)


def load_trained(checkpoint: Path | None, model: str | None, pretrained: bool, img_size: int | None) -> Trained:
    """The model asked for, in eval mode.

    Raises:
        ValueError: if the options do not name trained weights, or contradict each other.
        CheckpointError, OSError: if the weights cannot be read or do not fit.
    """
    if model is not None and model not in VARIANTS:
        raise ValueError(f"unknown model {model!r}; expected one of {', '.join(VARIANTS)}")
    if checkpoint is not None and pretrained:
        raise ValueError("--checkpoint and --pretrained both name weights; choose one")
    if checkpoint is None and not (model and pretrained):
        raise ValueError(
            "which weights? Give --checkpoint FILE (of cmt-fast train), or --model cmt_s --pretrained for the published ones"
        )
    if checkpoint is None:
        assert model is not None
        trained = _published(model)
    else:
        trained = _from_file(checkpoint, model)
    if img_size is not None:
        trained.model.set_input_size(img_size)
        trained = replace(trained, preprocess=replace(trained.preprocess, img_size=(img_size, img_size)))
    trained.model.eval()
    return trained


def _published(name: str) -> Trained:
    model = create(name, pretrained=True)
    assert isinstance(model, CMT)
    return Trained(model, imagenet_class_names(), Preprocess(img_size=model.img_size))


def _from_file(path: Path, name: str | None) -> Trained:
    content = read_checkpoint(path, mmap=True)
    if content.config is not None:
        model = load_model(path)
        held, asked = layout_of(model.state_dict()), VARIANTS[name].config if name else None
        if asked and held != (asked["embed_dims"], asked["depths"]):
            raise ValueError(f"{path} holds {describe_layout(held)}, but --model says {name}: leave --model out")
    elif name is None:
        raise ValueError(f"{path} does not say which model it holds: give --model too, one of {', '.join(VARIANTS)}")
    else:
        head = content.state_dict.get("head.weight", content.state_dict.get("module.head.weight"))
        built = create(name, num_classes=1000 if head is None else head.shape[0], img_size=VARIANTS[name].resolution)
        assert isinstance(built, CMT)
        model = built
        load_checkpoint(model, path)
    saved = content.extra.get("preprocess")
    if saved is not None:
        preprocess = Preprocess.from_dict(saved)
    elif model.in_chans == 3:
        preprocess = Preprocess(img_size=model.img_size)
    else:
        raise ValueError(
            f"{path} does not record its preprocessing, and there is none to assume for {model.in_chans} channels: "
            'save_checkpoint(model, path, preprocess={"img_size": [H, W], "mean": [...], "std": [...]})'
        )
    return Trained(model, _class_names(content.extra.get("class_names"), model.num_classes), preprocess)


def _class_names(saved: Sequence[str] | None, count: int) -> list[str]:
    if saved is not None:
        return list(saved)
    return imagenet_class_names() if count == 1000 else [f"class {i}" for i in range(count)]


class ImageFiles(Dataset[tuple[int, "Tensor | str"]]):
    """(index, image (C, H, W)), or (index, why it could not be read)."""

    def __init__(self, paths: Sequence[Path], channels: int, transform: Transform) -> None:
        self.paths, self.channels, self.transform = paths, channels, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        path = self.paths[index]
        try:
            return index, self.transform(read_image(path, self.channels))
        except (OSError, ValueError) as error:
            return index, str(error)


@torch.inference_mode()
def run(
    trained: Trained,
    paths: Sequence[Path],
    device: torch.device,
    amp_dtype: torch.dtype | None,
    top_k: int,
    batch_size: int,
    workers: int,
) -> Iterator[list[Prediction]]:
    """Predictions in the order of ``paths``, a batch at a time."""
    model = trained.model.to(device)
    files = ImageFiles(paths, trained.preprocess.channels, trained.preprocess.evaluation())
    loader: DataLoader[Any] = DataLoader(
        files, batch_size, num_workers=workers, collate_fn=list, worker_init_fn=ignore_interrupt
    )
    for batch in loader:
        tensors = [image for _, image in batch if isinstance(image, Tensor)]
        likely: Iterator[tuple[list[float], list[int]]] = iter(())
        if tensors:
            with autocast(device, amp_dtype):
                probabilities = model(torch.stack(tensors).to(device)).float().softmax(1)
            top = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
            likely = iter(zip(top.values.tolist(), top.indices.tolist()))
        found = []
        for index, image in batch:
            if isinstance(image, str):
                found.append(Prediction(paths[index], [], image))
            else:
                values, indices = next(likely)
                found.append(Prediction(paths[index], [(trained.class_names[i], p) for i, p in zip(indices, values)]))
        yield found


def table(results: Sequence[Prediction]) -> Table:
    """The classes of a few images, or the most likely class of each of many."""
    lines = len(results[0].top) if len(results) <= DETAILED else 1
    shown = Table("image", "class", "probability", "", box=box.SIMPLE_HEAD)
    shown.columns[2].justify = "right"
    for result in results[:SHOWN_LINES]:
        for rank, (name, p) in enumerate(result.top[:lines]):
            bar = Text("█" * max(1, round(20 * p)), style="green" if rank == 0 else "blue")
            shown.add_row(Text(str(result.path) if rank == 0 else ""), Text(name), f"{100 * p:.1f} %", bar)
        if lines > 1:
            shown.add_section()
    return shown


def as_json(results: Sequence[Prediction]) -> str:
    """A list of objects: image, and classes with probabilities or the error."""
    entries = [
        {"image": str(r.path), "error": r.error}
        if r.error
        else {"image": str(r.path), "classes": [{"class": name, "probability": p} for name, p in r.top]}
        for r in results
    ]
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def as_csv(results: Sequence[Prediction]) -> str:
    """A line for each class of each image; images not read have rank 0 and their error."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "probability", "error"])
    for result in results:
        if result.error:
            writer.writerow([result.path, 0, "", "", result.error])
        for rank, (name, p) in enumerate(result.top, 1):
            writer.writerow([result.path, rank, name, f"{p:.6f}", ""])
    return text.getvalue()
