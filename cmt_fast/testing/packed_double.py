"""Calls of packed steps in float64."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def in_double(call: T) -> T:
    """A dataclass with its tensors in float64, those of its parts too: the same numbers, exact arithmetic."""
    parts = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}  # type: ignore[arg-type]
    for name, part in parts.items():
        if isinstance(part, Tensor):
            parts[name] = part.double()
        elif dataclasses.is_dataclass(part):
            parts[name] = in_double(part)
    return dataclasses.replace(call, **parts)  # type: ignore[type-var]
