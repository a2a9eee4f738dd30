"""``cmt-fast predict``."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich import box
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cmt_fast.cli.console import console, errors
from cmt_fast.cli.weights import (
    CheckpointOption,
    DtypeOption,
    ModelOption,
    PretrainedOption,
    load_trained,
    packed_model,
)
from cmt_fast.data.images import find_images, read_image
from cmt_fast.data.preprocess import Preprocess
from cmt_fast.inference.optimize import OptimizedModel, optimize
from cmt_fast.training.config import find_device
from cmt_fast.training.data import ignore_interrupt

#: With more images than this, one line an image is printed, and of these at most SHOWN_LINES.
DETAILED, SHOWN_LINES = 10, 40
#: From so many images on, starting processes that read them takes less time than it saves.
MANY = 64


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
    checkpoint: CheckpointOption = None,
    model: ModelOption = None,
    pretrained: PretrainedOption = False,
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
    dtype: DtypeOption = "auto",
    amp: Annotated[str | None, typer.Option(hidden=True)] = None,
    backend: Annotated[str, typer.Option(help="auto, triton, native or reference (see: cmt-fast info).")] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that read images. \\[default: one a core, at most 4; 0 below 64 images]"),
    ] = None,
) -> None:
    """Say what is in images: the most likely classes and their probabilities.

    With your own model: cmt-fast predict photo.jpg --checkpoint runs/train/best.pth

    With the published one: cmt-fast predict photos/ --model cmt_s --pretrained

    An image that cannot be read is reported and left out; exit code 1 means that none could be read.
    """
    if output is not None and output.suffix not in (".json", ".csv"):
        raise ValueError(f"--output must end in .json or .csv, got {output}")
    if amp is not None:
        raise ValueError("--amp is gone, the model is packed in one dtype: give --dtype bfloat16, float16 or float32")
    where = find_device(device)
    paths = find_images(images)
    trained = load_trained(checkpoint, model, pretrained, img_size, where)
    if not trained.class_names:
        raise ValueError("this model has no classes to name: it returns features")
    fast = optimize(packed_model(trained.model, dtype, where), backend=backend)
    if workers is None:
        workers = min(4, os.cpu_count() or 1) if len(paths) >= MANY else 0
    files = ImageBatches(paths, trained.preprocess, batch_size)

    start = time.perf_counter()
    results: list[Prediction] = []
    reading = computing = 0.0
    bars = Progress(
        TextColumn("predicting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
    )
    with bars:
        bar = bars.add_task("", total=len(paths), speed="")
        for batch in run(fast, files, trained.class_names, top_k, workers):
            results += batch.predictions
            reading += batch.reading
            computing += batch.computing
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
    processes = f"{workers} process{'es' * (workers != 1)} beside it" if workers else "in turn with it"
    console.print(
        f"the model alone {len(read) / computing:.1f} images/s ({str(fast.dtype).removeprefix('torch.')}, {fast.backend}), "
        f"reading alone {len(results) * max(1, workers) / reading:.1f} images/s ({processes})",
        highlight=False,
        soft_wrap=True,
    )


class ImageBatch(NamedTuple):
    """Files that were read together.

    Attributes:
        images: (n, C, H, W) of those that could be read, in their order.
        failures: of each file why it could not be read, or None.
        seconds: that reading took.
    """

    images: Tensor
    failures: list[str | None]
    seconds: float


class ImageBatches(Dataset[ImageBatch]):
    """The files ``paths`` in batches. A batch is one tensor already in the process that reads it, to be handed over at once."""

    def __init__(self, paths: Sequence[Path], preprocess: Preprocess, batch_size: int) -> None:
        self.paths, self.preprocess, self.batch_size = paths, preprocess, batch_size
        self.transform = preprocess.evaluation()

    def __len__(self) -> int:
        return -(-len(self.paths) // self.batch_size)

    def __getitem__(self, index: int) -> ImageBatch:
        start = time.perf_counter()
        images: list[Tensor] = []
        failures: list[str | None] = []
        for path in self.paths[index * self.batch_size : (index + 1) * self.batch_size]:
            try:
                images.append(self.transform(read_image(path, self.preprocess.channels)))
                failures.append(None)
            except (OSError, ValueError) as error:
                failures.append(str(error))
        batch = torch.stack(images) if images else torch.empty(0, self.preprocess.channels, *self.preprocess.img_size)
        return ImageBatch(batch, failures, time.perf_counter() - start)


class Predicted(NamedTuple):
    """A batch's predictions, and the seconds that reading it and computing it took."""

    predictions: list[Prediction]
    reading: float
    computing: float


def run(
    model: OptimizedModel, files: ImageBatches, class_names: Sequence[str], top_k: int, workers: int
) -> Iterator[Predicted]:
    """Predictions in the order of the files, a batch at a time, while ``workers`` processes read the next ones."""
    loader: DataLoader[ImageBatch] = DataLoader(
        files, batch_size=None, num_workers=workers, worker_init_fn=ignore_interrupt
    )
    remaining = iter(files.paths)
    for images, failures, reading in loader:
        start = time.perf_counter()
        likely = iter(most_likely(model, images, class_names, top_k))
        computing = time.perf_counter() - start
        found = [
            Prediction(path, [], error) if error else Prediction(path, next(likely))
            for error, path in zip(failures, remaining)  # in this order, or zip would take one path too many
        ]
        yield Predicted(found, reading, computing)


@torch.inference_mode()
def most_likely(
    model: OptimizedModel, images: Tensor, class_names: Sequence[str], top_k: int
) -> list[list[tuple[str, float]]]:
    """Of each image (n, C, H, W) its ``top_k`` (class name, probability) pairs."""
    if len(images) == 0:
        return []
    scores = model(images.to(model.device))
    assert isinstance(scores, Tensor)
    top = scores.float().softmax(1).topk(min(top_k, len(class_names)), dim=1)
    return [
        [(class_names[i], p) for i, p in zip(indices, values)]
        for indices, values in zip(top.indices.tolist(), top.values.tolist())
    ]


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
