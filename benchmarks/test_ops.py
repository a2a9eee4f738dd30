"""The operations under pytest-benchmark: ``pytest benchmarks --benchmark-only`` (plain ``pytest`` does not come here)."""

import pytest
import torch

from benchmarks.calls import MODES, make_call
from benchmarks.registry import OPS
from cmt_fast.backend import BACKENDS, machine_reasons
from cmt_fast.testing.precision import precision
from cmt_fast.testing.shapes import stage_shapes
from cmt_fast.testing.verification import verify_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("backend", [name for name in BACKENDS if not machine_reasons(name)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", stage_shapes("cmt_s"), ids=lambda shape: shape.name)
@pytest.mark.parametrize("op", OPS)
def test_op(benchmark, op, shape, mode, backend):
    case = OPS[op].make_case(shape)
    if case is None:
        pytest.skip(f"{shape.name} has no {op}")
    p = precision("float32")
    checks = verify_case(case, p, [backend], DEVICE, mode == "training")
    if checks[0].passed is None:
        pytest.skip(checks[0].detail)
    assert all(check.passed for check in checks), "no time for a wrong result"
    call = make_call(case, backend, p, DEVICE, mode)

    def synchronised():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op} {shape.name} {mode}"
    benchmark(synchronised)
