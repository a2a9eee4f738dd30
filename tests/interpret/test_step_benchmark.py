"""The benchmark of the kernels of packed steps, tried where no GPU is: every provider is verified, timed and written."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from cmt_fast.testing.shapes import StageShape

ROOT = Path(__file__).parents[2]


@pytest.fixture
def steps(monkeypatch):
    """The module of ``benchmarks/``, which is not part of the package."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.kernels")


def run(steps, tmp_path, *options):
    tiny = ["--quick", "--device", "cpu", "--batch", "1", "--dtype", "float16", "--seconds", "0.001"]
    providers = [option for name in ("torch", "triton", "copy") for option in ("--provider", name)]
    code = steps.main([*tiny, *providers, "--step", "lpu", "--out", str(tmp_path), *options])
    (path,) = tmp_path.rglob("*.json")
    return code, {(row["shape"], row["provider"]): row for row in json.loads(path.read_text())["rows"]}


def test_every_stage_is_timed_beside_a_copy(steps, tmp_path):
    code, rows = run(steps, tmp_path)
    assert code == 0 and len(rows) == 4 * 3
    for (_, provider), row in rows.items():
        assert row["median_us"] > 0 and not row["note"]
        assert (row["of_copy"] == 1) == (provider == "copy")
    # x and y, the reduced map, and the float32 parameters
    parameters = 4 * 64 * (9 + 1 + 64)
    assert rows["cmt_s/a (1, 16, 16, 64)", "triton"]["bytes"] == 2 * 64 * (2 * 16 * 16 + 2 * 2) + parameters


def test_a_wrong_kernel_gets_no_time(steps, tmp_path, monkeypatch, capsys):
    def doubled(step, x):
        y, reduced = steps.TORCH.lpu(step, x)
        return y, 2 * reduced

    monkeypatch.setattr(steps, "TRITON", type(steps.TORCH)(lpu=doubled))
    code, rows = run(steps, tmp_path)
    assert code == 1
    for (_, provider), row in rows.items():
        assert (row["median_us"] is None) == row["note"].startswith("wrong output 1") == (provider == "triton")
    assert "wrong output 1" in capsys.readouterr().out


@pytest.mark.parametrize("step", ["stem", "patch_embed"])
def test_the_steps_before_the_blocks(steps, step):
    inputs = StageShape("tiny/a", 1, 2, 2, 16, 1, 0, 2, in_dim=8), torch.float16, torch.device("cpu")
    providers = ("torch", "triton", "copy")
    rows = {
        row["provider"]: row
        for row in steps.measure_step(steps.STEPS[step](*inputs), None, providers, inputs[2], 0.001)
    }
    assert all(row["median_us"] > 0 and not row["note"] for row in rows.values())
    image, map_, tokens, embedding = 3 * 8 * 8, 4 * 4 * 8, 2 * 2 * 16, 2 * 16 * 4 * 8 + 4 * 3 * 16
    stem = 2 * (image + 8 * 9 * (3 + 8 + 8)) + 4 * 7 * 8
    assert rows["triton"]["bytes"] == 2 * tokens + embedding + (stem if step == "stem" else 2 * map_)


def test_stem_and_head_stand_in_one_stage(steps):
    for stage in "abcd":
        shape = StageShape(f"tiny/{stage}", 1, 2, 2, 16, 1, 0, 2, in_dim=8)
        assert steps.runs_in("lpu", shape)
        assert steps.runs_in("stem", shape) == (not steps.runs_in("patch_embed", shape)) == (stage == "a")
        assert steps.runs_in("head", shape) == (stage == "d")


@pytest.mark.parametrize("stage", ["a", "c"])
def test_attention_beside_the_chain_that_it_replaces(steps, stage):
    inputs = StageShape(f"tiny/{stage}", 2, 4, 4, 16, 2, 0, 2), torch.float16, torch.device("cpu")
    call, chain = steps.STEPS["attention"](*inputs), steps.CHAINS["attention"](*inputs)
    providers = ("torch", "chain", "triton", "copy")
    rows = {row["provider"]: row for row in steps.measure_step(call, chain, providers, inputs[2], 0.001)}
    assert tuple(rows) == providers
    assert all(row["median_us"] > 0 and not row["note"] for row in rows.values())
    assert rows["chain"]["over_chain"] == 1 and rows["triton"]["over_chain"] > 0
    widths = 4 * 16 + 8 if stage == "a" else 2 * 2 * 16  # of keys and values; two heads of 8, padded to 16
    parameters = 4 * 16 if stage == "a" else 2 * 2 * 16 * 32 + 4 * (32 + 16)
    assert rows["triton"]["bytes"] == 2 * (2 * 2 * 16 * 16 + 2 * 4 * widths + 2 * 16 * 4) + parameters


def test_the_irffn_beside_its_chain(steps):
    inputs = StageShape("tiny/a", 2, 3, 4, 16, 1, 32, 1), torch.float16, torch.device("cpu")
    providers = ("torch", "chain", "triton", "copy")
    for step, vectors in (("expand", 3 * 32), ("depthwise_project", (9 + 1) * 32 + 16)):
        call, chain = steps.STEPS[step](*inputs), steps.CHAINS[step](*inputs) if step in steps.CHAINS else None
        rows = {row["provider"]: row for row in steps.measure_step(call, chain, providers, inputs[2], 0.001)}
        assert all(row["median_us"] > 0 and not row["note"] for row in rows.values())
        assert ("chain" in rows) == (step == "depthwise_project")
        maps = 2 * 3 * 4 * (16 + 32 + (16 if step == "depthwise_project" else 0))
        assert rows["triton"]["bytes"] == 2 * (maps + 16 * 32) + 4 * vectors


def test_a_wrong_chain_gets_no_time(steps, monkeypatch):
    right = steps.F.scaled_dot_product_attention
    monkeypatch.setattr(
        steps.F, "scaled_dot_product_attention", lambda q, k, v, *_, **options: right(q, k, v, **options)
    )
    inputs = StageShape("tiny/c", 1, 2, 2, 16, 2, 0, 1), torch.float16, torch.device("cpu")
    chain = steps.CHAINS["attention"](*inputs)
    assert steps.wrong(chain.call, chain()).startswith("wrong output 0")
