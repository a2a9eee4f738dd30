"""Poisoned memory: what a kernel forgets to write shows up as NaN."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_PATCHED: tuple[tuple[Any, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill every ``torch.empty`` (and its relatives) called from inside cmt_fast: NaN, or the least integer.

    Fresh memory is often zero by luck, which hides an element that is never written. Calls from other packages are left
    alone, and so are code that is being compiled and tensors without memory.
    """
    with torch.device("cpu"):
        torch.empty(0)  # at its first use a device context remembers which functions allocate: let it see the real ones
    originals = [getattr(owner, name) for owner, name in _PATCHED]
    for (owner, name), original in zip(_PATCHED, originals):
        setattr(owner, name, _poisoning(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(_PATCHED, originals):
            setattr(owner, name, original)


def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or tensor.is_meta:
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return fill(tensor) if caller.split(".")[0] == "cmt_fast" else tensor

    return poisoned


@torch.no_grad()
def fill(tensor: Tensor) -> Tensor:
    """Fill ``tensor`` with NaN, the least integer, or True, and return it."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).min)
