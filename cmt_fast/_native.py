"""Finding and loading the compiled library of ``csrc/`` (optional: everything works without it)."""

from __future__ import annotations

import functools
from pathlib import Path

import torch


@functools.cache
def load() -> str | None:
    """Load the library once. Returns ``None`` on success, else why it is not there."""
    candidates = sorted(Path(__file__).parent.glob("_C*.so"))
    if not candidates:
        return "the compiled library is not built (CMT_FAST_BUILD=1 pip install --no-build-isolation .)"
    try:
        torch.ops.load_library(str(candidates[0]))
    except OSError as error:
        return f"the compiled library {candidates[0].name} does not load: {error}"
    return None


def why_not_loaded() -> str | None:
    """:func:`load`, which torch.compile calls while it traces and takes as a constant."""
    return load()


# What torch.compiler.assume_constant_result does, without importing the compiler (1.6 s) with cmt_fast.
why_not_loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reasons() -> list[str]:
    """Reasons why the native backend cannot run anything here; an empty list if it can."""
    why = why_not_loaded()
    return [] if why is None else [why]
