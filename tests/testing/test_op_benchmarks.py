"""The benchmarks of operations: every variant has its cases, a wrong operation gets no time, files hold what was measured."""

import importlib
import json
from pathlib import Path

import pytest

import cmt_fast.ops.lpu.api as lpu_api
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.shapes import stage_shapes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules of ``benchmarks/``, which is not part of the package."""
    monkeypatch.syspath_prepend(ROOT)
    return {name: importlib.import_module(f"benchmarks.{name}") for name in ("registry", "run", "store", "plot")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_operation_has_a_case_at_every_stage(benchmarks, variant):
    shapes = stage_shapes(variant)
    for op in benchmarks["registry"].OPS.values():
        cases = [op.make_case(shape) for shape in shapes]
        assert [case is None for case in cases] == [False] * 3 + [op.name == "depthwise_reduce"], op.name
    hidden = benchmarks["registry"].OPS["depthwise_conv3x3_hidden"].make_case(shapes[0])
    assert hidden.input_shapes["x"][-1] == shapes[0].hidden


def run_lpu(benchmarks, tmp_path, *options):
    code = benchmarks["run"].main(
        ["--quick", "--op", "lpu", "--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path), *options]
    )
    (path,) = tmp_path.rglob("*.json")
    return code, path, json.loads(path.read_text())


def test_a_run_writes_every_row_with_its_machine(benchmarks, tmp_path):
    code, path, data = run_lpu(benchmarks, tmp_path, "--provider", "reference", "--provider", "triton")
    assert code == 0
    assert data["machine"]["cpu"] and path.parent.name == benchmarks["store"].slug(data["machine"]["cpu"])
    rows = {(row["mode"], row["provider"]): row for row in data["rows"]}
    assert len(rows) == 4
    assert rows["inference", "reference"]["ratio"] == rows["training", "reference"]["ratio"] == 1.0
    triton = rows["inference", "triton"]
    assert triton["median_us"] is not None or triton["note"], "no number without a reason"
    _, _, again = run_lpu(benchmarks, tmp_path, "--provider", "reference", "--mode", "training")
    assert len(again["rows"]) == 4, "a row measured again replaces the older one"


def test_a_wrong_operation_gets_no_time(benchmarks, tmp_path, monkeypatch):
    right, calls = lpu_api.lpu_reference, []

    def wrong_when_judged(x, conv):
        calls.append(1)
        return right(x, conv) * (1.01 if len(calls) > 2 else 1)  # the exact and the plain run come first

    monkeypatch.setattr(lpu_api, "lpu_reference", wrong_when_judged)
    code, _, data = run_lpu(benchmarks, tmp_path, "--provider", "reference", "--mode", "inference")
    assert code == 1
    (row,) = data["rows"]
    assert row["median_us"] is None and row["note"].startswith("wrong output: worst at")


def test_a_plot_of_ratios(benchmarks, tmp_path):
    pytest.importorskip("matplotlib")
    row = dict(op="lpu", shape="s/a", dtype="float32", mode="inference", median_us=1.0, note="")
    data = {"machine": {"cpu": "a CPU", "torch": "2"}, "rows": [row | dict(provider="native", ratio=1.5)]}
    path = tmp_path / "ratios.png"
    benchmarks["plot"].plot(data, path)
    assert path.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="no ratios for mode training"):
        benchmarks["plot"].plot(data, path, mode="training")


@pytest.mark.parametrize("content", ["not json", "[]", '{"rows": []}'])
def test_other_files_are_refused(benchmarks, tmp_path, content):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"file\.json is not a result file"):
        benchmarks["store"].load(path)


def test_device_names_become_folders(benchmarks):
    slug = benchmarks["store"].slug
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("Intel(R) Xeon(R) Processor") == "intel-xeon-processor"
