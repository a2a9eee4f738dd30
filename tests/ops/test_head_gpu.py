"""The Triton kernels of the head on a GPU: real shapes, every dtype and form, offsets beyond 2^31, streams, graphs."""

from functools import partial

import pytest
import torch
from repeats import assert_same_in_a_graph, assert_same_on_streams

import cmt_fast
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.inference.triton_steps import TRITON
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops.head.schema import head_features_triton, head_linear_triton
from cmt_fast.testing.packed_head import HeadCall, head_call
from cmt_fast.testing.shapes import stage_shapes
from cmt_fast.testing.tolerance import assert_within

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def insist():
    """A call that the kernels cannot run is an error here."""
    with cmt_fast.use_backend("triton"):
        yield


def check(call: HeadCall) -> None:
    assert_within("result", call.run(TRITON), call.double().run(TORCH), call.run(TORCH))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, 64])
def test_variants(variant, dtype, batch, tf32):
    shape = stage_shapes(variant, batch)[-1]
    check(head_call((batch, shape.height, shape.width, shape.dim), dtype, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [dict(classes=None), dict(hidden=300), dict(classes=None, pool=False)], ids=str)
def test_forms(form, dtype):
    for shape in ((5, 7, 7, 512), (2, 25, 42, 368), (3, 1, 1, 46)):
        check(head_call(shape, dtype, device="cuda", **form))


def test_a_map_of_more_than_2_to_the_31_elements():
    """The last images of a batch lie where 32-bit offsets do not reach: equal to the same images in half the batch."""
    images = 2**31 // (49 * 512) + 3
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    last = head_call((4, 7, 7, 512), torch.bfloat16, device="cuda")
    x = torch.zeros(images, 7, 7, 512, dtype=torch.bfloat16, device="cuda")
    x[-4:] = last.x
    half = HeadCall(last.step, x[-images // 2 :].clone())
    assert torch.equal(HeadCall(last.step, x).run(TRITON)[-4:], half.run(TRITON)[-4:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    call = head_call((2, 6, 5, 12), dtype, features=20, classes=3, device="cuda")
    step = call.step
    for x in (call.x, call.x.transpose(1, 2)):
        for pool in (True, False):
            torch.library.opcheck(head_features_triton, (x, step.weight, step.bias, pool))
    x = torch.randn(2, len(step.weight), device="cuda", dtype=dtype)
    torch.library.opcheck(head_linear_triton, (x, step.class_weight, step.class_bias))


def test_streams():
    """Calls on several streams at once do not disturb each other."""
    calls = [head_call((16, 7, 7, 512), torch.bfloat16, device="cuda", seed=seed) for seed in range(8)]
    assert_same_on_streams([partial(call.run, TRITON) for call in calls])


def test_a_run_repeats_bit_for_bit_also_in_a_graph():
    call = head_call((4, 8, 8, 608), torch.bfloat16, device="cuda")
    assert_same_in_a_graph(partial(call.run, TRITON))


def test_compiles_into_one_graph():
    call = head_call((4, 8, 8, 608), torch.bfloat16, device="cuda")
    compiled = torch.compile(lambda x: HeadCall(call.step, x).run(TRITON), fullgraph=True)
    assert torch.equal(compiled(call.x), call.run(TRITON))
