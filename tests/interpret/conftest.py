"""Kernels in Triton's interpreter, on a CPU: right or wrong, not fast.

Whether a kernel is interpreted is settled when it is imported, for the whole process. Without a GPU nothing else needs one, so ``tests/conftest.py``
imports them; on a machine with a GPU other tests need them compiled, and this folder runs alone: TRITON_INTERPRET=1 pytest tests/interpret.
"""

from pathlib import Path

import pytest
import torch

from cmt_fast.backend import interpreting

HERE = Path(__file__).parent
POSSIBLE = interpreting() or not torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(
        reason="kernels are compiled in this process; run TRITON_INTERPRET=1 pytest tests/interpret"
    )
    for item in items:
        if HERE in item.path.parents and not POSSIBLE:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """For these tests alone: others must not find a backend that runs on a CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
