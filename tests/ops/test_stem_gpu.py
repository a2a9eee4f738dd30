"""The Triton kernels of the stem on a GPU: real shapes, every dtype and layout, offsets beyond 2^31, streams, graphs."""

import dataclasses
from functools import partial

import pytest
import torch
from repeats import assert_same_in_a_graph, assert_same_on_streams

import cmt_fast
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.inference.triton_steps import TRITON
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops.stem.schema import stem_embed_triton, stem_triton
from cmt_fast.testing.packed_stem import StemCall, stem_call, stem_embed_call
from cmt_fast.testing.shapes import stage_shapes
from cmt_fast.testing.tolerance import assert_within

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def insist():
    """A call that the kernels cannot run is an error here."""
    with cmt_fast.use_backend("triton"):
        yield


def check(call: StemCall, width: int) -> None:
    actual = call.run(TRITON)
    assert_within("map", actual, call.double().run(TORCH), call.run(TORCH))
    assert not actual[..., width:].any(), "padding must stay 0"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, dtype, tf32):
    width, side = VARIANTS[variant].config["stem_channel"], VARIANTS[variant].resolution
    check(stem_call((3, 3, side, side), width, dtype, device="cuda"), width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_with_the_patch_embedding(variant, batch, dtype, tf32):
    shape = stage_shapes(variant, batch)[0]
    image = (batch, 3, 4 * shape.height, 4 * shape.width)
    call = stem_embed_call(image, shape.in_dim, shape.dim, dtype, device="cuda")
    actual = call.run(TRITON)
    assert_within("tokens", actual, call.double().run(TORCH), call.run(TORCH))
    assert not actual[..., shape.dim :].any(), "padding must stay 0"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 800, 1344), (2, 1, 33, 65), (2, 4, 7, 200), (1, 100, 31, 18)], ids=str)
def test_other_images(shape, dtype):
    check(stem_call(shape, 32, dtype, device="cuda"), 32)


def test_strides():
    call = stem_call((4, 3, 64, 96), 32, torch.bfloat16, device="cuda")
    expected = call.run(TRITON)
    for x in (
        call.x.contiguous(memory_format=torch.channels_last),
        call.x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert torch.equal(dataclasses.replace(call, x=x).run(TRITON), expected)
    wide = dataclasses.replace(call, x=call.x.float())  # rounded by the kernel
    assert torch.equal(wide.run(TRITON), expected)


def test_maps_of_more_than_2_to_the_31_elements():
    """The last images of a batch lie where 32-bit offsets do not reach: equal to the same images alone."""
    images = 2**31 // (64 * 64 * 32) + 3
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    last = stem_call((4, 3, 128, 128), 32, torch.bfloat16, device="cuda")
    x = torch.zeros(images, 3, 128, 128, dtype=torch.bfloat16, device="cuda")
    x[-4:] = last.x
    assert torch.equal(StemCall(last.step, x).run(TRITON)[-4:], last.run(TRITON))
    last = stem_embed_call((4, 3, 128, 128), 32, 64, torch.bfloat16, device="cuda")
    few = dataclasses.replace(last, x=x[-64:].clone())  # as many as fill a GPU: the same tile
    many = dataclasses.replace(last, x=x)
    assert torch.equal(many.run(TRITON)[-4:], few.run(TRITON)[-4:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    call = stem_call((2, 3, 12, 9), 13, dtype, device="cuda")
    for x in (call.x, call.x.transpose(2, 3)):
        torch.library.opcheck(stem_triton, (x, *vars(call.step).values()))
    embed = stem_embed_call((2, 3, 12, 9), 13, 20, dtype, device="cuda").embed
    embedding = (embed.weight, embed.bias, embed.scale, embed.shift, embed.channels, embed.eps)
    torch.library.opcheck(stem_embed_triton, (call.x, *vars(call.step).values(), *embedding))


def test_streams():
    """Calls on several streams at once do not disturb each other."""
    calls = [stem_call((2, 3, 64, 64), 32, torch.bfloat16, device="cuda", seed=seed) for seed in range(8)]
    assert_same_on_streams([partial(call.run, TRITON) for call in calls])


def test_a_run_repeats_bit_for_bit_also_in_a_graph():
    call = stem_embed_call((4, 3, 64, 96), 38, 76, torch.bfloat16, device="cuda")
    assert_same_in_a_graph(partial(call.run, TRITON))


def test_compiles_into_one_graph():
    call = stem_embed_call((4, 3, 64, 96), 38, 76, torch.bfloat16, device="cuda")
    compiled = torch.compile(lambda x: dataclasses.replace(call, x=x).run(TRITON), fullgraph=True)
    assert torch.equal(compiled(call.x), call.run(TRITON))
