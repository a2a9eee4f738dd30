"""``cmt-fast demo``: train, judge, verify, time and report in a few minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table
from rich.text import Text

from cmt_fast.backend import BACKENDS, machine_reasons
from cmt_fast.cli.console import console
from cmt_fast.cli.program import command_line
from cmt_fast.cli.progress import bar
from cmt_fast.cli.train import DIGITS_RECIPE, TrainingProgress
from cmt_fast.data.digits import load_digit_images
from cmt_fast.models.checkpoint import load_model, save_checkpoint
from cmt_fast.testing.benchmark import BASELINE, Row, bench
from cmt_fast.testing.results import machine
from cmt_fast.testing.verification import Check, verify
from cmt_fast.training.config import TrainConfig, find_device
from cmt_fast.training.data import Data, load_data, val_loader
from cmt_fast.training.distributed import Processes
from cmt_fast.training.engine import predict
from cmt_fast.training.plots import plot_benchmark, plot_confusion, plot_history, plot_predictions
from cmt_fast.training.report import Report
from cmt_fast.training.run import BEST, LAST, Outcome, fit

#: Share of the held-out digits that the trained model must name, or the demo fails.
REQUIRED_ACCURACY = 0.97
INTRODUCTION = (
    "CMT is a vision model that mixes convolutions and attention. cmt_fast makes it as fast as its number of operations "
    "allows, without changing its mathematics. This page was made by running it on this machine."
)
#: Times whose 20th and 80th percentiles are further apart than this share of the median are called unreliable.
BUSY = 0.25
#: Sample digits written as PNG files to try ``cmt-fast predict`` on.
SAMPLES = 12


@dataclass(frozen=True)
class Effort:
    """How much each step does.

    Attributes:
        training: settings of the run over those of ``cmt-fast train digits``.
        judged: whether the accuracy must reach :data:`REQUIRED_ACCURACY`.
        ops, dtypes: to verify; None for all operations.
        model, img_size, seconds: of the benchmark; ``seconds`` for each provider.
    """

    training: dict
    judged: bool
    ops: Sequence[str] | None
    dtypes: Sequence[str]
    model: str
    img_size: int
    seconds: float


FULL = Effort(training={}, judged=True, ops=None, dtypes=("float32",), model="cmt_s", img_size=224, seconds=3.0)
QUICK = Effort(
    training=dict(
        epochs=1,
        batch_size=128,
        warmup_epochs=0.5,
        model_args=dict(embed_dims=[8, 8, 16, 16], depths=[1] * 4, num_heads=[1] * 4, stem_channel=4, fc_dim=16),
    ),
    judged=False,
    ops=["lpu"],
    dtypes=("float32",),
    model="cmt_ti",
    img_size=64,
    seconds=0.1,
)


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the report and everything it shows.")
    ] = Path("demo-report"),
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the training.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Every step in its smallest form; the accuracy is not judged.")
    ] = False,
) -> None:
    """See it work, in a few minutes: train on handwritten digits, check the numbers, time the model, write a report.

    Exit code: 0 if the trained model names at least 97 % of the held-out digits and every number verified is right, else 1.
    """
    where = find_device(device)
    effort = QUICK if quick else FULL
    output.mkdir(parents=True, exist_ok=True)
    report = Report("cmt_fast: the demo", INTRODUCTION)
    start = time.perf_counter()

    console.rule("[bold]1/5  Train a small CMT on handwritten digits", align="left")
    config, outcome = _train(effort, output, str(where), seed)

    console.rule("[bold]2/5  Try it on digits it has never seen", align="left")
    data = load_data(config)
    accuracy = _judge(report, outcome, data, config, output)

    console.rule("[bold]3/5  Verify every backend against float64", align="left")
    failures = _verify(report, effort, where)

    console.rule("[bold]4/5  Time the model against the original's operation order", align="left")
    _bench(report, effort, where, output)

    console.rule("[bold]5/5  Report", align="left")
    _machine(report, where)
    command = command_line("predict", output / "digits", "--checkpoint", output / "model.pth")
    report.heading("Try next")
    report.text("The trained model names the sample digits written beside this report:")
    report.code(command)
    seconds = time.perf_counter() - start
    report.summary.append(("time for this demo", f"{seconds:.0f} s"))
    page = report.write(output)

    passed = not failures and (accuracy >= REQUIRED_ACCURACY or not effort.judged)
    console.print(f"Report:   {page.resolve()}", highlight=False, soft_wrap=True)
    console.print(f"Try next: {command}", highlight=False, soft_wrap=True)
    if accuracy < REQUIRED_ACCURACY and effort.judged:
        console.print(
            f"[bold red]accuracy {100 * accuracy:.2f} %, below the {100 * REQUIRED_ACCURACY:.0f} % required[/]"
        )
    if failures:
        console.print(f"[bold red]{failures} comparisons with float64 failed[/]: cmt-fast verify tells which")
    console.print(("[bold green]All well" if passed else "[bold red]Failed") + f"[/] after {seconds:.0f} s.")
    if not passed:
        raise typer.Exit(1)


def _train(effort: Effort, output: Path, device: str, seed: int) -> tuple[TrainConfig, Outcome]:
    folder = output / "training"
    for name in (LAST, BEST):  # of an earlier demo
        (folder / name).unlink(missing_ok=True)
    settings = {**DIGITS_RECIPE, **effort.training}
    config = TrainConfig("digits", output=str(folder), device=device, seed=seed, **settings)
    # One thread trains this small model about as fast as two, on any number of cores alike, and does not suffer from
    # other work on the machine as several threads that wait for each other do.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TrainingProgress(console) as progress:
            outcome = fit(config, progress)
    finally:
        torch.set_num_threads(threads)
    return config, outcome


def _judge(report: Report, outcome: Outcome, data: Data, config: TrainConfig, output: Path) -> float:
    """Accuracy on the held-out digits of the model after the last epoch: no epoch is chosen by these images."""
    device = config.torch_device()
    model = load_model(outcome.output / LAST).to(device)
    save_checkpoint(model, output / "model.pth", class_names=data.class_names, preprocess=data.preprocess.as_dict())
    images, probabilities, classes = predict(model, val_loader(data, config, Processes(), pin=False), device)
    matrix = torch.zeros(10, 10, dtype=torch.int64)
    matrix.index_put_((classes, probabilities.argmax(1)), torch.ones_like(classes), accumulate=True)
    accuracy = matrix.trace().item() / len(classes)
    wrong = len(classes) - int(matrix.trace())
    last = outcome.history[-1]

    plot_history(outcome.history, output / "curves.png")
    plot_confusion(matrix, data.class_names, output / "confusion.png")
    of_truth = probabilities.gather(1, classes[:, None])[:, 0]
    shown = of_truth.argsort()[:32]
    plot_predictions(images[shown], probabilities[shown], classes[shown], data.class_names, output / "predictions.png")
    _write_samples(output / "digits", data.preprocess.img_size)

    summary = [
        ["held-out digits named correctly", f"{len(classes) - wrong} of {len(classes)} ({100 * accuracy:.2f} %)"],
        ["required", f"{100 * REQUIRED_ACCURACY:.0f} %"],
        ["loss on them", f"{last['val_loss']:.4f}"],
        ["parameters", f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million"],
        ["training", f"{config.epochs} epochs of {data.train_count} images in {outcome.seconds:.0f} s on {device}"],
    ]
    per_class = [
        [name, int(matrix[i].sum()), int(matrix[i, i]), f"{100 * matrix[i, i].item() / int(matrix[i].sum()):.1f} %"]
        for i, name in enumerate(data.class_names)
    ]
    console.print(_rich("Accuracy", ["", ""], summary))
    console.print(_rich("By digit", ["digit", "images", "right", "accuracy"], per_class))

    report.heading("A small CMT learns handwritten digits")
    report.text(
        f"The {data.train_count + data.val_count} digits (8x8 pixels, from scikit-learn, enlarged to "
        f"{data.preprocess.img_size[0]}x{data.preprocess.img_size[1]}) are split class by class: {data.train_count} to train on, "
        f"{data.val_count} held out. The figures below are of the model after the last epoch."
    )
    report.summary.append(
        ("accuracy on held-out digits", f"{100 * accuracy:.2f} % ({100 * REQUIRED_ACCURACY:.0f} % required)")
    )
    report.table(["", "value"], summary)
    report.figure(output / "curves.png", "Loss and accuracy over the epochs")
    report.text(
        "The training loss is the higher one: its images are turned, shifted and scaled at random, and a share of "
        f"{config.label_smoothing:g} of its targets is spread over all classes."
    )
    report.table(["digit", "held-out images", "right", "accuracy"], per_class)
    report.figure(output / "confusion.png", "Confusion matrix of the held-out digits")
    report.figure(output / "predictions.png", "The held-out digits that are hardest for the model")
    return accuracy


def _write_samples(folder: Path, size: tuple[int, int]) -> None:
    """Held-out digits as PNG files of the model's size, named after what they are."""
    folder.mkdir(exist_ok=True)
    images, classes = load_digit_images(held_out=True)
    for i, (image, label) in enumerate(zip(images[:SAMPLES], classes)):
        image.resize((size[1], size[0]), 3).save(folder / f"{i:02d}_is_{label}.png")  # 3: bicubic, as in training


