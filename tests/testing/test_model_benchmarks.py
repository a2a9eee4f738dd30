"""The benchmarks of whole models and of packed steps: files that go on where they were, tables of the files alone."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from cmt_fast.backend import machine_reasons
from cmt_fast.inference import pack
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.models.cmt import CMT
from cmt_fast.testing.fresh import Fresh
from cmt_fast.testing.shapes import SMALL_MODELS

ROOT = Path(__file__).parents[2]


def module(monkeypatch, name):
    """A module of ``benchmarks/``, which is not part of the package."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def models(monkeypatch):
    found = module(monkeypatch, "models")
    monkeypatch.setattr(found, "measure_fresh", lambda *_, **__: Fresh(ready_s=1.5, kept_mib=-2.0, peak_mib=30.0))
    return found


def run_models(models, tmp_path, *options):
    quick = [
        "--quick",
        "--variant",
        "cmt_ti",
        "--batch",
        "1",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--seconds",
        "0.01",
    ]
    code = models.main([*quick, "--out", str(tmp_path), *options])
    (path,) = tmp_path.rglob("*.json")
    return code, path, {row["provider"]: row for row in json.loads(path.read_text())["rows"]}


def test_a_run_goes_on_where_it_was(models, tmp_path):
    both = ["--provider", "original", "optimize"]
    code, path, timed = run_models(models, tmp_path, *both, "--no-fresh")
    assert code == 0 and path.stem.endswith("-models-1threads")
    assert timed["original"]["ratio"] == 1.0 and timed["optimize"]["ready_s"] is None
    _, _, complete = run_models(models, tmp_path, *both)
    for provider, row in timed.items():
        assert complete[provider] == row | dict(ready_s=1.5, kept_mib=-2.0, peak_mib=30.0), "timed again"
    _, _, again = run_models(models, tmp_path, *both, "--again", "--no-fresh")
    assert again["original"]["median_ms"] != timed["original"]["median_ms"]


def test_nothing_starts_after_the_budget(models, tmp_path, capsys):
    run_models(models, tmp_path, "--provider", "original", "--no-fresh")
    _, _, rows = run_models(models, tmp_path, "--provider", "original", "reference", "--budget", "0")
    assert list(rows) == ["original"] and rows["original"]["ready_s"] is None
    assert "the same command goes on" in capsys.readouterr().out


def row(provider, median, ratio, **more):
    first = dict(model="cmt_s", provider=provider, batch=8, dtype="float32", mode="inference", img_size=224)
    return first | dict(median_ms=median, ratio=ratio, peak_mib=None, kept_mib=None, ready_s=None, note="") | more


DATA = {
    "machine": dict(cpu="a CPU", cores=2, threads=1, simd="AVX2", torch="2", cmt_fast="0", commit="c0ffee"),
    "rows": [
        row("original", 120.4, 1.0, peak_mib=100.0, ready_s=0.5, kept_mib=3.0),
        row("optimize", 60.2, 2.0, peak_mib=40.0, ready_s=2.25, kept_mib=-1.0),
        row("reference", 150.0, 0.8),
        row("onnxruntime", None, None, note="ImportError: not installed"),
    ],
}


def test_the_tables_hold_every_row_of_the_file(monkeypatch):
    text = module(monkeypatch, "table").tables(DATA, "results/file.json")
    assert "a CPU, 2 cores, 1 threads, AVX2; torch 2, cmt_fast 0 at c0ffee" in text and "`results/file.json`" in text
    times, ready, peak, kept = text.split(":\n\n")[1:]
    assert "| provider | cmt_s at 224, batch 8 |" in times and "float32" in text
    assert "| `original` | 120 |\n| `reference` | 150 (0.80x) |\n| `optimize` | 60.2 (2.00x) |" in times
    assert "| `original` | 0.5 |\n| `optimize` | 2.2 |" in ready
    assert "| `original` | 100 |\n| `optimize` | 40 (0.40x) |" in peak
    assert "| `original` | 3 |\n| `optimize` | -1 |" in kept
    assert "No time: cmt_s at 224, batch 8, `onnxruntime`: ImportError: not installed." in text


def test_settings_of_two_precisions_are_two_columns(monkeypatch):
    low = row("original", 90.0, 1.0) | dict(dtype="bfloat16")
    table = module(monkeypatch, "table")
    text = table.tables(DATA | {"rows": [*DATA["rows"], low]}, "results/file.json")
    assert "| provider | cmt_s at 224, batch 8, float32 | cmt_s at 224, batch 8, bfloat16 |" in text
    assert "| `optimize` | 60.2 (2.00x) | - |" in text
    with pytest.raises(ValueError, match="no rows of whole models"):
        table.tables(DATA, "results/file.json", ["cmt_b"])


