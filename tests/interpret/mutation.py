"""Kernels with one line changed: a check that passes them checks nothing."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def mutate(
    monkeypatch: pytest.MonkeyPatch, folder: Path, modules: list[ModuleType], old: str, new: str
) -> list[ModuleType]:
    """Fresh copies of ``modules``, with ``old`` replaced by ``new`` in the one that has it.

    Args:
        monkeypatch: puts the copies in the place of the originals, so that what one imports from another comes from its copy.
        folder: to write the copies to: Triton's interpreter reads the source of a kernel from its file.
        modules: in the order in which they import each other.
    """
    copies, changed = [], 0
    for module in modules:
        source = Path(module.__file__).read_text()
        changed += source.count(old)
        path = folder / f"{module.__name__.replace('.', '_')}.py"
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(module.__name__, path)
        copy = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module.__name__, copy)
        spec.loader.exec_module(copy)
        copies.append(copy)
    assert changed == 1, f"{old!r} must stand in the kernels exactly once, found {changed} times"
    return copies
