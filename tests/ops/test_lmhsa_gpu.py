"""The attention sub-layer in training on a GPU: real shapes, every dtype, whole models, bit-for-bit repetition, large maps."""

import copy

import pytest
import torch
from torch import nn

import cmt_fast
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops.lmhsa.reduce_schema import norm_reduce_backward_triton, norm_reduce_triton, normalise_triton
from cmt_fast.testing.inputs import Case, LMHSASubLayer, randomise
from cmt_fast.testing.precision import PRECISIONS
from cmt_fast.testing.shapes import ODD_SHAPES, StageShape, stage_shapes
from cmt_fast.testing.verification import verify_case

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
LOW = [p for p in PRECISIONS.values() if p.dtype is not torch.float64]


def check(shape: StageShape, precision, training: bool) -> None:
    size = {"x": (shape.batch, shape.height, shape.width, shape.dim)}
    case = Case("lmhsa", str(shape), lambda: LMHSASubLayer(shape), size, stateful=True)
    for result in verify_case(case, precision, ["triton"], CUDA, training):
        assert result.passed, str(result)


@pytest.mark.parametrize("precision", LOW, ids=lambda p: p.name)
@pytest.mark.parametrize("shape", [s for v in VARIANTS for s in stage_shapes(v, 3)] + list(ODD_SHAPES), ids=str)
def test_against_float64(shape, precision):
    for training in (True, False):
        if not training or shape.sr_ratio == 1 or shape.batch * shape.keys > 4:
            check(shape, precision, training)


def step(module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    with cmt_fast.use_backend("triton"):
        out = module(x)
    out.backward(grad)
    return [out.detach(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


@pytest.mark.parametrize("shape", stage_shapes("cmt_s", 32), ids=str)
def test_repeats_bit_for_bit(shape):
    """1000 runs, as a training step makes them."""
    module = randomise(LMHSASubLayer(shape), torch.Generator().manual_seed(0)).to(CUDA, torch.bfloat16).train()
    x = torch.randn(shape.batch, shape.height, shape.width, shape.dim, device=CUDA, dtype=torch.bfloat16)
    grad = torch.randn_like(x)
    expected = step(module, x, grad)
    for _ in range(1000):
        assert all(torch.equal(*pair) for pair in zip(step(module, x, grad), expected))


@pytest.mark.parametrize("low_residual", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_step_of_a_model_under_autocast(low_residual, compiled):
    """The sub-layer runs in every block; the loss falls as it does with plain PyTorch."""
    losses = {}
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        model = cmt_fast.cmt_ti(num_classes=10, drop_path_rate=0.1).to(CUDA).train()
        model.set_low_residual(low_residual)
        run = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        x, y = torch.randn(16, 3, 160, 160, device=CUDA), torch.arange(16, device=CUDA) % 10
        with cmt_fast.use_backend(backend):
            if backend == "auto":
                with torch.autocast("cuda", torch.bfloat16):
                    calls = cmt_fast.explain(model, x).calls
                assert calls["lmhsa", "triton"] == sum(model.depths)
            for _ in range(10):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = nn.functional.cross_entropy(run(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        losses[backend] = loss.item()
    assert max(losses.values()) < 1.0, losses


def test_a_map_of_more_than_2_to_the_31_elements():
    """The last images of a batch lie where 32-bit offsets do not reach: equal to the same images alone."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free memory")
    c, k, images = 64, 8, 2**31 // (64 * 64 * 64) + 3
    vector, taps = torch.randn(c, device=CUDA), torch.randn(k * k, c, device=CUDA)
    x = torch.zeros(images, 64, 64, c, dtype=torch.bfloat16, device=CUDA)
    x[-256:] = torch.randn_like(x[-256:])  # enough images for the same tiles alone

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        reduced, *_ = norm_reduce_triton(x, vector, vector, 1e-6, taps, vector, k, x.dtype, False)
        stats, sums = torch.ones(6, c, device=CUDA), torch.zeros(2, c, device=CUDA)
        maps = (x, x, normalise_triton(reduced, stats), reduced, stats, sums)
        dx, *_ = norm_reduce_backward_triton(
            x, *maps[:3], *maps[3:], vector, vector, 1e-6, taps, k, (True, False, False)
        )
        return reduced[-256:], dx[-256:]

    assert all(torch.equal(*pair) for pair in zip(run(x), run(x[-256:].clone())))


def test_opcheck():
    x = torch.randn(2, 6, 5, 12, device=CUDA, dtype=torch.bfloat16)
    vector, taps = torch.randn(12, device=CUDA), torch.randn(4, 12, device=CUDA)
    arguments = (x, vector, vector, 1e-6, taps, vector, 2, torch.bfloat16, True)
    torch.library.opcheck(norm_reduce_triton, arguments)
    reduced = norm_reduce_triton(*arguments)[0]
    stats, sums = torch.rand(6, 12, device=CUDA), torch.randn(2, 12, device=CUDA)
    torch.library.opcheck(normalise_triton, (reduced, stats))
    arguments = (x, x, x, reduced, reduced, stats, sums, vector, vector, 1e-6, taps, 2, (True, True, True))
    torch.library.opcheck(norm_reduce_backward_triton, arguments)
