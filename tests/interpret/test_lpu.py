"""The Triton kernel of the local perception unit with LayerNorm and reduction in the interpreter: against float64, as an operator, and when it is chosen."""

import dataclasses

import pytest
import torch
from layers import draw
from mutation import mutate
from torch import Tensor

import cmt_fast
from cmt_fast.inference.program import Padding
from cmt_fast.inference.torch_steps import TORCH
from cmt_fast.inference.triton_steps import TRITON
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops._triton import norm, sliding
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.reasons import call_reasons
from cmt_fast.ops.depthwise import reasons as depthwise_reasons
from cmt_fast.ops.lpu import triton_kernels, triton_launch
from cmt_fast.ops.lpu.schema import lpu_reduce_triton
from cmt_fast.testing.packed_lpu import LPUCall, lpu_call
from cmt_fast.testing.shapes import StageShape, stage_shapes
from cmt_fast.testing.tolerance import Comparison, compare
from cmt_fast.testing.verification import verify

DTYPES = (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def insist():
    """A call that the kernel cannot run is an error here."""
    with cmt_fast.use_backend("triton"):
        yield


def shape(batch: int, height: int, width: int, dim: int, k: int) -> StageShape:
    return StageShape("", batch, height, width, dim, 1, dim, k)


def compared(call: LPUCall) -> list[Comparison]:
    maps = call.run(TRITON)
    for map_ in maps:
        assert map_.is_contiguous()
    results = zip(("y", "reduced"), maps, call.double().run(TORCH), call.run(TORCH))
    padding = torch.cat([map_[..., call.step.channels :].flatten() for map_ in maps])
    zero = torch.zeros_like(padding)
    return [compare("padding", padding, zero, zero), *(compare(*result) for result in results)]


def check(call: LPUCall) -> None:
    for result in compared(call):
        assert result.passed, str(result)


# ---- with LayerNorm and reduction, against float64 -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_of_the_variants(variant, dtype):
    """Their channels and reductions, on maps of two keys and some rows and columns beyond."""
    for stage in stage_shapes(variant):
        k = stage.sr_ratio
        check(lpu_call(shape(1, k + k // 2, 2 * k + 1, stage.dim, k), dtype))


@pytest.mark.parametrize("part", range(5))
def test_random_shapes(part, on):
    generator = torch.Generator().manual_seed(part)
    for seed in range(20):
        on(multiprocessors=(1, 132)[draw(generator, 0, 1)])
        k = (1, 1, 2, 2, 4, 8)[draw(generator, 0, 5)]
        height, width = (draw(generator, k, k + 4) for _ in range(2))
        dim = draw(generator, 1, (16, 150)[draw(generator, 0, 1)])
        padding = Padding(channels=(1, 8)[draw(generator, 0, 1)])
        call = shape(draw(generator, 1, 2), height, width, dim, k)
        check(lpu_call(call, DTYPES[draw(generator, 0, 1)], padding=padding, seed=seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(2, 1, 9, 20, 1), (2, 9, 1, 20, 1), (3, 1, 1, 5, 1), (2, 4, 4, 20, 4), (1, 2, 7, 300, 2), (40, 3, 3, 8, 2)],
    ids=["one row", "one column", "one pixel", "one key", "wide", "many images"],
)
def test_edges(sizes, dtype, on):
    check(lpu_call(shape(*sizes), dtype))
    on(multiprocessors=1)
    check(lpu_call(shape(*sizes), dtype))


def test_no_image():
    call = lpu_call(shape(0, 4, 6, 8, 2), torch.float32)
    assert [tuple(map_.shape) for map_ in call.run(TRITON)] == [(0, 4, 6, 8), (0, 2, 3, 8)]


def test_strides():
    call = lpu_call(shape(2, 4, 6, 10, 2), torch.float16)
    expected = call.run(TRITON)
    strided = dataclasses.replace(call, x=call.x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0))
    for actual, wanted in zip(strided.run(TRITON), expected):
        assert torch.equal(actual, wanted) and actual.is_contiguous()


def test_length_of_a_strip_changes_no_bit(on):
    call = lpu_call(shape(2, 12, 10, 20, 2), torch.float16)
    on(multiprocessors=1)
    long = call.run(TRITON)
    on(multiprocessors=1000)
    assert all(torch.equal(*pair) for pair in zip(call.run(TRITON), long))


def test_not_a_number_reaches_its_neighbours_only():
    call = lpu_call(shape(2, 6, 8, 10, 2), torch.float32)
    call.x[0, 2, 3, 4] = float("nan")
    y, reduced = call.run(TRITON)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[0, 1:4, 2:5, 4] = True
    assert torch.equal(y.isnan(), touched)
    touched = torch.zeros_like(reduced, dtype=torch.bool)
    touched[0, :2, 1:3] = True  # LayerNorm carries it to all channels
    assert torch.equal(reduced[..., :10].isnan(), touched[..., :10])


# ---- as an operator, and when it is chosen -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    for k in (1, 2):
        call = lpu_call(shape(1, 2, 3, 4, k), dtype)
        step, numbers = call.step, (k, call.step.channels, call.step.eps)
        x = call.x.transpose(1, 2) if k == 1 else call.x
        torch.library.opcheck(lpu_reduce_triton, (x, step.taps, step.bias, step.reduction, *numbers))


def test_auto_takes_it():
    cmt_fast.set_backend("auto")
    call = lpu_call(shape(1, 4, 4, 5, 2), torch.float32)
    assert ("packed lpu", "triton") in cmt_fast.explain(call.run, TRITON).calls


def test_verify_compares_the_output_of_a_kernel_without_gradients(monkeypatch):
    monkeypatch.setattr(depthwise_reasons, "call_reasons", lambda *tensors, **_: call_reasons(*tensors))
    checks = verify(["triton"], ["lpu"], ["float16"], quick=True)
    assert checks and all(check.passed and check.quantity == "output" for check in checks)
    monkeypatch.setattr(Launch, "run", lambda self: self.arguments["y"].zero_())
    assert not any(check.passed for check in verify(["triton"], ["lpu"], ["float16"], quick=True))


def test_verify_compares_packed_steps(monkeypatch):
    checks = verify(["triton"], ["packed_lpu", "packed_attention"], ["float16"], quick=True)
    assert {(check.op, check.quantity) for check in checks} == {
        ("packed_lpu", "output 0"),
        ("packed_lpu", "output 1"),
        ("packed_attention", "output 0"),
    }
    assert {check.case for check in checks if check.op == "packed_attention"} >= {
        "ti-like, absorbed",
        "ti-like, projected",
    }
    assert all(check.passed for check in checks)
    monkeypatch.setattr(triton_launch.Launch, "run", lambda self: self.arguments["y"].zero_())
    assert not any(check.passed for check in verify(["triton"], ["packed_lpu"], ["float16"], quick=True))


def test_compiles_into_one_graph():
    call = lpu_call(shape(1, 4, 4, 5, 2), torch.float32)
    step = torch.compile(lambda x: LPUCall(call.step, x).run(TRITON), fullgraph=True, backend="eager")
    assert all(torch.equal(*pair) for pair in zip(step(call.x), call.run(TRITON)))


def test_reasons(monkeypatch):
    def message(call: LPUCall) -> str:
        with pytest.raises(cmt_fast.BackendError) as error:
            call.run(TRITON)
        return str(error.value)

    call = lpu_call(shape(1, 6, 6, 8, 2), torch.float32)
    assert "dtype must be bfloat16, float16 or float32, got torch.float64" in message(call.double())
    assert "taps, bias and reduction must be float32" in message(call.double())
    assert "k must be a power of two, got 3" in message(lpu_call(shape(1, 6, 6, 8, 3), torch.float32))
    wide = lpu_call(shape(1, 2, 2, 4100, 2), torch.float32)
    assert "k times the channels, rounded up to a power of two, must be at most 8192, got 16384" in message(wide)
    large = dataclasses.replace(call, x=torch.empty(1).expand(1, 1 << 16, 1 << 16, 8))
    assert "the map of one image must have less than 2^31 elements, got 38654705664" in message(large)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast is on" in message(call)
    call.step.bias.requires_grad_()
    assert "gradients are needed, and this version's Triton kernels are for inference only" in message(call)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "Triton kernels run on CUDA tensors, got cpu" in message(call)


# ---- a wrong kernel is found ---------------------------------------------------------------------------------------------

MUTATIONS = {
    "no bias": ("empty += tl.load(bias", "empty += 0.0 * tl.load(bias"),
    "no left border": ("left = inside_e & (j_e > 0)", "left = inside_e"),
    "no right border": ("right = inside_o & (j_o < width - 1)", "right = inside_o"),
    "no upper border": ("(row, first > 0,", "(row, first >= 0,"),
    "no lower border": ("(row, h + 2 < height,", "(row, h + 2 < height + 1,"),
    "pairs never split": ("image_e == image_o, left", "image_e >= 0, left"),
    "a tap of the row above": ("right, taps[3], taps[4], taps[5]", "right, taps[0], taps[4], taps[5]"),
    "statistics of padding": (
        "c < CHANNELS, CHANNELS, eps, CHANNELS < BLOCK_C)\n            y_o",
        "c < C, C, eps, C < BLOCK_C)\n            y_o",
    ),
    "mean not subtracted": ("centred = x - (tl.sum(x, 1) / channels)[:, None]", "centred = x"),
    "one weight a window": ("tl.load(weight + C,", "tl.load(weight,"),
    "windows of the first image": ("(window_image - first_image) * (down * across)", "0"),
}


def guarded(x: Tensor) -> Tensor:
    """The same between NaN: a wrong kernel may read a row too far."""
    row = x[0, :2].numel()
    memory = torch.full((x.numel() + 2 * row,), float("nan"), dtype=x.dtype)
    memory[row:-row] = x.flatten()
    return memory[row:-row].view(x.shape)


def failures(monkeypatch, tmp_path, on, old: str, new: str) -> list[str]:
    """What leaves the policy when the kernel's source is changed."""
    *_, kernels = mutate(monkeypatch, tmp_path, [norm, sliding, triton_kernels], old, new)
    monkeypatch.setattr(triton_launch, "lpu_kernel", kernels.lpu_kernel)
    results = []
    for multiprocessors, k in ((1, 2), (132, 2), (132, 1)):
        on(multiprocessors=multiprocessors)
        call = lpu_call(shape(2, 5, 5, 12, k), torch.float16)
        results += compared(dataclasses.replace(call, x=guarded(call.x)))
    return [str(result) for result in results if not result.passed]


def test_without_a_mutation(monkeypatch, tmp_path, on):
    """The calls that find the mutations pass with the kernel as it is."""
    assert failures(monkeypatch, tmp_path, on, "empty += tl", "empty += tl") == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, monkeypatch, tmp_path, on):
    assert failures(monkeypatch, tmp_path, on, *MUTATIONS[name])
