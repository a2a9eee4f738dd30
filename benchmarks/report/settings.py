"""What a report measures, and how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

#: Side of the images of a quick run, in pixels: to see that everything runs.
QUICK_SIZE = 64


@dataclass(frozen=True)
class Settings:
    """Of one run.

    Attributes:
        device: what is measured.
        variants: published variants, the most telling first.
        batches, dtypes: of whole models, likewise.
        seconds: to spend on each time, at one visit.
        quick: small images and few shapes: to see that everything runs.
        root: of the checkout, where the tests are.
    """

    device: torch.device
    variants: tuple[str, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    seconds: float
    quick: bool
    root: Path

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def img_size(self) -> int | None:
        """Of whole models; None for each variant's own."""
        return QUICK_SIZE if self.quick else None


def default_settings(
    device: torch.device,
    *,
    quick: bool = False,
    seconds: float | None = None,
    variants: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
) -> Settings:
    """What fits a device: on a GPU large batches in bfloat16, on a CPU single images in float32 first. What is given replaces that."""
    gpu = device.type == "cuda"
    return Settings(
        device=device,
        variants=tuple(variants or (("cmt_ti",) if quick else ("cmt_s", "cmt_ti", "cmt_xs", "cmt_b"))),
        batches=tuple(batches or ((2,) if quick else (256, 1, 32) if gpu else (1, 8))),
        dtypes=tuple(dtypes or (("float32",) if quick else ("bfloat16" if gpu else "float32", "autocast-bfloat16"))),
        seconds=seconds or (0.02 if quick else 1.0 if gpu else 0.5),
        quick=quick,
        root=Path(__file__).parents[2],
    )