def _verify(report: Report, effort: Effort, device: torch.device) -> int:
    """Number of comparisons that failed."""
    dtypes = effort.dtypes if device.type == "cpu" else (*effort.dtypes, "bfloat16", "autocast-bfloat16")
    able = [backend for backend in BACKENDS if not machine_reasons(backend)]
    with bar(console) as progress:
        checks = verify(able, effort.ops, dtypes, device, progress, quick=True)
    rows = verification_rows(checks)
    header = ["operation", "backend", "precision", "checks", "failed", "worst / allowed"]
    console.print(_rich("Against float64", header, rows))
    left_out = [[name, "; ".join(machine_reasons(name))] for name in BACKENDS if name not in able]
    for name, reasons in left_out:
        console.print(f"[dim]backend {name} cannot run here: {reasons}[/]")

    report.heading("The numbers are right")
    report.text(
        "Every output, gradient and running statistic is compared with a float64 run. It may differ by at most twice "
        "(gradients: three times) what plain PyTorch in the same precision does, plus one rounding unit; "
        "the last column is the worst error as a share of what is allowed."
    )
    report.table(header, rows)
    compared = sum(check.passed is not None for check in checks)
    failures = sum(check.passed is False for check in checks)
    report.summary.append(("comparisons with float64", f"{compared}, of which {failures} failed"))
    if left_out:
        report.text("Backends that cannot run on this machine, and why:")
        report.table(["backend", "reason"], left_out)
    return failures


