"""The figures of training and of the demo, as PNG files."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cmt_fast.training.history import Record

BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#d9731a", "#2c8a4b", "#b8292f", "#8a8f98"


def check_plotting() -> None:
    """Fail before a long run rather than after it.

    Raises:
        ImportError: without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib: pip install 'cmt-fast[train]'")


def plot_history(history: Sequence[Record], path: Path) -> None:
    """Loss and accuracy over the epochs, side by side."""
    figure, (left, right) = _figure(1, 2, figsize=(10, 3.8))
    epochs = [record["epoch"] for record in history]
    marker = "o" if len(history) < 60 else None
    style: dict[str, Any] = dict(marker=marker, markersize=3, linewidth=1.6)
    left.plot(epochs, [r["train_loss"] for r in history], color=ORANGE, label="training", **style)
    left.plot(epochs, [r["val_loss"] for r in history], color=BLUE, label="held out", **style)
    left.set(title="Loss", xlabel="epoch", ylabel="cross entropy (nats)", ylim=(0, None))
    if all(r["train_accuracy"] is not None for r in history):
        right.plot(epochs, [100 * r["train_accuracy"] for r in history], color=ORANGE, label="training", **style)
    right.plot(epochs, [100 * r["val_accuracy"] for r in history], color=BLUE, label="held out", **style)
    right.set(title="Accuracy", xlabel="epoch", ylabel="right answers (%)", ylim=(None, 100.8))
    left.legend(loc="upper right")
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    _write(figure, path)


def plot_confusion(matrix: Tensor, class_names: Sequence[str], path: Path) -> None:
    """``matrix[i, j]`` images (n, n, integers) of class i were taken for class j."""
    figure, axes = _figure(figsize=(6.4, 5.6))
    shares = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(100 * shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, shrink=0.85, label="share of the class (%)")
    for i, row in enumerate(matrix.tolist()):
        for j, count in enumerate(row):
            if count:
                color = "white" if shares[i, j] > 0.5 else RED if i != j else "black"
                axes.text(j, i, count, ha="center", va="center", color=color, fontsize=9)
    axes.set(title="Held-out images: true and predicted class", xlabel="predicted class", ylabel="true class")
    axes.set_xticks(range(len(class_names)), class_names)
    axes.set_yticks(range(len(class_names)), class_names)
    _write(figure, path)


def plot_predictions(
    images: Tensor, probabilities: Tensor, classes: Tensor, class_names: Sequence[str], path: Path, columns: int = 8
) -> None:
    """A grid of grey images with the predicted class and its probability, wrong ones in red.

    Args:
        images: (n, 1, H, W), in any range.
        probabilities: (n, number of classes).
        classes: (n), the true ones.
    """
    rows = -(-len(images) // columns)
    figure, grid = _figure(rows, columns, figsize=(1.3 * columns, 1.6 * rows + 0.5), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    top = probabilities.max(1)
    for axes, image, p, guess, true in zip(
        grid.flat, images, top.values.tolist(), top.indices.tolist(), classes.tolist()
    ):
        axes.imshow(image[0].numpy(), cmap="gray")
        text = f"{class_names[guess]}  {p:.0%}" + ("" if guess == true else f"\ntruth: {class_names[true]}")
        axes.set_title(text, fontsize=9, color=GREEN if guess == true else RED)
    figure.suptitle("Held-out images: predicted class and its probability (hardest first)")
    _write(figure, path)


def plot_benchmark(
    labels: Sequence[str], medians: Sequence[float], ranges: Sequence[Any], title: str, path: Path
) -> None:
    """Horizontal bars of times in milliseconds; ``ranges`` holds (p20, p80) of each."""
    figure, axes = _figure(figsize=(8, 1.1 + 0.55 * len(labels)))
    errors = [[m - low for m, (low, _) in zip(medians, ranges)], [high - m for m, (_, high) in zip(medians, ranges)]]
    positions = list(range(len(labels)))[::-1]
    colors = [GREY] + [BLUE] * (len(labels) - 1)
    axes.barh(positions, medians, xerr=errors, color=colors, height=0.6, error_kw=dict(ecolor="black", capsize=3, lw=1))
    for y, median, (_, high) in zip(positions, medians, ranges):
        axes.text(max(high, median) * 1.02, y, f"{median:.1f} ms", va="center", fontsize=10)
    axes.set_yticks(positions, labels)
    axes.set(title=title, xlabel="milliseconds a batch (median; whiskers: 20th to 80th percentile)")
    axes.set_xlim(0, 1.2 * max(high for _, high in ranges))
    axes.spines[["top", "right"]].set_visible(False)
    _write(figure, path)


def _figure(*shape: int, **options: Any) -> tuple[Any, Any]:
    """A figure without a window, so that plots work on a machine without a screen and leave pyplot's state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=options.pop("figsize"), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(*shape, **options)


def _write(figure: Any, path: Path) -> None:
    new = path.with_name(path.name + ".tmp")
    figure.savefig(new, dpi=130, format="png")
    new.replace(path)
