"""A whole training run: build, train, evaluate, save, resume."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cmt_fast.backend import use_backend
from cmt_fast.models.checkpoint import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
from cmt_fast.models.cmt import CMT
from cmt_fast.models.variants import VARIANTS
from cmt_fast.modules import convert_sync_batchnorm
from cmt_fast.training.config import TrainConfig
from cmt_fast.training.data import Data, load_data, steps_per_epoch, train_loader, val_loader
from cmt_fast.training.distributed import Processes, join_processes, leave_processes
from cmt_fast.training.engine import Result, Trainer, evaluate
from cmt_fast.training.history import Record, write_history
from cmt_fast.training.plots import check_plotting, plot_history

LAST, BEST, HISTORY, CURVES = "last.pth", "best.pth", "history.jsonl", "curves.png"


class Observer:
    """Told what happens in a run, in the first process only; the methods here do nothing."""

    def started(self, config: TrainConfig, data: Data, model: nn.Module, steps: int, first_epoch: int) -> None:
        """Before the first epoch; ``steps`` is per epoch, epochs count from 1."""

    def message(self, text: str) -> None:
        """Something worth knowing, such as what loading weights skipped."""

    def stepped(self, epoch: int, step: int, result: Result) -> None:
        """After each step; ``step`` counts from 1."""

    def evaluating(self, epoch: int) -> None:
        """Before the held-out images are run."""

    def finished_epoch(self, record: Record) -> None:
        """After an epoch's checkpoint is written."""


@dataclass(frozen=True)
class Outcome:
    """Of a run.

    Attributes:
        history: one record an epoch, see :func:`fit`.
        best: the record of the epoch with the highest held-out accuracy.
        output: the folder written.
        seconds: of wall-clock time, of this process.
    """

    history: list[Record]
    best: Record
    output: Path
    seconds: float

    @property
    def best_checkpoint(self) -> Path:
        return self.output / BEST


def read_resume(path: str | Path) -> TrainConfig:
    """The settings of the run that wrote a ``last.pth``.

    Raises:
        ValueError: if the file is no checkpoint to resume from.
    """
    state = read_checkpoint(path).extra.get("train")
    if state is None:
        raise CheckpointError(
            f"{path} holds weights but no state of a training run: resume from a {LAST}, or start with --init-from"
        )
    return TrainConfig.from_dict(state["config"])


def fit(config: TrainConfig, observer: Observer | None = None, resume: str | Path | None = None) -> Outcome:
    """Train as ``config`` says.

    Written to ``config.output`` after every epoch: ``last.pth`` (everything needed to go on), ``best.pth`` (the model with
    the highest held-out accuracy: the moving average if there is one), ``history.jsonl`` and, at the end, ``curves.png``.

    Every epoch starts its random numbers from (seed, epoch, rank), so a run that was interrupted and resumed computes what
    an uninterrupted one does, on a CPU bit for bit.

    Args:
        config: the settings. When resuming they must be those of the checkpoint in everything that decides the numbers.
        observer: told about the progress.
        resume: a ``last.pth`` to go on from.

    Raises:
        ValueError, OSError: if settings or data cannot be used; see :meth:`TrainConfig.check` and :func:`load_data`.
        DivergedError: if the loss is no longer finite.
        KeyboardInterrupt: on Ctrl-C; ``last.pth`` holds the last finished epoch.
    """
    config.check()
    check_plotting()
    processes, device = join_processes(config.torch_device())
    try:
        with use_backend(config.backend):
            return _fit(config, observer if observer and processes.is_first else Observer(), resume, processes, device)
    except OSError as error:  # a worker's error comes with its traceback as text: its last line names the image
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(str(error).strip().splitlines()[-1].removeprefix("OSError: ")) from error
    finally:
        leave_processes(processes)


def _fit(
    config: TrainConfig, observer: Observer, resume: str | Path | None, processes: Processes, device: torch.device
) -> Outcome:
    start = time.perf_counter()
    data = load_data(config)
    steps = steps_per_epoch(data, config, processes)
    if steps == 0:
        raise ValueError(
            f"{processes.count} processes of batch_size {config.batch_size} need more than the "
            f"{data.train_count} training images; use a smaller batch_size"
        )
    output = Path(config.output)
    if processes.is_first:
        output.mkdir(parents=True, exist_ok=True)
        if resume is None and (output / LAST).exists():
            raise FileExistsError(
                f"{output} already holds a run: go on with --resume {output / LAST}, or choose another --output"
            )
    seed_everything(config.seed)
    model = build_model(config, data, observer).to(device)
    trainer = _trainer(config, data, model, device, steps, processes)
    average = trainer.ema[0].module if trainer.ema is not None else None
    history = _load_run(Path(resume), model, trainer) if resume is not None else []
    held_out = val_loader(data, config, processes, pin=device.type == "cuda")
    observer.started(config, data, model, steps, len(history) + 1)

    for epoch in range(len(history) + 1, config.epochs + 1):
        seed_everything(config.seed, epoch, processes.rank)
        loader = train_loader(data, config, processes, epoch, pin=device.type == "cuda")
        rate = trainer.optimizer.param_groups[0]["lr"]
        result = trainer.train_epoch(loader, processes, partial(observer.stepped, epoch))
        observer.evaluating(epoch)
        scored = model if average is None else average
        val = evaluate(
            scored,
            held_out,
            device,
            amp_dtype=trainer.amp_dtype,
            channels_last=config.channels_last,
            processes=processes,
        )
        record = _record(epoch, result, val, rate)
        history.append(record)
        if processes.is_first:
            _save(config, data, model, average, trainer, history, output)
            observer.finished_epoch(record)
    if processes.is_first:
        plot_history(history, output / CURVES)
    return Outcome(history, _best(history), output, time.perf_counter() - start)


