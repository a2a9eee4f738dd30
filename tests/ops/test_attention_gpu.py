"""The Triton kernels of attention on a GPU: real shapes, every dtype, offsets beyond 2^31, streams, graphs, torch.compile."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from repeats import assert_same_in_a_graph, assert_same_on_streams
from torch import Tensor

from cmt_fast import explain, use_backend
from cmt_fast.functional import reduced_kv_attention
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.inference.triton_steps import TRITON
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops.attention.reference import reduced_kv_attention_reference
from cmt_fast.testing.packed_attention import AttentionCall, attention_call
from cmt_fast.testing.poison import poisoned_empty
from cmt_fast.testing.shapes import StageShape, stage_shapes
from cmt_fast.testing.tolerance import assert_within

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: 800 x 1344 at 1/8, 1/16 and 1/32 of its size: 1050 keys. Fewer queries than stage a has, whose float64 logits would take 4.5 GB.
DETECTION = (
    StageShape("b", 1, 100, 168, 128, 2, 0, 4),
    StageShape("c", 1, 50, 84, 256, 4, 0, 2),
    StageShape("d", 1, 25, 42, 512, 8, 0, 1),
)


@pytest.fixture(autouse=True)
def insist():
    with use_backend("triton"):
        yield


def call_on_gpu(shape: StageShape, dtype: torch.dtype, absorbed: bool) -> AttentionCall:
    return attention_call(shape, dtype, absorbed=absorbed, device="cuda")


def check(call: AttentionCall) -> None:
    actual = call.run(TRITON)
    assert_within("out", actual, call.double().run(TORCH), call.run(TORCH))
    assert not actual[..., call.step.channels :].any(), "padding must stay 0"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_of_the_variants(variant, dtype, tf32):
    for shape in stage_shapes(variant, batch=3):
        check(call_on_gpu(shape, dtype, absorbed=shape.name[-1] in "ab"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "projected"])
def test_streamed_keys(absorbed, dtype):
    for shape in DETECTION:
        check(call_on_gpu(shape, dtype, absorbed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_dim(dtype):
    for d in (1, 7, 16, 46, 52, 64, 76, 128, 256):
        for keys in (1, 49, 130):
            check_primitive(inputs(2, 2, 70, keys, d, max(1, d - 3), dtype))


def inputs(batch: int, heads: int, queries: int, keys: int, d: int, dv: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and bias, with the strides that linear layers make."""
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((batch, queries, heads, d), (batch, keys, heads, d), (batch, keys, heads, dv))
    q, k, v = (torch.randn(s, generator=generator, device="cuda", dtype=dtype).transpose(1, 2) for s in sizes)
    return [q, k, v, torch.randn(heads, queries, keys, generator=generator, device="cuda", dtype=dtype)]


def check_primitive(tensors: list[Tensor]) -> None:
    scale = tensors[0].shape[-1] ** -0.5
    exact = reduced_kv_attention_reference(*(t.double() for t in tensors), scale)
    assert_within("out", reduced_kv_attention(*tensors), exact, reduced_kv_attention_reference(*tensors, scale))


def needs_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free:.0f} are free")


@pytest.mark.parametrize("stage", ["a", "c", "d"])
def test_maps_beyond_32_bit_offsets(stage):
    """The last image of a batch of more than 2^31 elements equals the same image alone."""
    needs_memory(30)
    shape = next(s for s in stage_shapes("cmt_s") if s.name.endswith(stage))
    call = call_on_gpu(shape, torch.bfloat16, absorbed=stage == "a")
    images = 2**31 // call.y.numel() + 2
    batch = dataclasses.replace(
        call, y=call.y.expand(images, -1, -1, -1).contiguous(), keys_values=call.keys_values.expand(images, -1, -1)
    )
    out = batch.run(TRITON)
    assert torch.equal(out[-1], out[0])
    assert_within("last image", out[-1:], call.double().run(TORCH), call.run(TORCH))


def test_a_bias_beyond_32_bit_offsets():
    """The last queries of a table of more than 2^31 elements equal the same queries alone."""
    needs_memory(12)
    side = 33_000
    q, k, v, _ = inputs(1, 2, side, side, 16, 16, torch.bfloat16)
    bias = torch.zeros(2, side, side, device="cuda", dtype=torch.bfloat16)
    bias[:, -100:] = torch.randn(2, 100, side, device="cuda")
    last = [q[:, :, -100:], k, v, bias[:, -100:]]
    exact = reduced_kv_attention_reference(*(t.double() for t in last), 0.25)
    plain = reduced_kv_attention_reference(*last, 0.25)
    assert_within("last queries", reduced_kv_attention(q, k, v, bias)[:, :, -100:], exact, plain)


def test_streams():
    """Calls on several streams at once equal the same calls one after the other."""
    calls = [
        attention_call(stage_shapes("cmt_s", batch=8)[i], torch.bfloat16, absorbed=i < 2, device="cuda", seed=i)
        for i in range(4)
    ]
    assert_same_on_streams([partial(call.run, TRITON) for call in calls])


def test_in_a_cuda_graph():
    call = call_on_gpu(stage_shapes("cmt_s", batch=2)[3], torch.bfloat16, absorbed=False)
    assert_same_in_a_graph(partial(call.run, TRITON))


def test_on_the_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    call = attention_call(stage_shapes("cmt_s")[0], torch.bfloat16, absorbed=True, device="cuda:1")
    check(call)


