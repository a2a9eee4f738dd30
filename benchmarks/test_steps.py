"""The steps of a packed CMT-S under pytest-benchmark: ``pytest benchmarks --benchmark-only`` (plain ``pytest`` does not come here)."""

import pytest
import torch

from benchmarks import kernels, steps
from benchmarks.registry import BASELINE
from cmt_fast.inference import pack
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.testing.benchmark import make_images, make_model
from cmt_fast.testing.packed_steps import STEPS, runs_in
from cmt_fast.testing.precision import precision
from cmt_fast.testing.shapes import stage_shapes

GPU = torch.device("cuda")
SHAPES = dict(zip(steps.STAGES, stage_shapes("cmt_s")))


@pytest.fixture(scope="module")
def recorded():
    """By provider: the calls of an image's run through the model on a CPU."""
    p = precision("float32")
    size = 224
    with torch.inference_mode():
        packed, images = pack(make_model("cmt_s", size, p), dtype=p.dtype), make_images(1, size, p)
        return {name: steps.record_calls(*prepare(packed), images) for name, prepare in steps.PROVIDERS.items()}


@pytest.mark.parametrize("provider", steps.PROVIDERS)
@pytest.mark.parametrize("stage", steps.STAGES)
@pytest.mark.parametrize("step", steps.STEPS)
def test_cpu_step(benchmark, recorded, step, stage, provider):
    base = recorded[BASELINE].get((step, stage))
    if base is None:
        pytest.skip(f"stage {stage} has no {step}")
    calls = steps.on_maps_of(base, recorded[provider][step, stage])
    benchmark.group = f"packed {step} {stage}"
    with torch.inference_mode():
        assert not steps.wrong(base, {provider: calls}, torch.float32), "no time for a wrong result"
        benchmark(steps.in_turn(calls))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and none is visible")
@pytest.mark.parametrize("provider", ["torch", "triton"])
@pytest.mark.parametrize("stage", steps.STAGES)
@pytest.mark.parametrize("step", STEPS)
def test_gpu_step(benchmark, step, stage, provider):
    if not runs_in(step, SHAPES[stage]):
        pytest.skip(f"stage {stage} has no {step}")
    call = STEPS[step](SHAPES[stage], torch.bfloat16, GPU)
    function = (lambda: kernels.by_kernels(call)) if provider == "triton" else (lambda: call.run(TORCH))
    benchmark.group = f"packed {step} {stage}"

    def synchronised():
        function()
        torch.cuda.synchronize()

    with torch.inference_mode():
        assert not kernels.wrong(call, function()), "no time for a wrong result"
        benchmark(synchronised)
