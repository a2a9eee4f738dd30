"""The Triton kernels of the depthwise convolutions and their gradients on a GPU: real shapes, every dtype, autocast, large maps, streams, graphs."""

import pytest
import torch
from torch import Tensor, nn

import cmt_fast
from cmt_fast.functional import depthwise_conv3x3, depthwise_reduce, lpu
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops.depthwise.schema import conv3x3_bwd_triton, conv3x3_fwd_triton, reduce_bwd_triton, reduce_fwd_triton
from cmt_fast.testing.shapes import stage_shapes
from cmt_fast.testing.tolerance import assert_within

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STAGES = [stage for variant in VARIANTS for stage in stage_shapes(variant, 3)]


@pytest.fixture(autouse=True)
def insist(monkeypatch):
    """A call that the kernels cannot run is an error here; plain PyTorch is not excused by TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with cmt_fast.use_backend("triton"):
        yield


def make_inputs(shape: tuple[int, ...], k: int | None, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """x, weight, bias and the gradient of the result: 3x3 with padding if ``k`` is None, else k x k with stride k."""
    generator = torch.Generator("cuda").manual_seed(seed)
    b, h, w, c = shape
    side, out = k or 3, shape if k is None else (b, h // k, w // k, c)
    shapes = (shape, (c, 1, side, side), (c,), out)
    return [torch.randn(s, generator=generator, device="cuda").to(dtype) for s in shapes]


def run(
    inputs: list[Tensor], k: int | None, backend: str = "triton", autocast: torch.dtype | None = None
) -> list[Tensor]:
    """The result and every gradient."""
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    enabled = autocast is not None
    with cmt_fast.use_backend(backend), torch.autocast("cuda", autocast or torch.bfloat16, enabled=enabled):
        y = depthwise_conv3x3(*leaves, shortcut=True) if k is None else depthwise_reduce(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs[3].to(y.dtype))]


def check(inputs: list[Tensor], k: int | None, autocast: torch.dtype | None = None) -> None:
    exact, plain = run([t.double() for t in inputs], k, "reference"), run(inputs, k, "reference", autocast)
    sizes = run([t.double().abs() for t in inputs], k, "reference")  # of the sums, whose terms may cancel
    strict = inputs[0].dtype == torch.float32 and autocast is None
    for name, *tensors, size in zip(
        ("y", "dx", "dweight", "dbias"), run(inputs, k, "triton", autocast), exact, plain, sizes
    ):
        scale = size.max().item() if strict and name in ("dweight", "dbias") else None
        assert_within(name, *tensors, backward=name != "y", dtype=autocast, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.name)
def test_stages_of_the_variants(stage, dtype):
    shape = stage.batch, stage.height, stage.width, stage.dim
    check(make_inputs(shape, None, dtype), None)
    check(make_inputs(shape, stage.sr_ratio, dtype), stage.sr_ratio)
    check(make_inputs((1, stage.height, stage.width, stage.hidden), None, dtype), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 200, 336, 64), (2, 25, 42, 512), (1, 1, 9, 5), (2, 9, 1, 165), (40, 3, 3, 1)])
def test_other_shapes(shape, dtype):
    check(make_inputs(shape, None, dtype), None)
    for k in (1, 2, 8) if min(shape[1:3]) >= 8 else (1,):
        check(make_inputs(shape, k, dtype), k)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [None, 2])
def test_autocast(k, autocast):
    inputs = make_inputs((3, 14, 13, 52), k, autocast)
    check([t.float() for t in inputs], k, autocast)
    check([inputs[0], *(t.float() for t in inputs[1:])], k, autocast)


def test_lpu_trains():
    conv = nn.Conv2d(64, 64, 3, padding=1, groups=64, device="cuda")
    x = torch.randn(2, 56, 56, 64, device="cuda", requires_grad=True)
    lpu(x, conv).sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, conv.weight, conv.bias))


def test_maps_of_more_than_2_to_the_31_elements():
    """The last images of a batch lie where 32-bit offsets do not reach: equal to the same images alone."""
    images = 2**31 // (64 * 64 * 64) + 3
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    for k in (None, 8):
        last, weight, bias, grad = make_inputs((4, 64, 64, 64), k, torch.bfloat16)
        x = torch.zeros(images, 64, 64, 64, dtype=torch.bfloat16, device="cuda")
        large = torch.zeros(images, *grad.shape[1:], dtype=torch.bfloat16, device="cuda")
        x[-4:], large[-4:] = last, grad
        expected = run([last, weight, bias, grad], k)
        results = run([x, weight, bias, large], k)
        assert all(torch.equal(result[-4:], wanted) for result, wanted in zip(results[:2], expected))
        for result, wanted in zip(results[2:], expected[2:]):  # sums that are cut elsewhere
            torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("k", [None, 4])
def test_streams_and_repetitions(k):
    """Calls on several streams at once do not disturb each other, and every run gives the same bits."""
    calls = [make_inputs((64, 28, 28, 128), k, torch.bfloat16, seed) for seed in range(4)]
    expected = [run(call, k) for call in calls]
    torch.cuda.synchronize()
    results = []
    for _ in range(3):
        for call in calls:
            with torch.cuda.stream(torch.cuda.Stream()):
                results.append(run(call, k))
    torch.cuda.synchronize()
    for i, tensors in enumerate(results):
        assert all(torch.equal(*pair) for pair in zip(tensors, expected[i % len(calls)]))


@pytest.mark.parametrize("k", [None, 4])
def test_a_graph_gives_the_same_bits(k):
    inputs = make_inputs((8, 28, 27, 76), k, torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = run(inputs, k)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs, k)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(*pair) for pair in zip(captured, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    x, weight, bias, grad = make_inputs((2, 6, 5, 12), None, dtype)
    torch.library.opcheck(conv3x3_fwd_triton, (x.transpose(1, 2), weight, bias, True))
    torch.library.opcheck(conv3x3_bwd_triton, (grad, x, weight.float(), True, True, True, True))
    x, weight, bias, grad = make_inputs((2, 6, 5, 12), 2, dtype)
    torch.library.opcheck(reduce_fwd_triton, (x, weight, None))
    torch.library.opcheck(reduce_bwd_triton, (grad, x, weight, True, True, False))


@pytest.mark.parametrize("k", [None, 4])
def test_compiles_into_one_graph(k):
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return depthwise_conv3x3(x, weight, bias, shortcut=True) if k is None else depthwise_reduce(x, weight, bias)

    *leaves, grad = make_inputs((2, 28, 28, 64), k, torch.bfloat16)
    leaves = [t.requires_grad_() for t in leaves]
    y = torch.compile(call, fullgraph=True)(*leaves)
    expected = call(*leaves)
    assert torch.equal(y, expected)
    for pair in zip(*(torch.autograd.grad(z, leaves, grad) for z in (y, expected))):
        assert torch.equal(*pair)