def test_compiled():
    tensors = inputs(2, 2, 70, 49, 64, 64, torch.float16)
    compiled = torch.compile(lambda *t: reduced_kv_attention(*t).transpose(1, 2).flatten(2), fullgraph=True)
    expected = reduced_kv_attention(*tensors).transpose(1, 2).flatten(2)
    torch.testing.assert_close(compiled(*tensors), expected)


def test_auto_takes_it():
    q, k, v, bias = inputs(1, 1, 3, 4, 5, 6, torch.bfloat16)
    with use_backend("auto"):
        assert ("reduced_kv_attention", "triton") in explain(reduced_kv_attention, q, k, v, bias).calls
        bias.requires_grad_()
        reduced_kv_attention(q, k, v, bias).sum().backward()
    assert bias.grad is not None


# ---- training ------------------------------------------------------------------------------------------------------------

NAMES = ("out", "dq", "dk", "dv", "dbias")


def gradients(function, tensors: list[Tensor], grad: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output and the gradient of every input."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def check_gradients(tensors: list[Tensor]) -> None:
    q, k, v, _ = tensors
    grad = torch.randn_like(reduced_kv_attention(*tensors))

    def reference(*leaves: Tensor) -> Tensor:
        return reduced_kv_attention_reference(*leaves, q.shape[-1] ** -0.5)

    # the gradients of the logits cancel to 0 over the keys: their terms have the size of dP
    terms = (grad.double() @ v.double().transpose(-2, -1)).abs().max().item()
    factor = terms * q.shape[-1] ** -0.5
    sizes = dict(dq=factor * k.abs().max().item(), dk=factor * q.abs().max().item(), dbias=terms)
    exact, own = gradients(reference, tensors, grad, torch.float64), gradients(reference, tensors, grad)
    with poisoned_empty():
        found = gradients(reduced_kv_attention, tensors, grad)
    for name, *values in zip(NAMES, found, exact, own):
        assert_within(name, *values, backward=name != "out", scale=sizes.get(name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_at_the_stages_of_the_variants(variant, dtype, tf32):
    for s in stage_shapes(variant, batch=3):
        check_gradients(inputs(3, s.heads, s.queries, s.keys, s.qk_head_dim, s.v_head_dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_every_head_dim(dtype):
    for d in (1, 7, 16, 46, 52, 64, 76, 128, 256):
        for keys in (1, 49, 130):
            check_gradients(inputs(2, 2, 300, keys, d, max(1, d - 3), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_where_keys_stream(dtype):
    for s in DETECTION:
        check_gradients(inputs(1, s.heads, s.queries, s.keys, s.qk_head_dim, s.v_head_dim, dtype))


def test_under_autocast():
    """Float32 leaves and bias, products in bfloat16."""
    tensors = [t.float() for t in inputs(2, 2, 200, 49, 64, 64, torch.bfloat16)]
    grad = torch.randn(2, 2, 200, 64, device="cuda", dtype=torch.bfloat16)

    def mixed(function):
        def call(*leaves: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return function(*leaves)

        return gradients(call, tensors, grad)

    def reference(*leaves: Tensor) -> Tensor:
        return reduced_kv_attention_reference(*leaves, 64**-0.5)

    exact = gradients(reference, tensors, grad, torch.float64)
    for name, *values in zip(NAMES, mixed(reduced_kv_attention), exact, mixed(reference)):
        assert_within(name, *values, backward=name != "out", dtype=torch.bfloat16)


@pytest.mark.parametrize("keys", [49, 1050])
def test_repeats_bit_for_bit(keys):
    """A thousand times, with other work on the device between."""
    tensors = inputs(2, 2, 784, keys, 64, 64, torch.bfloat16)
    grad = torch.randn_like(reduced_kv_attention(*tensors))
    expected = gradients(reduced_kv_attention, tensors, grad)
    for i in range(1000):
        if i % 100 == 0:
            torch.randn(1 << 24, device="cuda").sort()
        assert all(map(torch.equal, gradients(reduced_kv_attention, tensors, grad), expected)), i


def test_gradients_beyond_32_bit_offsets():
    """The last image of a batch whose maps have more than 2^31 elements has the gradients of the same image alone."""
    needs_memory(45)
    q, k, v, bias = inputs(1, 1, 3136, 49, 64, 64, torch.bfloat16)
    images = 2**31 // q.numel() + 2
    batch = [*(t.expand(images, -1, -1, -1) for t in (q, k, v)), bias]
    grad = torch.randn_like(q)
    leaves = [t.detach().requires_grad_() for t in batch[:3]]
    out = reduced_kv_attention(*leaves, bias)
    found = torch.autograd.grad(out, leaves, grad.expand(images, -1, -1, -1))
    alone = gradients(lambda *t: reduced_kv_attention(*t, bias), [q, k, v], grad)
    for name, t, expected in zip(NAMES, (out, *found), alone):
        torch.testing.assert_close(t[-1:], expected, msg=lambda text, name=name: f"{name}: {text}")


def test_training_compiled():
    tensors = inputs(2, 2, 70, 49, 64, 64, torch.float16)
    grad = torch.randn_like(reduced_kv_attention(*tensors))
    compiled = torch.compile(reduced_kv_attention, fullgraph=True)
    for found, expected in zip(gradients(compiled, tensors, grad), gradients(reduced_kv_attention, tensors, grad)):
        torch.testing.assert_close(found, expected)
