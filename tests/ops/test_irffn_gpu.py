"""The Triton kernels of the IRFFN on a GPU: real shapes, every dtype, offsets beyond 2^31, streams, graphs, torch.compile."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from repeats import assert_same_in_a_graph, assert_same_on_streams
from torch import Tensor

from cmt_fast import use_backend
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.inference.triton_steps import TRITON
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops.irffn.schema import depthwise_project_triton, expand_triton
from cmt_fast.testing.packed_irffn import DepthwiseProjectCall, ExpandCall, depthwise_project_call, expand_call
from cmt_fast.testing.shapes import StageShape, stage_shapes
from cmt_fast.testing.tolerance import assert_within

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAKERS = (expand_call, depthwise_project_call)
steps = pytest.mark.parametrize("make", MAKERS, ids=["expand", "depthwise_project"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def insist():
    """A call that the kernels cannot run is an error here."""
    with use_backend("triton"):
        yield


def check(shape: StageShape, dtype: torch.dtype, make, **options) -> None:
    call = make(shape, dtype, device="cuda", **options)
    actual = call.run(TRITON)
    assert_within(str(shape), actual, call.double().run(TORCH), call.run(TORCH))
    assert not actual[..., shape.hidden if make is expand_call else shape.dim :].any(), "padding must stay 0"


@steps
@dtypes
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_of_the_variants(variant, batch, dtype, make, tf32):
    """One image and many: other tiles, and in stage d other kernels."""
    for shape in stage_shapes(variant, batch):
        check(shape, dtype, make)


@steps
@dtypes
def test_detection_sizes(dtype, make):
    for shape, (height, width) in zip(stage_shapes("cmt_s"), ((200, 336), (100, 168), (50, 84), (25, 42))):
        check(dataclasses.replace(shape, height=height, width=width), dtype, make)


@steps
@dtypes
def test_odd_shapes(dtype, make):
    for sizes in ((3, 1, 9, 12, 20), (3, 9, 1, 12, 20), (5, 1, 1, 3, 5), (2, 7, 5, 46, 165), (300, 2, 3, 300, 900)):
        batch, height, width, dim, hidden = sizes
        check(StageShape("odd", batch, height, width, dim, 1, hidden, 1), dtype, make)


def needs_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free:.0f} are free")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("stage", ["a", "d"])
def test_hidden_maps_beyond_32_bit_offsets(stage, dtype):
    """The last images of a batch whose hidden map has more than 2^31 elements equal the same images alone, in the same tiles."""
    needs_memory(24 if dtype is torch.bfloat16 else 40)
    shape = next(s for s in stage_shapes("cmt_s") if s.name.endswith(stage))
    images = 2**31 // (shape.queries * shape.hidden) + 8
    one = expand_call(shape, dtype, device="cuda")
    z = one.z.expand(images, -1, -1, -1).contiguous()
    hidden = dataclasses.replace(one, z=z).run(TRITON)
    assert hidden.numel() > 2**31
    assert_within("last image", hidden[-1:], one.double().run(TORCH), one.run(TORCH))
    step = depthwise_project_call(shape, dtype, device="cuda").step
    last = DepthwiseProjectCall(step, hidden[-1:].clone(), one.z)
    out = DepthwiseProjectCall(step, hidden, z).run(TRITON)
    assert_within("last image", out[-1:], last.double().run(TORCH), last.run(TORCH))


@steps
def test_streams(make):
    """Calls on several streams at once equal the same calls one after the other."""
    calls = [make(shape, torch.bfloat16, device="cuda", seed=i) for i, shape in enumerate(stage_shapes("cmt_s", 8))]
    assert_same_on_streams([partial(call.run, TRITON) for call in calls])


@steps
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_run_repeats_bit_for_bit_also_in_a_graph(dtype, make):
    call = make(stage_shapes("cmt_b", 4)[3], dtype, device="cuda")
    assert_same_in_a_graph(partial(call.run, TRITON))


@steps
def test_on_the_second_device(make):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    call = make(stage_shapes("cmt_s")[0], torch.bfloat16, device="cuda:1")
    assert_within("out", call.run(TRITON), call.double().run(TORCH), call.run(TORCH))


def arguments(call: ExpandCall | DepthwiseProjectCall, transposed: bool) -> tuple[Tensor | int | float, ...]:
    def place(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if transposed else x

    if isinstance(call, ExpandCall):
        step = call.step
        return (place(call.z), step.weight, step.bias, step.scale, step.shift, step.channels, step.eps)
    parameters = (call.step.taps, call.step.bias, call.step.weight, call.step.out_bias)
    return (place(call.hidden), *parameters, place(call.z))


@steps
@dtypes
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed, dtype, make):
    call = make(StageShape("", 2, 6, 5, 12, 1, 20, 1), dtype, device="cuda")
    op = expand_triton if make is expand_call else depthwise_project_triton
    torch.library.opcheck(op, arguments(call, transposed))


@steps
def test_compiles_into_one_graph(make):
    call = make(stage_shapes("cmt_s", 2)[1], torch.bfloat16, device="cuda")
    compiled = torch.compile(lambda z: dataclasses.replace(call, z=z).run(TRITON), fullgraph=True)
    assert torch.equal(compiled(call.z), call.run(TRITON))
