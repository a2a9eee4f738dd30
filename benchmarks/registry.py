"""Which operations are timed, at which shapes, against what. A new operation is one line in ``OPS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cmt_fast.backend import BACKENDS
from cmt_fast.testing.inputs import Case, op_cases
from cmt_fast.testing.shapes import StageShape

#: Plain PyTorch as the reference writes it; every ratio is against it. ``compile`` is torch.compile of the same.
BASELINE = "reference"
PROVIDERS = (BASELINE, *(backend for backend in BACKENDS if backend != BASELINE), "compile")


@dataclass(frozen=True)
class OpBenchmark:
    """One operation to time.

    Attributes:
        name: for tables and the command line.
        make_case: the operation with its inputs at the shape of a stage, or None where the stage has no such operation.
        providers: what is timed, the baseline first.
    """

    name: str
    make_case: Callable[[StageShape], Case | None]
    providers: tuple[str, ...] = PROVIDERS


def _case(op: str, suffix: str = "") -> Callable[[StageShape], Case | None]:
    def make(shape: StageShape) -> Case | None:
        name = shape.name + suffix
        return next((c for c in op_cases([shape]) if c.op == op and c.name == name), None)

    return make


def _hidden(shape: StageShape) -> StageShape:
    """The wide map inside the IRFFN."""
    return replace(shape, dim=shape.hidden, heads=1)


OPS = {
    bench.name: bench
    for bench in (
        OpBenchmark("depthwise_conv3x3", _case("depthwise_conv3x3", ", shortcut")),
        OpBenchmark(
            "depthwise_conv3x3_hidden",
            lambda shape: _case("depthwise_conv3x3", ", shortcut")(_hidden(shape)),
        ),
        OpBenchmark("depthwise_reduce", _case("depthwise_reduce")),
        OpBenchmark("reduced_kv_attention", _case("reduced_kv_attention")),
        OpBenchmark("lpu", _case("lpu")),
        OpBenchmark("lmhsa", _case("lmhsa")),
        OpBenchmark("irffn", _case("irffn")),
        OpBenchmark("irffn_lpu", _case("irffn_lpu")),
    )
}
