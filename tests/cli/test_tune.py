"""``cmt-fast tune``: which table it goes on with, what it says and writes, and its errors. A made-up GPU and search stand in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cmt_fast.cli import tune as command
from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.tunable import read_tables_again
from cmt_fast.ops._triton.tuned_tables import Table, empty_table, find_tables, read_table
from cmt_fast.testing.results import write_json
from cmt_fast.tuning.search import Row

LIMITS = DeviceLimits(90, 232448, 132, "Test GPU")
KERNEL = "cmt_fast.ops.lpu.triton_kernels:lpu_kernel"
RULE, BEST = {"pairs": 2, "num_warps": 4}, {"pairs": 4, "num_warps": 4}
BETTER = Row("lpu", "cmt_s/a (1, 56, 56, 64)", "bfloat16", KERNEL, "images=1", RULE, BEST, 20.0, 10.0, 12, 1)
SAME = Row("lpu", "cmt_s/b (1, 28, 28, 128)", "bfloat16", KERNEL, "images=2", RULE, RULE, 20.0, 20.0, 12, earlier=True)
FAILED = Row("attention", "cmt_s/c (1, 14, 14, 256)", "bfloat16", note="RuntimeError: no [memory] left")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The folder of its tables. ``found`` is what the search finds, ``calls`` what it was asked for."""
    monkeypatch.setenv("CMT_FAST_TUNING", str(tmp_path / "tables"))
    monkeypatch.setattr(command, "find_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(command, "device_limits", lambda device: LIMITS)
    monkeypatch.setattr(command, "machine", lambda device: {"gpu": LIMITS.name})
    read_tables_again()
    yield tmp_path / "tables"
    read_tables_again()


@pytest.fixture
def search(monkeypatch):
    found, calls = [BETTER, SAME], []

    def fake(steps, shapes, dtypes, device, table: Table, **options):
        calls.append(dict(steps=steps, shapes=shapes, dtypes=dtypes, table=table, **options))
        for row in found:
            if not row.note:
                table.add(row.kernel, row.key, {"config": row.best})
                write_json(table.path, table.data)
            options["on_row"](row)

    monkeypatch.setattr(command, "search", fake)
    return found, calls


def test_a_table_is_written_and_shown(gpu, search, cmt_fast, tmp_path):
    code, out, _ = cmt_fast("tune", "--json", tmp_path / "rows.json")
    assert code == 0
    assert f"Test GPU -> {gpu / 'Test_GPU.json'}" in out
    assert "2 launches, 1 faster than by the rule (2.00 times on average); in" in out
    better, same = (next(line for line in out.splitlines() if stage in line) for stage in ("cmt_s/a", "cmt_s/b"))
    assert "20.0" in better and "10.0" in better and "2.00" in better and "12 + 1 failed" in better
    assert "pairs=4 (rule 2) num_warps=4" in better
    assert "earlier" in same and "rule: pairs=2 num_warps=4" in same
    written = read_table(gpu / "Test_GPU.json", LIMITS)
    assert written.launches() == 2 and written.data["machine"] == {"gpu": "Test GPU"}
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows["machine"] == {"gpu": "Test GPU"} and [row["ratio"] for row in rows["rows"]] == [2.0, 1.0]
    (call,) = search[1]
    assert call["steps"] == list(command.STEPS) and call["dtypes"] == [torch.bfloat16] and call["write"]
    assert [shape.batch for shape in call["shapes"]] == [1] * 4 + [256] * 4 and call["most"] is None


def test_it_goes_on_with_what_there_is(gpu, search, cmt_fast):
    assert cmt_fast("tune", "--quick")[0] == 0
    code, out, _ = cmt_fast("tune", "--again", "--model", "cmt_ti", "--img-size", 64, "--batch", 2, "--step", "lpu")
    assert code == 0 and "2 launches known" in out
    first, second = search[1]
    assert (first["most"], first["seconds"]) == command.QUICK and not first["again"]
    assert second["again"] and second["table"].launches() == 2 and second["steps"] == ["lpu"]
    assert [shape.height for shape in second["shapes"]] == [16, 8, 4, 2] and second["shapes"][0].batch == 2


@pytest.mark.parametrize(
    ("content", "why"),
    [("{", "cannot be read"), ({"triton": "2.1.0"}, "was measured with triton 2.1.0, and this is triton")],
)
def test_a_table_that_does_not_hold_is_started_afresh(gpu, search, cmt_fast, content, why):
    gpu.mkdir()
    path = gpu / "Test_GPU.json"
    path.write_text(content if isinstance(content, str) else json.dumps(empty_table(path, LIMITS).data | content))
    code, out, _ = cmt_fast("tune")
    assert code == 0 and f"Starting afresh: {path} " in out and why in out
    assert read_table(path, LIMITS).launches() == 2


def test_another_gpus_table_is_not_overwritten(gpu, search, cmt_fast, tmp_path):
    path = tmp_path / "other.json"
    write_json(path, empty_table(path, DeviceLimits(80, 1, 1, "Other GPU")).data)
    before = path.read_text()
    code, _, err = cmt_fast("tune", "--output", path)
    assert code == 2 and "was measured with device Other GPU, and this is device Test GPU: choose another file" in err
    assert path.read_text() == before and not search[1]


def test_output_names_a_file(gpu, search, cmt_fast, tmp_path):
    assert cmt_fast("tune", "--output", tmp_path / "mine.json")[0] == 0
    assert read_table(tmp_path / "mine.json", LIMITS).launches() == 2 and not gpu.exists()
    code, _, err = cmt_fast("tune", "--output", tmp_path / "missing" / "mine.json")
    assert code == 2 and "missing does not exist: create it first" in err


def test_what_could_not_run_is_said_and_exits_1(gpu, search, cmt_fast):
    search[0].append(FAILED)
    code, out, _ = cmt_fast("tune")
    assert code == 1 and "attention cmt_s/c (1, 14, 14, 256) bfloat16: RuntimeError: no [memory] left" in out


def test_interrupted(gpu, search, cmt_fast, monkeypatch):
    fake = command.search

    def stopped(*args, **options):
        fake(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "search", stopped)
    code, out, _ = cmt_fast("tune")
    assert code == 130 and "Interrupted. 2 launches" in out and "and the same command goes on" in out
    assert read_table(gpu / "Test_GPU.json", LIMITS).launches() == 2


def test_tables_switched_off(gpu, cmt_fast, monkeypatch):
    monkeypatch.setenv("CMT_FAST_TUNING", "off")
    code, _, err = cmt_fast("tune")
    assert code == 2 and "CMT_FAST_TUNING is off, so no table would be used" in err
    code, out, _ = cmt_fast("tune", "--check")
    assert code == 0 and "CMT_FAST_TUNING is off: no table is used." in out


def test_check(gpu, search, cmt_fast):
    code, out, _ = cmt_fast("tune", "--check")
    assert code == 0 and "No table for Test GPU: every kernel follows its rule." in out and str(gpu) in out
    cmt_fast("tune")
    code, out, _ = cmt_fast("tune", "--check")
    assert code == 0 and "Test_GPU.json: 2 launches in use" in out
    path = gpu / "Test_GPU.json"
    data = json.loads(path.read_text())
    data["kernels"][KERNEL]["source"] = "before"
    write_json(path, data)
    code, out, _ = cmt_fast("tune", "--check")
    assert code == 1 and "0 launches in use; measured before these changed, so not used: lpu_kernel" in out
    path.write_text("{")
    code, out, _ = cmt_fast("tune", "--check")
    assert code == 1 and "not used, it cannot be read: Expecting" in out
    assert [table.path for table in find_tables(LIMITS)] == [path] and len(search[1]) == 1


def test_without_a_gpu(cmt_fast, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, _, err = cmt_fast("tune", "--device", "cpu")
    assert code == 2 and "tuning measures a GPU, and this is cpu. A dry run" in err
    assert "TRITON_INTERPRET=1" in err and "tune --device cpu --quick --batch 1 --img-size 32" in err
    code, out, _ = cmt_fast("tune", "--device", "cpu", "--check")
    assert code == 0 and "No table is used on cpu: tables are of GPUs." in out


def test_the_package_ships_what_holds():
    """Every table in the package is one that this version uses."""
    shipped = Path(command.__file__).parents[1] / "tuning" / "tables"
    for path in shipped.glob("*.json"):
        data = json.loads(path.read_text())
        limits = DeviceLimits(data["arch"], data["shared_memory"], data["multiprocessors"], data["device"])
        table = read_table(path, limits)
        assert not (table.problem and "cannot be read" in table.problem) and not table.stale_kernels(), table
