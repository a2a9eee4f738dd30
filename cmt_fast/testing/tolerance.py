"""The tolerance policy, the only one of the project: no test, benchmark or command has its own ``atol``.

A result is right if it is as accurate as plain PyTorch could be expected to be: its largest error against a float64 run of
the reference may be at most 2 times (outputs) or 3 times (gradients) the largest error of plain PyTorch in the same dtype
and autocast mode, plus one rounding unit ``eps(dtype) * max|exact|``. So no constant has to be tuned for a dtype or a
shape, and a kernel that sums in float32 passes with a margin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: How many times plain PyTorch's own error a result may have.
FORWARD, BACKWARD = 2.0, 3.0


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        name: of the tensor compared.
        error: largest absolute error against the float64 run; nan or inf where the result is not finite.
        own_error: the same of plain PyTorch in the same dtype.
        bound: largest error allowed.
        passed: whether the result is within the policy.
        detail: why it is not, or which element is worst.
    """

    name: str
    error: float
    own_error: float
    bound: float
    passed: bool
    detail: str

    @property
    def ratio(self) -> float:
        """``error / bound``: at most 1 where it passed; 0 where both are 0."""
        if self.bound > 0:
            return self.error / self.bound
        return 0.0 if self.error == 0 else math.inf

    def __str__(self) -> str:
        state = "ok" if self.passed else "FAILED"
        return (
            f"{self.name} {state}: error {self.error:.3g}, plain PyTorch's own {self.own_error:.3g}, "
            f"bound {self.bound:.3g}; {self.detail}"
        )


def compare(
    name: str,
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    *,
    backward: bool = False,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
) -> Comparison:
    """Judge ``actual`` by the policy.

    Args:
        name: for messages.
        actual: the result to judge, any shape.
        exact: the reference run in float64 on the same (already rounded) inputs.
        plain: the reference in the dtype and autocast mode of ``actual``.
        backward: ``actual`` is a gradient.
        dtype: whose rounding unit counts; by default the dtype of ``plain``. Under autocast, pass autocast's.
        scale: magnitude that the rounding unit is taken of, if larger than ``max|exact|``: the size of the terms where
            they cancel. The gradient of k's bias, or of a convolution's bias before BatchNorm, is a sum of large terms
            whose exact value is 0.

    Returns:
        The :class:`Comparison`. A wrong shape or dtype or a value that is not finite fails; nothing raises. Integer tensors
        must be equal.
    """

    def failed(detail: str, error: float = math.nan) -> Comparison:
        return Comparison(name, error, math.nan, math.nan, False, detail)

    if actual.shape != exact.shape or plain.shape != exact.shape:
        return failed(
            f"expected shape {tuple(exact.shape)}, got {tuple(actual.shape)} (plain PyTorch: {tuple(plain.shape)})"
        )
    if actual.dtype != plain.dtype:
        return failed(f"expected dtype {plain.dtype}, got {actual.dtype}")
    if actual.numel() == 0:
        return Comparison(name, 0.0, 0.0, 0.0, True, "no elements")
    target = exact.detach().to(torch.float64)
    distance = (actual.detach().to(target) - target).abs()
    own_distance = (plain.detach().to(target) - target).abs()
    if not distance.isfinite().all():
        index = _index(~distance.isfinite(), actual)
        if not target.isfinite().all():
            return failed(
                f"the exact result is not finite at {_index(~target.isfinite(), target)}: choose other inputs"
            )
        values = f"{actual[index].item()}, exact {target[index].item():.6g}, plain PyTorch {plain[index].item():.6g}"
        return failed(f"not finite at {index}: {values}", math.inf)
    own_error = own_distance.max().item()
    if not math.isfinite(own_error):
        return failed("plain PyTorch's own result is not finite in this dtype: choose smaller inputs")
    unit = 0.0
    if plain.dtype.is_floating_point:
        unit = torch.finfo(dtype or plain.dtype).eps * max(target.abs().max().item(), scale or 0.0)
    error = distance.max().item()
    bound = (BACKWARD if backward else FORWARD) * own_error + unit
    index = _index(distance, actual)
    detail = f"worst at {index}: {actual[index].item():.8g}, exact {target[index].item():.8g}"
    return Comparison(name, error, own_error, bound, error <= bound, detail)


def assert_within(
    name: str,
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    *,
    backward: bool = False,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
) -> Comparison:
    """:func:`compare` for a test.

    Raises:
        AssertionError: if the comparison fails; the message holds both errors, the bound and the worst element.
    """
    result = compare(name, actual, exact, plain, backward=backward, dtype=dtype, scale=scale)
    if not result.passed:
        raise AssertionError(str(result))
    return result


def _index(where: Tensor, like: Tensor) -> tuple[int, ...]:
    """Index of the largest element (of the first True one)."""
    flat = where.to(torch.float64).flatten().argmax()
    return tuple(int(i) for i in torch.unravel_index(flat, like.shape))
