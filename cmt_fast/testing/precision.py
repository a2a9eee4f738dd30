"""Named precisions: the dtype of parameters and inputs, and the autocast mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """One way to run a model.

    Attributes:
        name: as on the command line, such as ``bfloat16`` or ``autocast-bfloat16``.
        dtype: of parameters and inputs.
        autocast: dtype that autocast computes in, or None for no autocast.
    """

    name: str
    dtype: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def low(self) -> torch.dtype:
        """The least precise dtype involved: inputs are rounded to it, and its rounding unit counts."""
        return self.autocast or self.dtype

    def context(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The autocast context to run in; a null one without autocast."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.autocast)

    def unsupported(self, device: torch.device) -> str | None:
        """Why ``device`` cannot run this precision, or None."""
        if device.type == "cuda" and self.low is torch.bfloat16 and not torch.cuda.is_bf16_supported():
            return f"{torch.cuda.get_device_name(device)} does not compute in bfloat16"
        return None


PRECISIONS = {
    p.name: p
    for p in (
        Precision("float64", torch.float64),
        Precision("float32", torch.float32),
        Precision("bfloat16", torch.bfloat16),
        Precision("float16", torch.float16),
        Precision("autocast-bfloat16", torch.float32, torch.bfloat16),
        Precision("autocast-float16", torch.float32, torch.float16),
    )
}


def precision(name: str) -> Precision:
    """Look a precision up by name.

    Raises:
        ValueError: if there is no such name; the message lists the valid ones.
    """
    return PRECISIONS[one_of("dtype", name, PRECISIONS)]


def one_of(what: str, name: str, valid: Iterable[str]) -> str:
    """``name`` if it is among the names ``valid``.

    Raises:
        ValueError: if it is not; the message lists them.
    """
    names = list(valid)
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}; expected one of {', '.join(names)}")
    return name
