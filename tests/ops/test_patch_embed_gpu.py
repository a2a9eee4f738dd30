"""The Triton kernel of the patch embedding on a GPU: real shapes, every dtype, offsets beyond 2^31, streams, graphs."""

from functools import partial

import pytest
import torch
from repeats import assert_same_in_a_graph, assert_same_on_streams

import cmt_fast
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.inference.triton_steps import TRITON
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops.patch_embed.schema import patch_embed_triton
from cmt_fast.testing.packed_patch_embed import PatchEmbedCall, patch_embed_call
from cmt_fast.testing.shapes import StageShape, stage_shapes
from cmt_fast.testing.tolerance import assert_within

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def insist():
    """A call that the kernels cannot run is an error here."""
    with cmt_fast.use_backend("triton"):
        yield


def stage_call(shape: StageShape, dtype: torch.dtype, seed: int = 0) -> PatchEmbedCall:
    map_ = (shape.batch, 2 * shape.height, 2 * shape.width, shape.in_dim)
    return patch_embed_call(map_, shape.dim, dtype, device="cuda", seed=seed)


def check(call: PatchEmbedCall) -> None:
    actual = call.run(TRITON)
    assert_within("tokens", actual, call.double().run(TORCH), call.run(TORCH))
    assert not actual[..., call.step.channels :].any(), "padding must stay 0"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, 16])
def test_stages_of_the_variants(variant, dtype, batch, tf32):
    for shape in stage_shapes(variant, batch):
        check(stage_call(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_maps(dtype):
    for shape in ((3, 25, 43, 64), (1, 2, 3, 8), (5, 7, 200, 46)):
        check(patch_embed_call(shape, 92, dtype, device="cuda"))


def test_maps_of_more_than_2_to_the_31_elements():
    """The last images of a batch lie where 32-bit offsets do not reach: equal to the same images alone."""
    images = 2**31 // (32 * 32 * 64) + 3
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    last = patch_embed_call((4, 32, 32, 64), 128, torch.bfloat16, device="cuda")
    x = torch.zeros(images, 32, 32, 64, dtype=torch.bfloat16, device="cuda")
    x[-4:] = last.x
    # Fewer tokens have another tile, and another order of sums in LayerNorm.
    few = PatchEmbedCall(last.step, x[-images // 2 :].clone())
    assert torch.equal(PatchEmbedCall(last.step, x).run(TRITON)[-4:], few.run(TRITON)[-4:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    call = patch_embed_call((2, 6, 5, 12), 20, dtype, device="cuda")
    step = call.step
    for x in (call.x, call.x.transpose(1, 2)):
        arguments = (x, step.weight, step.bias, step.scale, step.shift, step.channels, step.eps)
        torch.library.opcheck(patch_embed_triton, arguments)


def test_streams():
    """Calls on several streams at once do not disturb each other."""
    calls = [stage_call(stage_shapes("cmt_s", 8)[seed % 4], torch.bfloat16, seed) for seed in range(8)]
    assert_same_on_streams([partial(call.run, TRITON) for call in calls])


def test_a_run_repeats_bit_for_bit_also_in_a_graph():
    call = stage_call(stage_shapes("cmt_b", 4)[1], torch.bfloat16)
    assert_same_in_a_graph(partial(call.run, TRITON))


def test_compiles_into_one_graph():
    call = stage_call(stage_shapes("cmt_b", 4)[1], torch.bfloat16)
    compiled = torch.compile(lambda x: PatchEmbedCall(call.step, x).run(TRITON), fullgraph=True)
    assert torch.equal(compiled(call.x), call.run(TRITON))
