"""The benchmark of attention in training, tried where no GPU is."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def attention(monkeypatch):
    """The module of ``benchmarks/``, which is not part of the package."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.attention")


def run(attention, tmp_path, *providers):
    tiny = ["--quick", "--device", "cpu", "--batch", "1", "--dtype", "float16", "--seconds", "0.001"]
    options = [option for name in providers for option in ("--provider", name)]
    code = attention.main([*tiny, *options, "--out", str(tmp_path)])
    (path,) = tmp_path.rglob("*.json")
    return code, {(row["provider"], row["mode"]): row for row in json.loads(path.read_text())["rows"]}


def test_forward_and_backward_of_every_provider_that_can_run(attention, tmp_path):
    code, rows = run(attention, tmp_path, "eager", "triton", "sdpa-math", "sdpa-cudnn", "xformers")
    assert code == 0 and len(rows) == 5 * 2
    for (provider, _), row in rows.items():
        assert (row["median_us"] is None) == bool(row["note"]) == (provider in ("sdpa-cudnn", "xformers"))
    assert rows["eager", "backward"]["ratio"] == 1 and rows["triton", "forward"]["ratio"] > 0


def test_a_wrong_provider_gets_no_time(attention, tmp_path, monkeypatch):
    right = attention.PROVIDERS["eager"]
    monkeypatch.setitem(attention.PROVIDERS, "flex", lambda q, k, v, bias: right(q, k, v, 0.9 * bias))
    code, rows = run(attention, tmp_path, "eager", "flex")
    assert code == 1 and rows["flex", "forward"]["note"].startswith("wrong out")
    assert rows["flex", "backward"]["median_us"] is None and rows["eager", "backward"]["median_us"] > 0
