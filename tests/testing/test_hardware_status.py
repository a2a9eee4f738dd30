"""The page of what ran on which hardware follows the result files, and only those of a GPU."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PAGE = """# Verified

Intro.

- [ ] LPU kernel: `pytest -m gpu tests/ops/test_lpu_gpu.py`
- [ ] LPU kernel beside a copy:
  `python -m benchmarks.kernels --step lpu --device cuda`, and `--variant cmt_b`
- [ ] LPU kernel, at least 85 % of copy bandwidth: `python -m benchmarks.kernels --step lpu --device cuda`
- [ ] attention, at least three times eager: `python -m benchmarks.attention --device cuda`
- [ ] both: `pytest -m gpu tests/ops/test_lpu_gpu.py`, `python -m benchmarks.run --op lpu --device cuda`
- [ ] stem: `pytest -m gpu tests/ops/test_stem_gpu.py tests/ops/test_lpu_gpu.py` (16 GB)
- [ ] nccl: `torchrun ...`

## CPU
"""
MACHINE = dict(gpu="An H100", date="2026-12-01T10:00:00", commit="c0ffee")
TESTS = dict(op="tests/ops/test_lpu_gpu.py", provider="pytest", passed=48, failed=0)
STEP = dict(op="packed lpu", provider="triton", median_us=10.0, of_copy=0.81, note="")
SEEN = "An H100, 2026-12-01, c0ffee, h100/a.json"


@pytest.fixture
def status(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.hardware_status")


def test_lines_are_closed_by_what_their_commands_make(status):
    new = status.update(PAGE, [("h100/a.json", dict(machine=MACHINE, rows=[TESTS, STEP, STEP | dict(of_copy=0.9)]))])
    assert (
        f"- [x] LPU kernel: `pytest -m gpu tests/ops/test_lpu_gpu.py` (verified on {SEEN}: 48 passed, 0 failed)" in new
    )
    assert f"and `--variant cmt_b` (verified on {SEEN}: 81% to 90% of copy bandwidth)" in new
    assert "- [ ] stem: `pytest" in new, "half of its tests are not in the file"
    assert "- [ ] both:" in new and "- [ ] nccl: `torchrun ...`\n\n## CPU" in new
    assert (
        status.update(new, [("h100/a.json", dict(machine=MACHINE, rows=[TESTS, STEP, STEP | dict(of_copy=0.9)]))])
        == new
    )


def test_a_goal_is_judged_by_a_reader(status):
    core = dict(op="attention in training", provider="triton", median_us=5.0, note="")
    files = [("h100/a.json", dict(machine=MACHINE, rows=[STEP, core]))]
    new = status.update(PAGE, files)
    goal = "LPU kernel, at least 85 % of copy bandwidth: `python -m benchmarks.kernels --step lpu --device cuda`"
    measured = f"(measured on {SEEN}: 81% to 81% of copy bandwidth)"
    assert f"- [ ] {goal} {measured}" in new, "81 is not 85: a file does not close it"
    assert f"`python -m benchmarks.attention --device cuda` (measured on {SEEN}: 1 times)" in new
    closed = new.replace(f"- [ ] {goal}", f"- [x] {goal}")
    assert status.update(closed, files) == closed, "what a reader closed stays closed"
    wrong = [("h100/b.json", dict(machine=MACHINE, rows=[STEP | dict(median_us=None, note="wrong output")]))]
    assert f"- [ ] {goal} (failed on" in status.update(closed, wrong)


def test_a_failure_opens_a_line_again(status):
    good = ("h100/a.json", dict(machine=MACHINE, rows=[TESTS]))
    bad = ("h100/b.json", dict(machine=MACHINE | dict(commit="bad"), rows=[TESTS | dict(failed=2)]))
    page = status.update(status.update(PAGE, [good]), [good, bad])
    assert (
        "- [ ] LPU kernel: `pytest -m gpu tests/ops/test_lpu_gpu.py` (failed on An H100, 2026-12-01, bad, h100/b.json: 48 passed, 2 failed)"
        in page
    )
    wrong = STEP | dict(median_us=None, note="wrong output")
    assert "(failed on An H100, 2026-12-01, c0ffee, h100/a.json: wrong output)" in status.update(
        PAGE, [("h100/a.json", dict(machine=MACHINE, rows=[wrong]))]
    )


def test_a_cpu_proves_nothing(status):
    facts = {name: value for name, value in MACHINE.items() if name != "gpu"} | dict(cpu="a CPU")
    assert status.update(PAGE, [("cpu/a.json", dict(machine=facts, rows=[TESTS, STEP]))]) == PAGE


def test_the_page_is_up_to_date(status):
    assert status.main([]) == 0