def verification_rows(checks: Sequence[Check]) -> list[list[object]]:
    """A row for each operation, backend and precision that ran: comparisons, failures, worst error over bound."""
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in checks:
        if check.passed is not None:
            groups.setdefault((check.op, check.backend, check.dtype), []).append(check)
    return [
        [*key, len(group), sum(not check.passed for check in group), f"{max(check.ratio for check in group):.2f}"]
        for key, group in groups.items()
    ]


def _bench(report: Report, effort: Effort, device: torch.device, output: Path) -> None:
    dtypes = ("float32",) if device.type == "cpu" else ("float32", "autocast-float16")
    with bar(console) as progress:
        rows = bench(
            (effort.model,),
            None,
            (1,),
            dtypes,
            device,
            img_size=effort.img_size,
            seconds=effort.seconds,
            progress=progress,
        )
    header = ["implementation", "precision", "median ms", "p20 to p80", "images/s", "speed-up"]
    cells = [bench_cells(row) for row in rows]
    title = f"{effort.model}, one image of {effort.img_size}x{effort.img_size} pixels, inference on {device.type}"
    console.print(_rich(title, header, cells))

    report.heading("How fast it is here")
    report.text(
        f"{title}. The original is the published code's order of operations in plain PyTorch, timed in turns with the others "
        "on the same weights and image, after their outputs were found right. Other work on the machine shows in these times."
    )
    report.table(header, cells)
    measured = [row for row in rows if row.median_ms is not None]
    busy = [row for row in measured if (row.p80_ms or 0.0) - (row.p20_ms or 0.0) > BUSY * (row.median_ms or 0.0)]
    if busy:
        warning = (
            "These times vary a lot: the machine was busy with other work, and the ratios say little. Run it again."
        )
        console.print(f"[yellow]{warning}[/]")
        report.text(warning)
    for row in measured:
        if row.provider != BASELINE and row.ratio is not None:
            ratio = f"{row.ratio:.2f} times the images a second of the original"
            what = f"{row.model} on {device.type}, {row.dtype}, {row.provider}"
            report.summary.append((what, "no reliable figure: the machine was busy" if busy else ratio))
    if measured:
        plot_benchmark(
            [f"{row.provider}, {row.dtype}" for row in measured],
            [row.median_ms or 0.0 for row in measured],
            [(row.p20_ms, row.p80_ms) for row in measured],
            title,
            output / "benchmark.png",
        )
        report.figure(output / "benchmark.png", "Time of each implementation")


def bench_cells(row: Row) -> list[str]:
    """Implementation, precision, median, spread, images a second and ratio as text; the note where nothing was measured."""
    if row.median_ms is None:
        return [row.provider, row.dtype, "–", row.note or "not measured", "–", "–"]
    ratio = "–" if row.ratio is None else f"{row.ratio:.2f}"
    spread = f"{row.p20_ms:.1f} to {row.p80_ms:.1f}"
    return [row.provider, row.dtype, f"{row.median_ms:.1f}", spread, f"{row.images_per_s:.1f}", ratio]


def _machine(report: Report, device: torch.device) -> None:
    report.heading("The machine")
    report.table(["", "value"], [[name.replace("_", " "), value] for name, value in machine(device).items() if value])


def _rich(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_header=any(header),
    )
    for i, name in enumerate(header):
        is_number = all(str(row[i])[:1].isdigit() for row in rows)
        table.add_column(Text(name), justify="right" if is_number and any(header) else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table
