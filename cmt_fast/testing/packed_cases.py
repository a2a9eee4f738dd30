"""What is verified of packed models: every step that has Triton kernels, and small models as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from cmt_fast.backend import use_backend
from cmt_fast.inference.optimize import optimize
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.testing.inputs import Case, in_double, model_cases
from cmt_fast.testing.packed_steps import STEPS, StepCall, tensors_of
from cmt_fast.testing.precision import Precision
from cmt_fast.testing.shapes import ODD_SHAPES, QUICK_SHAPES, StageShape

#: As ``cmt-fast verify`` names them.
PACKED_OPS = (*(f"packed_{step}" for step in STEPS), "packed_cmt")

#: Steps that stages have in several forms: of each a stage, and what it is called.
FORMS = {"attention": {"a": ", absorbed", "c": ", projected"}}


class Subject(Protocol):
    """A case in one precision; outputs by name."""

    def exact(self) -> dict[str, Tensor]:
        """In float64."""

    def plain(self) -> dict[str, Tensor]:
        """Of plain PyTorch in the precision."""

    def run(self, backend: str) -> dict[str, Tensor]:
        """On a backend, in the precision."""


@dataclass(frozen=True)
class PackedCase:
    """One step at one shape, or one model.

    Attributes:
        op: among :data:`PACKED_OPS`.
        name: of the shape or model.
        instance: from a precision and a device to what is run.
    """

    op: str
    name: str
    instance: Callable[[Precision, torch.device], Subject]


def packed_cases(quick: bool = False) -> list[PackedCase]:
    """All of them; ``quick`` leaves out most shapes."""
    shapes = QUICK_SHAPES if quick else ODD_SHAPES
    models = model_cases()[1:] if quick else model_cases()
    return [
        *(
            PackedCase(f"packed_{step}", f"{shape.name}{form}", partial(_step, step, replace(shape, name=stage)))
            for step in STEPS
            for shape in shapes
            for stage, form in FORMS.get(step, {"": ""}).items()
        ),
        *(PackedCase("packed_cmt", case.name, partial(_Model, case)) for case in models),
    ]


@dataclass(frozen=True)
class _Step:
    call: StepCall

    def exact(self) -> dict[str, Tensor]:
        return _by_name(self.call.double().run(TORCH))

    def plain(self) -> dict[str, Tensor]:
        return _by_name(self.call.run(TORCH))

    def run(self, backend: str) -> dict[str, Tensor]:
        from cmt_fast.inference.triton_steps import TRITON

        with use_backend(backend):
            return _by_name(self.call.run(TRITON))


def _step(step: str, shape: StageShape, p: Precision, device: torch.device) -> _Step:
    return _Step(STEPS[step](shape, p.dtype, device))


def _by_name(outputs: Any) -> dict[str, Tensor]:
    return {f"output {i}": tensor for i, tensor in enumerate(tensors_of(outputs))}


class _Model:
    def __init__(self, case: Case, p: Precision, device: torch.device) -> None:
        # Eight images: the largest error of two is a matter of luck.
        more = replace(case, input_shapes={name: (8, *shape[1:]) for name, shape in case.input_shapes.items()})
        module, inputs = more.instance(p, device)
        self.model: Any = module.eval()
        self.images = inputs["x"]
        self.dtype = p.dtype

    def exact(self) -> dict[str, Tensor]:
        with use_backend("reference"):
            return {"output": in_double(self.model)(self.images.double())}

    def plain(self) -> dict[str, Tensor]:
        with use_backend("reference"):
            return {"output": self.model(self.images)}

    def run(self, backend: str) -> dict[str, Tensor]:
        output = optimize(self.model, dtype=self.dtype, backend=backend)(self.images)
        assert isinstance(output, Tensor)
        return {"output": output}
