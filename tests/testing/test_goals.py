"""The benchmark of a GPU's goals, tried at tiny sizes on a CPU, where nothing is compiled."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch

from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.providers import COMPILED_ON_GPU
from cmt_fast.testing.shapes import SMALL_MODELS

pytestmark = pytest.mark.needs("timm")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def compiled(monkeypatch):
    """The arguments of torch.compile, which compiles nothing here."""
    seen = []

    def compile(function, **options):
        seen.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    return seen


@pytest.fixture
def goals(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    found = importlib.import_module("benchmarks.goals")
    peers = importlib.import_module("benchmarks.report.peers")
    monkeypatch.setattr(found, "PEER", peers.Peer("test_vit", 160, None, ""))
    tiny = {name: value for name, value in SMALL_MODELS["aligned"].items() if name != "img_size"} | dict(
        depths=(1, 1, 1, 1)
    )
    monkeypatch.setitem(VARIANTS, "cmt_ti", dataclasses.replace(VARIANTS["cmt_ti"], config=tiny))
    monkeypatch.setattr(found, "DTYPE", "float32")  # the other one is slow where a CPU emulates it
    return found


def test_everything_is_measured_and_judged(goals, compiled, tmp_path, capsys):
    code = goals.main(["--quick", "--device", "cpu", "--seconds", "0.001", "--out", str(tmp_path)])
    (path,) = tmp_path.rglob("*-goals-*.json")
    rows = json.loads(path.read_text())["rows"]
    settings = {(row["model"], row["batch"], row["dtype"], row["provider"]) for row in rows}
    ours = {(d, name) for d in ("float32", "autocast-bfloat16") for name in ("original", "optimize")}
    ours |= {("float32", name) for name in ("original-compile", *COMPILED_ON_GPU)}
    peer = {("float32", name.removeprefix("original-")) for name in ("original-compile", *COMPILED_ON_GPU)}
    assert settings == {
        (model, batch, *rest)
        for batch in (1, 2)
        for model, kinds in (("cmt_ti", ours), ("test_vit", peer))
        for rest in kinds
    }
    assert all(row["median_ms"] > 0 and not row["note"] for row in rows)
    modes = [options["mode"] or "default" for options in compiled]
    assert {mode: modes.count(mode) for mode in modes} == {"default": 8, "reduce-overhead": 8, "max-autotune": 8}
    printed = capsys.readouterr().out
    assert code == 1, "a CPU misses the goals of a GPU"
    for goal in goals.GOALS:
        assert f"{goal.what}: " in printed
    assert "not measured" not in printed


def row(provider, ms, dtype="float32", model="cmt_s", batch=256):
    return dict(model=model, batch=batch, dtype=dtype, provider=provider, median_ms=ms, ratio=None, note="")


def test_goals(goals, monkeypatch):
    monkeypatch.setattr(goals, "PEER", importlib.import_module("benchmarks.report.peers").PEERS[0])
    large = [
        row("optimize", 10.0),
        row("original", 60.0),
        row("original-compile", 40.0),
        row("original-compile-max-autotune-channels-last", 36.0),
        row("original-compile-reduce-overhead", None),
        row("optimize", 10.5, "autocast-bfloat16"),
        row("original", 63.0, "autocast-bfloat16"),
        row("compile", 12.0, model="deit_small_patch16_224"),
        row("compile-max-autotune", 11.0, model="deit_small_patch16_224"),
    ]
    values = {goal.what: (goal.value(large), goal.met(goal.value(large))) for goal in goals.GOALS}
    assert values == {
        "images a second": (25_600, True),
        "milliseconds": (10.0, False),
        "over torch.compile at its best": (3.6, True),
        "over the original's order in eager autocast": (6.0, True),
        "over DeiT-S compiled at its best": (1.1, True),
    }
    assert all(goal.value([]) is None and not goal.met(None) for goal in goals.GOALS if goal.what != "images a second")


def test_a_wrong_result_or_a_missing_one_fails(goals, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        goals, "measure", lambda *_: iter([row("optimize", 0.1) | dict(note="wrong: output"), row("compile", None)])
    )
    assert goals.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "over torch.compile at its best: - (at least 3.5): not measured" in capsys.readouterr().out


def test_training_is_measured_and_judged(goals, compiled, tmp_path, capsys):
    """Two plain runs on a CPU: ``auto`` takes its kernel for the local perception unit, where there is one."""
    arguments = ["--mode", "training", "--quick", "--device", "cpu", "--seconds", "0.001", "--out", str(tmp_path)]
    assert goals.main(arguments) == 1, "a CPU misses the goals of a GPU, and has no peak memory"
    (path,) = tmp_path.rglob("*-goals-*.json")
    *rows, curves = json.loads(path.read_text())["rows"]
    assert [row["provider"] for row in rows] == ["original", "auto", "original-compile", "compile"]
    assert all(row["median_ms"] > 0 and not row["note"] and row["mode"] == "training" for row in rows)
    assert [len(curve) for curve in curves["curves"].values()] == [3, 3, 3]
    printed = capsys.readouterr().out
    assert "steps repeat bit for bit: 1 (at least 1): met" in printed
    assert "peak memory beside the original's: - (at most 0.4): not measured" in printed
    assert "over torch.compile at its best: " in printed and "loss curve beside plain runs: " in printed


def test_goals_of_training(goals):
    training = importlib.import_module("benchmarks.goals_training")
    rows = [
        row(name, ms) | dict(peak_mib=mib) for name, ms, mib in (("original", 100.0, 1000.0), ("auto", 20.0, 500.0))
    ]
    found = training.values([*rows, row("compile", 60.0) | dict(peak_mib=800.0)])
    assert found == {training.OVER_EAGER: 5.0, training.OVER_COMPILED: 3.0, training.MEMORY: 0.5}
    met = [met for _, met in training.verdicts(found | {training.REPEATS: 1.0, training.CURVE: 3.5})]
    assert met == [True, True, False, True, False]
    assert not any(met for _, met in training.verdicts(training.values([])))
