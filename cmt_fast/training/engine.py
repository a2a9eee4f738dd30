"""One pass over the training images, and one over the held-out ones."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_fast.training.distributed import Processes

#: Steps between two looks at the running loss: each look makes the CPU wait for the GPU.
LOOK_EVERY = 10


class DivergedError(RuntimeError):
    """The training loss is no longer finite."""


@dataclass
class Meter:
    """Running sums over images, kept on the device: loss, right answers, images."""

    device: torch.device
    sums: Tensor = field(init=False)
    start: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums = torch.zeros(3, dtype=dtype, device=self.device)

    def add(self, loss: Tensor, correct: Tensor, count: int) -> None:
        """``loss``: mean over the ``count`` images; ``correct``: how many were right."""
        self.sums += torch.stack([loss.detach() * count, correct, torch.full_like(loss, count)]).to(self.sums)

    def result(self, processes: Processes | None = None) -> Result:
        """The means so far; over all processes if they are given."""
        sums = self.sums if processes is None else processes.sum(self.sums.clone())
        loss, correct, count = sums.tolist()
        return Result(loss / max(count, 1), correct / max(count, 1), int(count), time.perf_counter() - self.start)


@dataclass(frozen=True)
class Result:
    """Of a pass.

    Attributes:
        loss: mean over the images.
        accuracy: share of right answers, 0..1.
        images: how many were seen.
        seconds: of wall-clock time.
    """

    loss: float
    accuracy: float
    images: int
    seconds: float

    @property
    def images_per_s(self) -> float:
        return self.images / max(self.seconds, 1e-9)


@dataclass
class Trainer:
    """What a step changes, and how.

    Attributes:
        model: in training it may be wrapped (DDP).
        optimizer, schedule: the schedule is stepped once a step.
        device: of the model.
        amp_dtype: autocast's, or None.
        scaler: of the loss under fp16, or None.
        mixup: timm's Mixup, or None.
        ema: timm's ModelEmaV3 and the bare model it follows, or None.
        label_smoothing, clip_grad: see :class:`cmt_fast.training.config.TrainConfig`.
        channels_last: memory format of the images.
        steps: done so far, over all epochs.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any
    device: torch.device
    amp_dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    mixup: Any = None
    ema: tuple[Any, nn.Module] | None = None
    label_smoothing: float = 0.0
    clip_grad: float = 0.0
    channels_last: bool = False
    steps: int = 0

    def train_epoch(
        self,
        loader: Iterable[tuple[Tensor, Tensor]],
        processes: Processes,
        on_step: Callable[[int, Result], None] | None = None,
    ) -> Result:
        """One pass over ``loader``.

        Args:
            loader: gives images (B, C, H, W) and classes (B).
            processes: over which the result is summed.
            on_step: called after each step with its number (from 1) and the means so far, which are up to
                :data:`LOOK_EVERY` steps old.

        Returns:
            Loss and accuracy of the training mode. With mixup, the accuracy is nan: there is no one right class.

        Raises:
            DivergedError: if the loss is no longer finite.
        """
        self.model.train()
        meter = Meter(self.device)
        shown = meter.result()
        for step, (images, classes) in enumerate(loader, 1):
            images, classes = to_device(images, classes, self.device, self.channels_last)
            targets = classes
            if self.mixup is not None:
                images, targets = self.mixup(images, classes)
            loss, scores = self._forward(images, targets)
            self._update(loss)
            hits = (scores.argmax(1) == classes).sum() if self.mixup is None else torch.full_like(loss, math.nan)
            meter.add(loss, hits, len(images))
            if step % LOOK_EVERY == 1:
                shown = _finite(meter.result())
            if on_step is not None:
                on_step(step, shown)
        return _finite(meter.result(processes))

    def _forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self.device, self.amp_dtype):
            scores = self.model(images)
        smoothing = self.label_smoothing if self.mixup is None else 0.0  # timm's Mixup smooths its targets itself
        return F.cross_entropy(scores.float(), targets, label_smoothing=smoothing), scores

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        scaler = self.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        if self.clip_grad > 0:
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.steps += 1
        self.schedule.step_update(self.steps)
        if self.ema is not None:
            average, model = self.ema
            average.update(model, step=self.steps)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    *,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    processes: Processes | None = None,
) -> Result:
    """Cross entropy (without smoothing) and accuracy of ``model`` in eval mode; its mode is restored."""
    was_training = model.training
    model.eval()
    meter = Meter(device)
    for images, classes in loader:
        images, classes = to_device(images, classes, device, channels_last)
        with autocast(device, amp_dtype):
            scores = model(images).float()
        meter.add(F.cross_entropy(scores, classes), (scores.argmax(1) == classes).sum(), len(images))
    model.train(was_training)
    return meter.result(processes or Processes())


@torch.no_grad()
def predict(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Images (n, C, H, W), probabilities (n, classes) and classes (n) of a whole loader, on the CPU, in eval mode."""
    model.eval()
    seen = [(images, model(images.to(device)).float().softmax(1).cpu(), classes) for images, classes in loader]
    images, probabilities, classes = (torch.cat(parts) for parts in zip(*seen))
    return images, probabilities, classes


def to_device(images: Tensor, classes: Tensor, device: torch.device, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Images and classes on ``device``, the images in the memory format asked for."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(device, non_blocking=True, memory_format=layout), classes.to(device, non_blocking=True)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    """``torch.autocast``, or nothing if ``dtype`` is None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _finite(result: Result) -> Result:
    if not math.isfinite(result.loss):
        raise DivergedError(
            f"the training loss became {result.loss}: lower the learning rate, warm up longer, clip the gradient "
            "(--clip-grad 1), or use bf16 instead of fp16"
        )
    return result
