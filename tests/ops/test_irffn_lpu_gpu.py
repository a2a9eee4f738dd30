"""The end of the IRFFN with the LPU of the next block on a GPU: every stage and dtype against float64, bits that repeat, large offsets."""

import copy

import pytest
import torch

import cmt_fast
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops.irffn.output_lpu_schema import output_lpu, output_lpu_gradient
from cmt_fast.testing.inputs import Case, IRFFNLPUSubLayer
from cmt_fast.testing.precision import PRECISIONS, precision
from cmt_fast.testing.shapes import StageShape, stage_shapes
from cmt_fast.testing.verification import verify_case

pytestmark = pytest.mark.gpu
LOW = [name for name in PRECISIONS if name != "float64"]


def case(shape: StageShape) -> Case:
    x = {"x": (shape.batch, shape.height, shape.width, shape.dim)}
    return Case("irffn_lpu", shape.name, lambda: IRFFNLPUSubLayer(shape), x, stateful=True)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("stage", [s for variant in VARIANTS for s in stage_shapes(variant, 3)], ids=lambda s: s.name)
def test_stages_of_the_variants(stage, dtype):
    checks = verify_case(case(stage), precision(dtype), ["triton"], torch.device("cuda"), True)
    assert len(checks) == 27
    for found in checks:
        assert found.passed, found


@pytest.mark.parametrize("stage", stage_shapes("cmt_s", 64), ids=lambda s: s.name)
def test_a_step_repeats_bit_for_bit(stage):
    layer, inputs = case(stage).instance(precision("bfloat16"), "cuda")

    def step() -> list[torch.Tensor]:
        module, x = copy.deepcopy(layer), inputs["x"].clone().requires_grad_()
        module(x).float().square().sum().backward()
        return [x.grad, *(p.grad for p in module.parameters()), *module.buffers()]

    with cmt_fast.use_backend("triton"):
        assert all(torch.equal(a, b) for a, b in zip(step(), step()))


def test_offsets_beyond_32_bits():
    """So many images that a map has more than 2^31 elements: the last image is like the first."""
    generator = torch.Generator("cuda").manual_seed(0)
    few = [torch.randn(2, 56, 56, 64, generator=generator, device="cuda").bfloat16() for _ in range(3)]
    y, shortcut, grad = (t.repeat(5400, 1, 1, 1) for t in few)
    assert y.numel() > 2**31
    n3, weight = (torch.rand(size, generator=generator, device="cuda") for size in ((6, 64), (64, 1, 3, 3)))
    lpu = output_lpu(y, n3, None, shortcut, weight, None)
    assert torch.equal(lpu[-2:], output_lpu(few[0], n3, None, few[1], weight, None))
    del lpu
    dout, sums = output_lpu_gradient(grad, y, n3, None, shortcut, weight, True, True, True)
    assert torch.equal(dout[-2:], dout[:2]) and sums.isfinite().all()
