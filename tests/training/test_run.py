"""Whole runs: they learn, they can be interrupted and go on bit for bit, and their files can be used."""

import json
import math

import pytest
import torch
from PIL import Image

from cmt_fast.data.preprocess import Preprocess
from cmt_fast.models.checkpoint import CheckpointError, load_model, read_checkpoint
from cmt_fast.training import run
from cmt_fast.training.data import load_data, val_loader
from cmt_fast.training.distributed import Processes
from cmt_fast.training.engine import DivergedError, Result, Trainer, evaluate
from cmt_fast.training.run import Observer, fit, read_resume

pytestmark = pytest.mark.needs("timm", "torchvision")


class StopAfter(Observer):
    """Presses Ctrl-C in the middle of epoch ``epochs + 1``."""

    def __init__(self, epochs):
        self.epochs = epochs

    def stepped(self, epoch, step, result):
        if epoch == self.epochs + 1 and step == 2:
            raise KeyboardInterrupt


class Record(Observer):
    def __init__(self):
        self.messages, self.steps, self.epochs = [], [], []

    def message(self, text):
        self.messages.append(text)

    def stepped(self, epoch, step, result):
        self.steps.append((epoch, step))

    def finished_epoch(self, record):
        self.epochs.append(record)


def test_learns_and_writes_its_files(tiny):
    seen = Record()
    outcome = fit(tiny(epochs=6, lr=1e-2, label_smoothing=0.0), seen)
    losses = [record["train_loss"] for record in outcome.history]
    assert losses[-1] < 0.8 * losses[0]
    assert outcome.best["val_accuracy"] >= 0.75
    assert seen.epochs == outcome.history
    assert seen.steps == [(epoch, step) for epoch in range(1, 7) for step in (1, 2, 3)]
    lines = (outcome.output / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == outcome.history
    assert Image.open(outcome.output / "curves.png").size[0] > 1000
    assert {p.name for p in outcome.output.iterdir()} == {"best.pth", "last.pth", "history.jsonl", "curves.png"}


@pytest.mark.parametrize("residual", ["full", "low"])
def test_residual_stream(tiny, residual):
    config = tiny(residual=residual)
    assert run.build_model(config, load_data(config), Observer()).low_residual == (residual == "low")


def test_best_checkpoint_gives_the_recorded_accuracy(tiny):
    config = tiny(epochs=3)
    outcome = fit(config)
    data = load_data(config)
    result = evaluate(
        load_model(outcome.best_checkpoint), val_loader(data, config, Processes(), pin=False), torch.device("cpu")
    )
    assert (result.loss, result.accuracy) == (outcome.best["val_loss"], outcome.best["val_accuracy"])
    extra = read_checkpoint(outcome.best_checkpoint).extra
    assert extra["class_names"] == ["blue", "green", "red"]
    assert Preprocess.from_dict(extra["preprocess"]) == data.preprocess


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(
            ema=True, mixup=0.8, cutmix=1.0, drop_path=0.3, erase=0.5, auto_augment="rand-m9-mstd0.5-inc1", amp="bf16"
        ),
        dict(workers=1),
    ],
    ids=["plain", "everything random", "in a worker"],
)
def test_resumed_run_is_bit_equal(tiny, tmp_path, changes):
    straight = fit(tiny(epochs=4, output=str(tmp_path / "straight"), **changes))
    with pytest.raises(KeyboardInterrupt):
        fit(tiny(epochs=4, output=str(tmp_path / "cut"), **changes), StopAfter(2))
    last = tmp_path / "cut" / "last.pth"
    torch.manual_seed(123)  # the state of the process must not matter
    resumed = fit(read_resume(last), resume=last)
    a, b = (torch.load(run / "last.pth", weights_only=True) for run in (straight.output, resumed.output))
    assert [r["val_loss"] for r in straight.history] == [r["val_loss"] for r in resumed.history]
    for key in ["model"] + ["model_ema"] * ("ema" in changes):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key]), key
    assert a["train"]["steps"] == b["train"]["steps"] == 12


def test_seed_decides(tiny, tmp_path):
    losses = [
        fit(tiny(epochs=1, seed=seed, output=str(tmp_path / name))).history[-1]["train_loss"]
        for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_mixup_has_no_training_accuracy(tiny):
    outcome = fit(tiny(mixup=0.8))
    assert all(record["train_accuracy"] is None and math.isfinite(record["train_loss"]) for record in outcome.history)


def test_ema_is_what_is_evaluated_and_saved(tiny):
    outcome = fit(tiny(ema=True, ema_decay=0.5, epochs=1))
    last = torch.load(outcome.output / "last.pth", weights_only=True)
    best = torch.load(outcome.best_checkpoint, weights_only=True)
    name = "blocks_a.0.attn.q.weight"
    assert torch.equal(best["model"][name], last["model_ema"][name])
    assert not torch.equal(last["model"][name], last["model_ema"][name])


def test_bias_tables_do_not_decay(tiny):
    outcome = fit(tiny(epochs=1, lr=1e-3, min_lr=1e-3, weight_decay=300.0, warmup_epochs=0))
    model = load_model(outcome.best_checkpoint)
    assert model.relative_pos_a.std() > 0.9  # randn at the start; decay by 0.7 in each of three steps would leave 0.34
    assert model.blocks_a[0].mlp.conv1[0].weight.std() < 0.4 * (2 / 8) ** 0.5


def test_best_is_not_the_last(tiny, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.7, 0.9])
    monkeypatch.setattr(run, "evaluate", lambda *args, **kwargs: Result(1.0, next(accuracies), 12, 0.1))
    outcome = fit(tiny(epochs=4))
    assert outcome.best["epoch"] == 2
    assert read_checkpoint(outcome.best_checkpoint).extra["record"] == outcome.history[1]


def test_init_from(tiny, tmp_path):
    first = fit(tiny(epochs=1))
    seen = Record()
    config = tiny(epochs=1, output=str(tmp_path / "second"), init_from=str(first.best_checkpoint), lr=1e-9, min_lr=1e-9, warmup_epochs=0)  # fmt: skip
    second = fit(config, seen)
    assert torch.allclose(
        load_model(first.best_checkpoint).head.weight, load_model(second.best_checkpoint).head.weight, atol=1e-7
    )
    assert seen.messages


def test_does_not_overwrite_a_run(tiny):
    fit(tiny(epochs=1))
    with pytest.raises(FileExistsError, match=r"already holds a run: go on with --resume .*last.pth"):
        fit(tiny(epochs=1))


def test_resume_needs_a_run(tiny):
    outcome = fit(tiny(epochs=1))
    with pytest.raises(CheckpointError, match="no state of a training run"):
        read_resume(outcome.best_checkpoint)


def test_loss_that_is_not_finite(tiny):
    with pytest.raises(DivergedError, match=r"loss became (nan|inf).*--clip-grad"):
        fit(tiny(lr=1e30, min_lr=1e29, warmup_epochs=0, epochs=3))


def test_broken_image_is_named(tiny, make_images, tmp_path):
    root = make_images(tmp_path / "images", {"train": 3, "val": 1})
    (root / "train/red/1.png").write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(OSError, match=r"^cannot read the image .*train/red/1\.png: [^\n]*$"):
            fit(tiny(data=str(root), workers=workers, output=str(tmp_path / str(workers))))


def test_clipping_bounds_the_step():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = type("Schedule", (), {"step_update": lambda self, step: None})()
    trainer = Trainer(model, optimizer, schedule, torch.device("cpu"), clip_grad=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    trainer.train_epoch([(100 * torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))], Processes())
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters())]).norm()
    assert 0.009 < moved <= 0.0101
