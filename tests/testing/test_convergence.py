"""The comparison of residual streams: that its runs train, differ, go on and are told apart. One epoch of a tiny model proves nothing about accuracy."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from cmt_fast.data.digits import load_digit_images
from cmt_fast.testing.cuda_autocast import CudaAutocast
from cmt_fast.training import data as data_sets
from cmt_fast.training import engine

ROOT = Path(__file__).parents[2]


@pytest.fixture
def convergence(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.convergence")


@pytest.mark.needs("sklearn", "timm", "torchvision", "matplotlib")
def test_runs_are_paired_and_go_on(convergence, monkeypatch, tmp_path, capsys):
    modes, enter, plain = [], CudaAutocast.__enter__, engine.autocast
    few = [[found[:64] for found in load_digit_images(held_out)] for held_out in (False, True)]
    monkeypatch.setattr(data_sets, "load_digit_images", lambda held_out: few[held_out])
    monkeypatch.setattr(CudaAutocast, "__enter__", lambda self: modes.append(self.dtype) or enter(self))
    options = ["--quick", "--out", str(tmp_path), "--seeds", "1", "--set", "batch_size=32", "device=cpu"]
    assert convergence.main([*options, "--setting", "full"]) == 0
    assert set(modes) == {torch.bfloat16} and engine.autocast is plain
    assert convergence.main([*options, "--setting", "full", "low", "float32"]) == 0
    (path,) = tmp_path.rglob("*-convergence-1threads.json")
    data = json.loads(path.read_text())
    full, low, exact = data["rows"]
    assert [row["provider"] for row in data["rows"]] == ["full", "low", "float32"]
    assert [row["dtype"] for row in data["rows"]] == ["autocast-bfloat16"] * 2 + ["float32"]
    assert (full["recipe"]["epochs"], full["steps"]) == (1, 2), "nothing that could pass for a result"
    assert full["train_loss"] == full["curves"]["train_loss"][-1]
    assert len({row["val_loss"] for row in data["rows"]}) == 3
    assert abs(full["val_loss"] - exact["val_loss"]) < 0.05, "one seed: the same first weights and images"
    for row in data["rows"]:
        errors = row["gradient_error"]
        assert 0 < errors["full"] < 0.2 and 0 < errors["low"] < 0.2 and errors["full"] != errors["low"]
    monkeypatch.setattr(convergence, "train", lambda *_: pytest.fail("measured again"))
    convergence.main([*options, "--setting", "full", "low"])
    capsys.readouterr()
    convergence.main(["--table", str(path)])
    printed = capsys.readouterr().out
    assert f"{low['val_loss'] - full['val_loss']:+.4f}" in printed and "full - float32" in printed


def rows(**of_setting):
    return [
        dict(provider=setting, seed=seed, train_loss=loss, val_loss=loss, val_accuracy=1 - loss)
        for setting, losses in of_setting.items()
        for seed, loss in enumerate(losses)
    ]


def test_differences_are_of_one_seed(convergence):
    found = convergence.differences(rows(full=[0.5, 0.25, 0.75], low=[0.625, 0.5]), "low", "full", "val_loss")
    assert found == {0: 0.125, 1: 0.25}, "the third seed has no partner yet"


def test_the_curves_are_drawn(monkeypatch, convergence, tmp_path):
    pytest.importorskip("matplotlib")
    plot = importlib.import_module("benchmarks.plot")
    runs = rows(full=[0.5, 0.25], low=[0.625, 0.375])
    for row in runs:
        row |= dict(section="convergence", mode="training", model="cmt_digits", batch=64)
        row["curves"] = dict(train_loss=[2.0, row["train_loss"]], val_loss=[2.0, row["val_loss"]])
    data = dict(machine=dict(cpu="a CPU", torch="2"), rows=runs)
    assert list(plot.write_figures(data, tmp_path)) == ["convergence"]
    assert len(plot.convergence(data).axes[0].lines) == 2 * (2 + 2), "a line a run, and two means a setting"


@pytest.mark.parametrize("text", ["epochs", "epoch=3"])
def test_an_unknown_field_is_an_error(convergence, text, capsys):
    with pytest.raises(SystemExit):
        convergence.main(["--set", text])
    assert f"expected FIELD=VALUE with a field of TrainConfig, got '{text}'" in capsys.readouterr().err
