"""What every test gets: a seed, poisoned memory, its own backend setting; and GPU tests that skip with a reason."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import cmt_fast
from cmt_fast.backend import get_backend, interpreting, set_backend
from cmt_fast.testing.poison import poisoned_empty

# What commands print has room for a temporary folder's name, whatever terminal the tests run in.
os.environ["COLUMNS"] = "250"
# The tensors of tests are tiny: threads only cost time, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _import_kernels() -> None:
    """Without a GPU kernels are interpreted, and so is the part of Triton's language that is written in itself: both are settled when they are imported,
    so this comes before any test that imports Triton."""
    package = Path(cmt_fast.__file__).parent
    files = sorted([*package.glob("ops/_triton/*.py"), *package.glob("ops/*/triton_*kernels.py")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for file in files:
            importlib.import_module(f"cmt_fast.ops.{file.parent.name}.{file.stem}")


if find_spec("triton") is not None and (interpreting() or not torch.cuda.is_available()):
    _import_kernels()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        packages = {name for mark in item.iter_markers("needs") for name in mark.args}
        if missing := sorted(name for name in packages if find_spec(name) is None):
            item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)}, not installed here"))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and none is visible")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def poison():
    """Memory that cmt_fast allocates and does not write is NaN."""
    with poisoned_empty():
        yield


@pytest.fixture(autouse=True)
def backend_setting():
    """A test that sets the backend does not change it for others."""
    before = get_backend()
    yield
    set_backend(before)
