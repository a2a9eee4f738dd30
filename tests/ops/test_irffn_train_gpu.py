"""The training kernels of the IRFFN on a GPU: every stage and dtype against float64, bits that repeat, large offsets, torch.compile."""

import copy
import dataclasses

import pytest
import torch

import cmt_fast
from cmt_fast.models.variants import VARIANTS
from cmt_fast.testing.inputs import Case, IRFFNSubLayer
from cmt_fast.testing.precision import PRECISIONS, precision
from cmt_fast.testing.shapes import StageShape, stage_shapes
from cmt_fast.testing.verification import verify_case

pytestmark = pytest.mark.gpu
LOW = [name for name in PRECISIONS if name != "float64"]


def case(shape: StageShape) -> Case:
    x = {"x": (shape.batch, shape.height, shape.width, shape.dim)}
    return Case("irffn", shape.name, lambda: IRFFNSubLayer(shape), x, stateful=True)


def check(shape: StageShape, dtype: str, training: bool = True) -> None:
    checks = verify_case(case(shape), precision(dtype), ["triton"], torch.device("cuda"), training)
    assert len(checks) == 25
    for found in checks:
        assert found.passed, found


def made(stage: str, batch: int, dtype: torch.dtype = torch.bfloat16) -> tuple[IRFFNSubLayer, torch.Tensor]:
    shape = next(s for s in stage_shapes("cmt_s", batch) if s.name.endswith(stage))
    layer, inputs = case(shape).instance(precision("float32"), "cuda")
    return layer.to(dtype), inputs["x"].to(dtype)


def gradients(layer: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Of a copy that trains one step: output, gradients, buffers."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    out = layer(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(out))
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("stage", [s for variant in VARIANTS for s in stage_shapes(variant, 3)], ids=lambda s: s.name)
def test_stages_of_the_variants(stage, dtype):
    check(stage, dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stage", stage_shapes("cmt_s", 128), ids=lambda s: s.name)
def test_training_batch(stage, training):
    check(stage, "autocast-bfloat16", training)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_odd_sizes(dtype):
    stage = stage_shapes("cmt_ti", 5)[0]
    check(dataclasses.replace(stage, height=11, width=17), dtype)
    check(dataclasses.replace(stage, batch=64, height=1, width=1), dtype)


@pytest.mark.parametrize("stage", "abcd")
def test_a_step_repeats_bit_for_bit_and_recomputing_changes_none(stage):
    with cmt_fast.use_backend("triton"):
        layer, x = made(stage, 64)
        expected = gradients(layer, x)
        again = gradients(layer, x)
        layer.mlp.recompute = True
        recomputed = gradients(layer, x)
    for found in (again, recomputed):
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_offsets_beyond_32_bits():
    """Stage a with so many images that the hidden map has more than 2^31 elements: the last image is like the first."""
    with cmt_fast.use_backend("triton"):
        layer, x = made("a", 2)
        layer.eval()
        many = x.repeat(1350, 1, 1, 1)
        assert many.numel() * 4 > 2**31
        expected, found = gradients(layer, x)[1], gradients(layer, many.requires_grad_(False))
        del many
    assert torch.equal(found[0][:2], found[0][-2:])
    assert expected.shape[0] == 2 and found[1].isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_compiles_into_one_graph(training):
    with cmt_fast.use_backend("triton"):
        layer, x = made("c", 4)
        layer.train(training)
        compiled = copy.deepcopy(layer)
        compiled.compile(fullgraph=True)
        out, again = layer(x.requires_grad_()), compiled(x)
        first = torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])
        second = torch.autograd.grad(again.float().square().sum(), [x, *compiled.parameters()])
    assert torch.equal(out, again)
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b)
