"""Kernels in Triton's interpreter, on a CPU: right or wrong, not fast.

Whether a kernel is interpreted is settled when it is imported, for the whole process. Without a GPU nothing else needs one, so ``tests/conftest.py``
imports them; on a machine with a GPU other tests need them compiled, and this folder runs alone: TRITON_INTERPRET=1 pytest tests/interpret.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cmt_fast.backend import interpreting
from cmt_fast.ops._triton.device import ARCHITECTURES

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


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Choose tiles as for another device: ``on(arch=80, multiprocessors=1)``. Few multiprocessors mean large tiles and long strips."""

    def set_limits(arch: int = 90, **changes: int) -> None:
        limits = dataclasses.replace(ARCHITECTURES[arch], **changes)
        for name, module in list(sys.modules.items()):
            if name.startswith("cmt_fast.ops.") and hasattr(module, "device_limits"):
                monkeypatch.setattr(module, "device_limits", lambda device: limits)

    return set_limits
