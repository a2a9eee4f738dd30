"""How right it is: every backend against float64, beside PyTorch's own error; and the tests that need this device."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report.measurement import Measurement, Unavailable
from benchmarks.report.settings import Settings
from cmt_fast.backend import BACKENDS, machine_reasons
from cmt_fast.testing.packed_cases import PACKED_OPS
from cmt_fast.testing.verification import OPS, verify

#: Of a CPU: tests of what is timed here, which take less than a minute each.
CPU_TESTS = ("tests/ops/test_depthwise_native.py", "tests/models/test_golden.py")
_COUNTS = re.compile(r"(\d+) (passed|failed|error|skipped)")


def plan(settings: Settings) -> Iterator[Measurement]:
    """A measurement an operation and dtype; whole models last."""
    backends = [name for name in BACKENDS if not machine_reasons(name)]
    dtypes = ("float32", "bfloat16", "autocast-bfloat16") if settings.gpu else ("float32",)
    for dtype in dtypes:
        for op in OPS[:2] if settings.quick else OPS:
            if op in PACKED_OPS and dtype.startswith("autocast"):
                continue  # packed models have dtypes of their own
            yield Measurement(
                f"{op} {dtype}", partial(_rows, settings, op, dtype, backends), 0.0 if settings.quick else 10.0
            )


def _rows(settings: Settings, op: str, dtype: str, backends: list[str]) -> Iterator[dict[str, Any]]:
    """The worst check of each backend, in units of what the policy allows."""
    checks = verify(backends, [op], [dtype], settings.device, quick=True)
    for backend in backends:
        mine = [check for check in checks if check.backend == backend]
        judged = [check for check in mine if check.passed is not None]
        worst = max(judged, key=lambda check: (not check.passed, check.ratio), default=None)
        yield dict(
            op=op,
            provider=backend,
            dtype=dtype,
            mode="accuracy",
            checks=len(judged),
            failed=sum(not check.passed for check in judged),
            error=worst and worst.error,
            own_error=worst and worst.own_error,
            of_allowed=worst and worst.ratio,
            note=f"{worst.case}, {worst.quantity}" if worst else next((check.detail for check in mine), ""),
        )


def tests_plan(settings: Settings) -> Iterator[Measurement]:
    """File by file: on a GPU those with tests marked ``gpu``."""
    if not (settings.root / "tests").is_dir():
        raise Unavailable("there are no tests here: run it from a checkout")
    files = _gpu_files(settings.root) if settings.gpu else CPU_TESTS[1:] if settings.quick else CPU_TESTS
    for file in files:
        yield Measurement(file, partial(_test_rows, settings, file), 0.0 if settings.quick else 40.0)


def _gpu_files(root: Path) -> list[str]:
    files = sorted(
        path for path in (root / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")
    )
    return [str(path.relative_to(root)) for path in files]


def _test_rows(settings: Settings, file: str) -> Iterator[dict[str, Any]]:
    """One row: how many tests passed. A failure is a row with its last lines, not a failed measurement."""
    command = [sys.executable, "-m", "pytest", "-q", "-x" if settings.quick else "-q", file]
    if settings.gpu:
        command += ["-m", "gpu"]
    done = subprocess.run(command, cwd=settings.root, capture_output=True, text=True, timeout=1800)
    counts = {name: int(count) for count, name in _COUNTS.findall(done.stdout.splitlines()[-1] if done.stdout else "")}
    if done.returncode and not counts:
        raise RuntimeError((done.stdout + done.stderr).strip().splitlines()[-1])
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    yield dict(
        op=file,
        provider="pytest",
        mode="tests",
        passed=counts.get("passed", 0),
        failed=counts.get("failed", 0) + counts.get("error", 0),
        skipped=counts.get("skipped", 0),
        note="; ".join(failures[:5]),
    )