def build_model(config: TrainConfig, data: Data, observer: Observer) -> CMT:
    """The model of ``config`` for ``data``, with its first weights."""
    args = {**config.constructor_args(), "num_classes": len(data.class_names), "in_chans": data.preprocess.channels}
    model = CMT(**args)
    model.set_low_residual(config.residual == "low")
    source = VARIANTS[config.model].url if config.pretrained else config.init_from
    if source is not None:
        observer.message(str(load_checkpoint(model, source, adapt_in_chans=True)))
    return model


def _trainer(
    config: TrainConfig, data: Data, model: CMT, device: torch.device, steps: int, processes: Processes
) -> Trainer:
    try:
        from timm.data import Mixup
        from timm.optim import create_optimizer_v2
        from timm.scheduler import CosineLRScheduler
        from timm.utils import ModelEmaV3
    except ImportError as error:
        raise ImportError("training needs timm: pip install 'cmt-fast[train]'") from error

    optimizer = create_optimizer_v2(model, "adamw", lr=config.lr, weight_decay=config.weight_decay)
    warmup = round(config.warmup_epochs * steps)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=config.epochs * steps - warmup,
        lr_min=config.min_lr,
        warmup_t=warmup,
        warmup_lr_init=config.min_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    schedule.step_update(0)
    mixup = None
    if config.mixes:
        mixup = Mixup(
            config.mixup,
            config.cutmix,
            label_smoothing=config.label_smoothing,
            num_classes=len(data.class_names),
        )
    ema = (ModelEmaV3(model, config.ema_decay, use_warmup=True), model) if config.ema else None
    wrapped: nn.Module = model
    if processes.count > 1:
        convert_sync_batchnorm(model)
        wrapped = nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None
        )
    amp_dtype = config.amp_dtype(device)
    return Trainer(
        model=wrapped,
        optimizer=optimizer,
        schedule=schedule,
        device=device,
        amp_dtype=amp_dtype,
        scaler=torch.amp.GradScaler(device.type) if amp_dtype is torch.float16 else None,
        mixup=mixup,
        ema=ema,
        label_smoothing=config.label_smoothing,
        clip_grad=config.clip_grad,
        channels_last=config.channels_last,
    )


def seed_everything(*numbers: int) -> None:
    """Seed Python, numpy and torch (every device) from several numbers; similar numbers give unrelated streams."""
    seed, numpy_seed = np.random.SeedSequence(numbers).generate_state(2)
    random.seed(int(seed))
    np.random.seed(numpy_seed)
    torch.manual_seed(int(seed))


def _record(epoch: int, train: Result, val: Result, rate: float) -> Record:
    return {
        "epoch": epoch,
        "lr": rate,
        "train_loss": train.loss,
        "train_accuracy": train.accuracy if train.accuracy == train.accuracy else None,  # nan under mixup
        "val_loss": val.loss,
        "val_accuracy": val.accuracy,
        "train_seconds": train.seconds,
        "val_seconds": val.seconds,
        "images_per_s": train.images_per_s,
    }


def _best(history: list[Record]) -> Record:
    return max(history, key=lambda record: record["val_accuracy"])


def _save(
    config: TrainConfig,
    data: Data,
    model: CMT,
    average: nn.Module | None,
    trainer: Trainer,
    history: list[Record],
    output: Path,
) -> None:
    """Write the history, ``last.pth`` and, after the best epoch so far, ``best.pth``."""
    about: dict[str, Any] = {"class_names": data.class_names, "preprocess": data.preprocess.as_dict()}
    if _best(history) is history[-1]:
        save_checkpoint(model if average is None else average, output / BEST, record=history[-1], **about)
    state: dict[str, Any] = {
        "config": config.as_dict(),
        "history": history,
        "steps": trainer.steps,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict() if trainer.scaler is not None else None,
    }
    save_checkpoint(model, output / LAST, model_ema=average, train=state, **about)
    write_history(output / HISTORY, history)


def _load_run(path: Path, model: CMT, trainer: Trainer) -> list[Record]:
    """Put model, average, optimizer and schedule where the run that wrote ``path`` left them; returns its history."""
    state = read_checkpoint(path).extra["train"]
    load_checkpoint(model, path, key="model")
    if trainer.ema is not None:
        load_checkpoint(trainer.ema[0].module, path, key="model_ema")
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.steps = state["steps"]
    trainer.schedule.step_update(trainer.steps)
    if trainer.scaler is not None:
        trainer.scaler.load_state_dict(state["scaler"])
    return list(state["history"])
