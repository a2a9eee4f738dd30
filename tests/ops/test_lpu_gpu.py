"""The Triton kernel of the local perception unit on a GPU: real shapes, every dtype, large maps, streams, graphs."""

import dataclasses
from functools import partial

import pytest
import torch
from repeats import assert_same_in_a_graph, assert_same_on_streams

import cmt_fast
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.inference.triton_steps import TRITON
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops.lpu.schema import lpu_reduce_triton
from cmt_fast.testing.packed_lpu import LPUCall, lpu_call
from cmt_fast.testing.shapes import StageShape, stage_shapes
from cmt_fast.testing.tolerance import assert_within

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def insist():
    """A call that the kernel cannot run is an error here."""
    with cmt_fast.use_backend("triton"):
        yield


def check(call: LPUCall) -> None:
    for name, actual, exact, plain in zip(
        ("y", "reduced"), call.run(TRITON), call.double().run(TORCH), call.run(TORCH)
    ):
        assert_within(name, actual, exact, plain)
        assert actual[..., call.step.channels :].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stage", [s for variant in VARIANTS for s in stage_shapes(variant, 3)], ids=lambda s: s.name)
def test_stages_of_the_variants(stage, dtype):
    check(lpu_call(stage, dtype, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stage", stage_shapes("cmt_s", 2, 224), ids=lambda s: s.name)
def test_detection_sizes(stage, dtype):
    factor = 800 / 224, 1344 / 224
    sides = (round(side * f) for side, f in zip((stage.height, stage.width), factor))
    height, width = sides
    check(lpu_call(dataclasses.replace(stage, height=height, width=width), dtype, device="cuda"))


def test_a_map_of_more_than_2_to_the_31_elements():
    """The last images of a batch lie where 32-bit offsets do not reach: equal to the same images alone."""
    stage = StageShape("", 0, 64, 64, 64, 1, 64, 8)
    images = 2**31 // (64 * 64 * 64) + 3
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    last = lpu_call(dataclasses.replace(stage, batch=4), torch.bfloat16, device="cuda")
    x = torch.zeros(images, 64, 64, 64, dtype=torch.bfloat16, device="cuda")
    x[-4:] = last.x
    for large, small in zip(LPUCall(last.step, x).run(TRITON), last.run(TRITON)):
        assert torch.equal(large[-4:], small)


def test_streams():
    """Calls on several streams at once do not disturb each other."""
    calls = [
        lpu_call(stage_shapes("cmt_s", 8)[seed % 4], torch.bfloat16, device="cuda", seed=seed) for seed in range(8)
    ]
    assert_same_on_streams([partial(call.run, TRITON) for call in calls])


def test_a_run_repeats_bit_for_bit_also_in_a_graph():
    call = lpu_call(stage_shapes("cmt_b", 4)[0], torch.bfloat16, device="cuda")
    assert_same_in_a_graph(partial(call.run, TRITON))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    call = lpu_call(StageShape("", 2, 6, 5, 12, 1, 12, 2), dtype, device="cuda")
    step = call.step
    for x in (call.x, call.x.transpose(1, 2)):
        torch.library.opcheck(lpu_reduce_triton, (x, step.taps, step.bias, step.reduction, 2, step.channels, step.eps))


def test_compiles_into_one_graph():
    call = lpu_call(stage_shapes("cmt_s", 2)[1], torch.bfloat16, device="cuda")
    compiled = torch.compile(lambda x: LPUCall(call.step, x).run(TRITON), fullgraph=True)
    assert all(torch.equal(*pair) for pair in zip(compiled(call.x), call.run(TRITON)))