def test_other_networks_and_their_figure(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    peers = [
        dict(section="peers", model=name, img_size=224, batch=1, provider=provider, dtype="float32", mode="inference")
        | dict(images_per_s=speed, ratio=speed / 10, top1=top1, source="a paper")
        for name, provider, speed, top1 in (
            ("deit_small_patch16_224", "eager", 10.0, 79.8),
            ("vit_small_patch16_224", "eager", 9.5, None),
            ("cmt_s", "original", 8.0, 83.5),
            ("cmt_s", "optimize", 16.0, 83.5),
        )
    ]
    results, page = tmp_path / "results.json", tmp_path / "PAGE.md"
    results.write_text(json.dumps(DATA | {"rows": [*DATA["rows"], *peers]}))
    table = module(monkeypatch, "table")
    page.write_text(f"{table.BEGIN}\n{table.END}\n")
    assert table.main([str(results), "--write", str(page)]) == 0
    text = page.read_text()
    assert "| `cmt_s` | optimize | 224 | 83.5 | 16.0 | 1.60x |\n| `deit_small" in text, "the fastest first"
    assert "| `vit_small_patch16_224` | eager | 224 | - | 9.5 | 0.95x |" in text
    assert "(docs/figures/accuracy.png)" in text and (tmp_path / "docs/figures/accuracy.png").exists()


def test_the_readme_holds_what_its_result_file_says(monkeypatch):
    table = module(monkeypatch, "table")
    _, _, rest = (ROOT / "README.md").read_text().partition(f"{table.BEGIN}\n")
    block, _, _ = rest.partition(table.END)
    (path,) = re.findall(r"File: `(benchmarks/results/\S+\.json)`", block)
    data = module(monkeypatch, "store").load(ROOT / path)
    expected = table.tables(data, path, ["cmt_s"], list(table.SHOWN))
    assert block == expected, f"python -m benchmarks.table {path} --model cmt_s --write README.md"
    assert all((ROOT / table.IMAGES / f"{name}.png").exists() for name in table.SHOWN)


def test_the_tables_go_between_the_markers(monkeypatch, tmp_path):
    table = module(monkeypatch, "table")
    results, readme = tmp_path / "results.json", tmp_path / "README.md"
    results.write_text(json.dumps(DATA))
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    assert table.main([str(results), "--write", str(readme)]) == 0
    written = readme.read_text()
    assert written.startswith(f"before\n{table.BEGIN}\nMachine: a CPU")
    assert written.endswith(f"\n{table.END}\nafter\n") and "old" not in written
    readme.write_text("no markers")
    with pytest.raises(ValueError, match=r"README\.md has no lines"):
        table.main([str(results), "--write", str(readme)])


def test_a_file_of_operations_has_no_such_tables(monkeypatch):
    with pytest.raises(ValueError, match="no rows of whole models"):
        module(monkeypatch, "table").tables({"machine": {}, "rows": [dict(op="lpu")]}, "ops.json")


def test_a_plot_of_whole_models(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "ratios.png"
    module(monkeypatch, "plot").plot(DATA, path)
    assert path.read_bytes().startswith(b"\x89PNG")


# ---- packed steps ----------------------------------------------------------------------------------------------------------


def record(steps):
    torch.manual_seed(0)
    packed = pack(CMT(**SMALL_MODELS["aligned"]))
    return packed, steps.record_calls(packed, TORCH, torch.randn(2, 3, 64, 64))


def test_every_step_is_recorded_in_all_blocks_of_its_stage(monkeypatch):
    steps = module(monkeypatch, "steps")
    packed, calls = record(steps)
    assert set(calls) == {("stem", "a"), ("head", "d")} | {
        (name, stage) for name in set(steps.STEPS) - {"stem", "head"} for stage in "abcd"
    }
    for stage, packed_stage in zip("abcd", packed.stages):
        assert [call.arguments[0] for call in calls["lpu", stage]] == [block.lpu for block in packed_stage.blocks]
    attention = calls["attention", "b"][0]
    assert attention.own == (True, True, False, False, True), "its data, that of K/V, two maps, the table"
    assert attention.arguments[-1].shape == packed.stages[1].table.shape


def test_bytes_and_operations_of_a_step(monkeypatch):
    steps = module(monkeypatch, "steps")
    packed, calls = record(steps)
    project, step = calls["depthwise_project", "a"][0], packed.stages[0].blocks[0].depthwise_project
    (channels, hidden), pixels = step.weight.shape, 2 * 16 * 16
    weights = step.taps.numel() + step.bias.numel() + step.weight.numel() + step.out_bias.numel()
    assert project.bytes() == 4 * (weights + pixels * (hidden + 2 * channels))
    assert project.flops() == 2 * pixels * hidden * (9 + channels)


def test_blocks_run_in_turn(monkeypatch):
    """One block's weights would stay in a cache, as they do not inside the model."""
    step = module(monkeypatch, "steps").in_turn([lambda: "first", lambda: "second"])
    assert [step() for _ in range(3)] == ["first", "second", "first"]


def test_a_wrong_step_gets_no_time(monkeypatch):
    steps = module(monkeypatch, "steps")

    def wrong(packed):
        return packed, steps.StepFunctions(kv=lambda step, x: 1.01 * TORCH.kv(step, x))

    monkeypatch.setitem(steps.PROVIDERS, "native", wrong)
    providers = ["reference", "native"]
    rows = list(steps.measure_steps("cmt_ti", 1, "float32", providers, ["kv", "lpu"], 0.001, 64))
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        if (row["op"], row["provider"]) == ("packed kv", "native"):
            assert row["median_us"] is None and row["note"].startswith("wrong: output 0 FAILED")
        else:
            assert row["gb_s"] > 0 and row["ratio"] > 0 and not row["note"]


def test_every_step_of_the_compiled_library_is_timed(monkeypatch):
    """On the maps of the plain program, whose hidden map has no room between its pixels."""
    steps = module(monkeypatch, "steps")
    if machine_reasons("native"):
        pytest.skip("; ".join(machine_reasons("native")))
    rows = list(steps.measure_steps("cmt_ti", 1, "float32", ["reference", "native"], steps.STEPS, 0.001, 64))
    assert {row["op"] for row in rows} == {f"packed {step}" for step in steps.STEPS}
    assert not [row["note"] for row in rows if row["note"]]
