"""Training CMT-S on a GPU beside its goals: time and memory of a step, bits that repeat, and the loss curve; ``benchmarks.goals`` runs it.

Everything runs under autocast in bfloat16 with the residual stream in 16 bits, the default; the original's order has its own in float32. A step is forward and backward; the runs add SGD.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.backend import use_backend
from cmt_fast.models.cmt import CMT
from cmt_fast.testing.benchmark import bench, make_images, make_model
from cmt_fast.testing.original_order import OriginalOrder
from cmt_fast.testing.precision import precision
from cmt_fast.testing.providers import BASELINE
from cmt_fast.testing.tolerance import BACKWARD

DTYPE = "autocast-bfloat16"
#: The model as it stands, and what it should be faster than.
OURS, COMPILED = "auto", ("original-compile", "compile")

#: Quantity -> what is required: at least, or at most where it says so.
OVER_EAGER, OVER_COMPILED = "over the original's order in eager autocast", "over torch.compile at its best"
MEMORY, REPEATS, CURVE = "peak memory beside the original's", "steps repeat bit for bit", "loss curve beside plain runs"
LEAST = {OVER_EAGER: 4.0, OVER_COMPILED: 2.5, REPEATS: 1.0}
MOST = {MEMORY: 0.4, CURVE: BACKWARD}  # of the curve, what the tolerance policy allows

Row = dict[str, Any]


def measure(variant: str, size: int, batch: int, device: torch.device, seconds: float) -> Iterator[Row]:
    """Time and memory of all providers, in turns."""
    rows = bench([variant], (BASELINE, OURS, *COMPILED), [batch], [DTYPE], device, "training", size, seconds)
    yield from map(asdict, rows)


def losses(variant: str, size: int, batch: int, device: torch.device, steps: int) -> tuple[dict[str, float], Row]:
    """Runs of ``steps`` steps from one seed: the two quantities of them, and a row with the curves.

    The curve's distance is the kernels' largest difference from the reference's, of the largest between plain PyTorch's two summation orders, smoothed over
    a tenth of the steps: single steps of a long run drift apart by chance.
    """
    p = precision(DTYPE)
    model, images = make_model(variant, size, p, device), make_images(batch, size, p, device)
    labels = torch.arange(batch, device=device) % model.num_classes
    first, state = _run(model, images, labels, steps, "auto", lambda m: m)
    again, other = _run(model, images, labels, steps, "auto", lambda m: m)
    reference, _ = _run(model, images, labels, steps, "reference", lambda m: m)
    original, _ = _run(model, images, labels, steps, "reference", OriginalOrder)
    same = torch.equal(first, again) and all(torch.equal(state[name], other[name]) for name in state)
    smooth = [curve.unfold(0, max(1, steps // 10), 1).mean(1) for curve in (first, reference, original)]
    ours, plain = ((smooth[i] - smooth[1]).abs().max().item() for i in (0, 2))
    values = {REPEATS: float(same), CURVE: ours / plain if plain else float(ours > 0)}
    curves = dict(auto=first.tolist(), reference=reference.tolist(), original=original.tolist())
    return values, dict(model=variant, img_size=size, batch=batch, dtype=DTYPE, mode="training", curves=curves)


def _run(
    model: CMT, images: Tensor, labels: Tensor, steps: int, backend: str, order: Callable[[CMT], Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of every step on one batch, and the weights and buffers after the last."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    call, found = order(model), []
    for _ in range(steps):
        with use_backend(backend), precision(DTYPE).context(images.device):
            loss = F.cross_entropy(call(images), labels)
        with use_backend(backend):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach().float())
    return torch.stack(found).cpu(), model.state_dict()


def values(rows: Sequence[Row]) -> dict[str, float | None]:
    """The quantities of time and memory; None where one is missing."""

    def least(column: str, *providers: str) -> float | None:
        return min((r[column] for r in rows if r["provider"] in providers and r[column]), default=None)

    def over(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    ours = least("median_ms", OURS)
    return {
        OVER_EAGER: over(least("median_ms", BASELINE), ours),
        OVER_COMPILED: over(least("median_ms", *COMPILED), ours),
        MEMORY: over(least("peak_mib", OURS), least("peak_mib", BASELINE)),
    }


def verdicts(found: dict[str, float | None]) -> list[tuple[str, bool]]:
    """A line for each goal, and whether it is met."""
    lines = []
    for what, value in found.items():
        least = what in LEAST
        required = LEAST[what] if least else MOST[what]
        met = value is not None and (value >= required if least else value <= required)
        state = "met" if met else "not measured" if value is None else "MISSED"
        number = "-" if value is None else f"{value:.4g}"
        lines.append((f"{what}: {number} ({'at least' if least else 'at most'} {required:g}): {state}", met))
    return lines
